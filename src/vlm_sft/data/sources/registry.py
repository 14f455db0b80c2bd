"""Finds the source of a data set by its name and loads a split of it. Heavy libraries are imported by the sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vlm_sft.common.errors import DataError
from vlm_sft.data.sources import chartqa, demo, easy_vqa, jsonl, published, textvqa
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.data.sources.splits import SPLITS, LoadedSplit

__all__ = ["SPLITS", "DatasetSpec", "LoadedSplit", "benchmark_split", "is_synthetic", "load_split", "parse_datasets"]

LOADERS: dict[str, Callable[[DatasetSpec, str], LoadedSplit]] = {
    "chartqa": chartqa.load,
    "textvqa": textvqa.load,
    "easy_vqa": easy_vqa.load,
    **dict.fromkeys(published.SOURCES, published.load),
}


def load_split(spec: DatasetSpec, split: str, at_most: int | None = None) -> LoadedSplit:
    """Load one split of one data set.

    "train" and "validation" are for training and never overlap in images where the source lets us hold out;
    `benchmark_split(spec.name)` is for the final scores.

    Args:
        spec: from `parse_datasets`.
        split: "train", "validation" or "test".
        at_most: draw no more samples than this of generated data, and fetch no more rows of a streamed set. Other
            data is always whole, so that a limit can be a seeded sample of it.

    Returns:
        Samples, what was left out, and a description.

    Raises:
        DataError: the data cannot be reached, read, or does not have this split.
    """
    if spec.name in demo.KINDS:
        return demo.load(spec, split, at_most)
    if spec.stream is not None:
        if at_most is None:
            what = f"{spec.hub or spec.name}@stream: without a limit the whole set would be downloaded"
            raise DataError(what, "pass --max_train and --max_eval (eval, data check: --limit), or leave @stream out")
        spec = replace(spec, stream=at_most)
    return LOADERS.get(spec.name, jsonl.load)(spec, split)


def benchmark_split(name: str) -> str:
    """The split of `load_split` that final scores are reported on: "test" for every source.

    TextVQA's official test set has no public answers: there, "test" is the official validation set, as in the
    literature, and "validation" is held out of the official train set. Own data without a test file falls back to
    its validation part.
    """
    return "test"


def is_synthetic(name: str) -> bool:
    """True for generated data sets."""
    return name in demo.KINDS
