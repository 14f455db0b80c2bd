"""The cache folder: where prepared data lies, what is in it, how it is emptied.

Every entry is a folder `<kind>/<key>` whose key is a hash of all settings that its content depends on, with an
`entry.json` that says what they are. A changed setting is another key, so nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import read_json, write_json
from vlm_sft.common.errors import RunError

FORMAT = 3  # of everything in the cache; part of every key
ENTRY = "entry.json"
IMAGES, TOKENS, FEATURES = "images", "tokens", "features"
KINDS = (IMAGES, TOKENS, FEATURES)
VARIABLE = "VLM_SFT_CACHE"
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the cache.

    Attributes:
        folder: where it lies.
        kind: "images", "tokens" or "features".
        what: what a person calls it: the model or processor.
        bytes: size on disk.
        last_used: seconds since 1970.
    """

    folder: Path
    kind: str
    what: str
    bytes: int
    last_used: float


def default_cache_dir() -> Path:
    """`$VLM_SFT_CACHE`, or ~/.cache/vlm_sft."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/vlm_sft").expanduser()


def settings_key(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings as canonical JSON, with the format of the cache; 32 hex digits.

    Args:
        settings: anything JSON can hold; other values enter by their text.
    """
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def open_entry(root: Path, kind: str, settings: Mapping[str, Any], what: str, weights: str = "") -> Path:
    """Make the folder of an entry, or mark an existing one as used now.

    Args:
        root: the cache folder.
        kind: one of `KINDS`.
        settings: all that the content depends on.
        what: what `vlm-sft data cache list` calls it.
        weights: `weights_fingerprint` of the model whose features these are; a forecast looks for it.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = root / kind / settings_key(settings)
    marker = folder / ENTRY
    try:
        _sweep([*folder.glob(".*.tmp"), *root.glob(".probe*")])
        value = _marker(marker) if weights else None
        if not marker.is_file() or value == {}:
            readable = json.loads(json.dumps(settings, default=str))
            value = {"format": FORMAT, "kind": kind, "what": what, "settings": readable}
            write_json(marker, value | ({"weights": [weights]} if weights else {}))
        elif value is not None and weights not in (known := entry_weights(value)):
            write_json(marker, value | {"weights": [*known, weights]})
        else:
            os.utime(marker)
    except OSError as error:
        raise RunError(f"the cache {folder} cannot be written: {error.strerror}", "pass another --cache_dir") from error
    return folder


def _marker(path: Path) -> dict[str, Any]:
    """What a marker says; {} where it is missing or damaged."""
    try:
        value = read_json(path)
    except RunError:
        return {}
    return value if isinstance(value, dict) else {}


def entry_weights(value: Any) -> list[str]:
    """Fingerprints of the models whose features an entry holds.

    Args:
        value: what the entry's marker says.
    """
    marks = value.get("weights", []) if isinstance(value, dict) else []
    return [mark for mark in marks if isinstance(mark, str)] if isinstance(marks, list) else []


def _sweep(paths: Iterable[Path]) -> None:
    """Remove what killed processes left half-written; what is younger than a day may be in the works."""
    for path in paths:
        try:
            if path.stat().st_mtime < time.time() - _SECONDS_A_DAY:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def list_entries(root: Path) -> list[Entry]:
    """The entries below a cache folder, those used last first."""
    found = []
    for kind in KINDS:
        for marker in (root / kind).glob(f"*/{ENTRY}"):
            if marker.parent.is_symlink():  # it leads to files that nobody gave to the cache
                continue
            try:
                value = read_json(marker)
                what = str(value.get("what", "")) if isinstance(value, dict) else ""
                used = marker.stat().st_mtime
            except (RunError, FileNotFoundError):
                what, used = f"damaged {ENTRY}", 0.0
            found.append(Entry(marker.parent, kind, what, _folder_bytes(marker.parent), used))
    return sorted(found, key=lambda entry: -entry.last_used)


def cache_bytes(root: Path) -> int:
    """Bytes of everything in the cache."""
    return sum(entry.bytes for entry in list_entries(root))


def clear_entries(root: Path, older_than_days: float | None) -> tuple[int, int]:
    """Remove entries; runs that have them open keep what they mapped.

    Args:
        root: the cache folder.
        older_than_days: remove those that were not used for so many days; None for all.

    Returns:
        Number of entries removed, and their bytes.

    Raises:
        RunError: an entry cannot be removed.
    """
    limit = float("inf") if older_than_days is None else time.time() - older_than_days * _SECONDS_A_DAY
    gone = [entry for entry in list_entries(root) if entry.last_used <= limit]
    for entry in gone:
        try:
            # The marker goes last: what a killed removal leaves behind is still listed.
            for path in sorted(entry.folder.iterdir(), key=lambda path: path.name == ENTRY):
                path.unlink(missing_ok=True)
            shutil.rmtree(entry.folder)
        except OSError as error:
            raise RunError(f"{entry.folder} cannot be removed: {error.strerror}", "remove it by hand") from error
    return len(gone), sum(entry.bytes for entry in gone)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process is writing or clearing
            continue
    return total
