"""Any data set on the Hub as the user's own (`hub:ORG/NAME`): its rows as Arrow files in the cache of `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from vlm_sft.common.errors import DataError, bounded, quoted
from vlm_sft.data.sources.files import by_split
from vlm_sft.data.sources.hub import hub_reachable, offline
from vlm_sft.data.sources.stream import first_rows

Found = TypeVar("Found")


def hub_files(hub: str) -> dict[str, list[Path]]:
    """The Arrow files of a data set by split, downloaded where they are not in the cache.

    Args:
        hub: "ORG/NAME" or "ORG/NAME:CONFIG"; a folder of that name in the working folder comes first, as `datasets`
            has it.

    Raises:
        DataError: it cannot be reached, does not exist, needs a configuration, or has no split of ours.
    """
    return by_split({name: list(files) for name, files in _whole(hub)}, f"hub:{hub}")


def hub_splits(hub: str) -> dict[str, list[str]]:
    """The names of a data set's splits, by ours; only its description is fetched.

    Raises:
        DataError: as of `hub_files`.
    """
    return by_split({name: [name] for name in _split_names(hub)}, f"hub:{hub}")


def streamed_files(hub: str, splits: list[str], rows: int) -> list[Path]:
    """The Arrow files of the first rows of some splits, fetched without the rest; see `first_rows`.

    Args:
        hub: as of `hub_files`.
        splits: of `hub_splits`.
        rows: of each, at most.

    Raises:
        DataError: as of `hub_files`.
    """
    return [file for split in splits for file in _first(hub, split, rows)]


@cache
def _whole(hub: str) -> tuple[tuple[str, tuple[Path, ...]], ...]:
    import datasets

    hub_id, _, config = hub.partition(":")

    def load() -> tuple[tuple[str, tuple[Path, ...]], ...]:
        parts = datasets.load_dataset(hub_id, config or None, keep_in_memory=False)
        return tuple(
            (str(name), tuple(Path(file["filename"]) for file in part.cache_files)) for name, part in parts.items()
        )

    return _asked(hub, load)


@cache
def _split_names(hub: str) -> tuple[str, ...]:
    import datasets

    hub_id, _, config = hub.partition(":")
    return _asked(hub, lambda: tuple(datasets.get_dataset_split_names(hub_id, config or None)))


@cache
def _first(hub: str, split: str, rows: int) -> tuple[Path, ...]:
    hub_id, _, config = hub.partition(":")
    found = _asked(hub, lambda: first_rows(hub_id, config or None, split, rows))
    return tuple(Path(file["filename"]) for file in found.cache_files)


def _asked(hub: str, ask: Callable[[], Found]) -> Found:
    """What a question to the Hub gives, from the cache where the Hub cannot be reached.

    Raises:
        DataError: nothing.
    """
    hub_id = hub.partition(":")[0]
    online = Path(hub_id).is_dir() or hub_reachable()
    try:
        with offline(not online):
            return ask()
    except Exception as error:  # the Hub client and the readers of datasets raise dozens of unrelated classes
        cause = error.__cause__ or error
        reason = bounded(f"{type(cause).__name__}: {' '.join(str(cause).split())}", 400)
        if not online:
            raise DataError(
                f"hub:{hub} is on the Hugging Face Hub, which cannot be reached from here, and it is not in the local "
                "cache",
                "pass a folder of its parquet files, or set HF_HOME to the cache of a machine that has downloaded it",
            ) from error
        config = "onfig" in str(cause) and ":" not in hub
        fix = (
            f"name one of its configurations: hub:{hub}:CONFIG"
            if config
            else "correct the name; a set that is gated needs `hf auth login`"
        )
        raise DataError(f"hub:{hub} cannot be loaded ({quoted(hub_id)}): {reason}", fix) from error
