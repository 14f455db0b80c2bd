"""A bounded number of rows of a set on the Hub, without the rest of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.splits import SplitPlan, dealt, own_images

if TYPE_CHECKING:
    from datasets import Dataset

BUFFER_ROWS = 1000  # rows are mixed within so many, of shards in a seeded order
STREAM_SEED = 0


def first_rows(hub_id: str, config: str | None, hub_split: str, rows: int) -> Dataset:
    """Fetch rows of a Hub data set one after the other and keep them in the datasets cache.

    The order of the shards and of the rows within a buffer is seeded, so that another run gets the same rows, from the
    cache without the network.

    Args:
        hub_id: the data set.
        config: its configuration, where it has several.
        hub_split: its split.
        rows: how many rows at most.

    Returns:
        A memory-mapped table of them.
    """
    import datasets

    features = datasets.load_dataset(hub_id, config, split=hub_split, streaming=True).features
    for name in _pictures(features):
        assert features is not None
        features[name] = datasets.Image(decode=False)
    made = datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"hub_id": hub_id, "config": config, "hub_split": hub_split, "rows": rows},
        split=datasets.NamedSplit(hub_split),
    )
    assert isinstance(made, datasets.Dataset)
    return made


def _pictures(features: Any) -> list[str]:
    """The columns of images; their bytes stay as they are."""
    import datasets

    return [name for name, feature in (features or {}).items() if isinstance(feature, datasets.Image)]


def _rows(hub_id: str, config: str | None, hub_split: str, rows: int) -> Iterator[dict[str, Any]]:
    import datasets

    table = datasets.load_dataset(hub_id, config, split=hub_split, streaming=True)
    for name in ["image"] if table.features is None else _pictures(table.features):
        table = table.cast_column(name, datasets.Image(decode=False))
    # Newer versions fill the buffer from several shards at once, which opens more of them than the rows need.
    one = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in signature(table.shuffle).parameters else {}
    yield from table.shuffle(seed=STREAM_SEED, buffer_size=max(1, min(BUFFER_ROWS, rows)), **one).take(rows)


def split_stream(plan: SplitPlan, samples: list[Sample], fraction: float) -> tuple[SplitPlan, list[Sample]]:
    """Cut streamed samples down to their side of a hold-out by image, whatever else was fetched.

    The hold-out of a whole set takes a number of its images; here each image is dealt by its own hash, so that train
    and validation stay apart though they fetch different numbers of rows.

    Args:
        plan: what was asked for.
        samples: what was fetched.
        fraction: share of the images that a hold-out takes.

    Returns:
        A plan that has nothing left to cut, and the samples.
    """
    if plan.part == "all":
        return plan, samples
    kept = [sample for sample in samples if dealt(own_images(sample, set())[0], fraction, plan.held) == plan.part]
    return replace(plan, part="all"), kept
