"""Which rows make up train, validation and test: files by split, and hold-outs by image. No heavy imports."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.artifacts import CHANGED, EXCHANGE, IMPORT, LEFT_OUT, REPEATS
from vlm_sft.data.sample import LeftOut, Sample
from vlm_sft.data.sources.foreign import TABLES, refuse_compressed
from vlm_sft.errors import DataError, quoted

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
               "validation": "validation", "dev": "validation", "eval": "validation", "test": "test"}
DATASET_INFO = "dataset_info.json"  # LLaMA-Factory's description of the files beside it
NO_DATA = (LEFT_OUT, CHANGED, REPEATS, IMPORT, EXCHANGE, DATASET_INFO)  # reports and descriptions beside data files
HOLD_OUT_SEED = "vlm-sft hold-out 1"  # fixed: every run and every model must hold out the same images


class MissingSplitError(DataError):
    """The data set has no such split, and none that could stand in for it."""


@dataclass(frozen=True, slots=True)
class LoadedSplit:
    """The samples of one split of one data set.

    Attributes:
        samples: usable samples in the order of the source.
        left_out: samples that cannot be used, each with its reason.
        description: one line for people: what was read from where, and any note about the split.
        synthetic: True for generated data, which must be called so wherever it is shown.
    """

    samples: list[Sample]
    left_out: list[LeftOut]
    description: str
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How a requested split is made from what a source has.

    Attributes:
        source: the split of the source that is read: "train", "validation" or "test".
        part: "all" of it, or the "kept" or "held" side of its seeded hold-out by image.
        note: said to the user; "" when the split simply exists.
    """

    source: str
    part: str
    note: str = ""


def plan_split(available: Iterable[str], split: str, name: str) -> SplitPlan:
    """Decide what to read for `split`.

    Where there is no validation split, a seeded part of the train images is held out of train. A missing test split
    falls back to validation.

    Args:
        available: the splits that the source has, of "train", "validation", "test".
        split: the split asked for.
        name: the data set, for messages.

    Raises:
        MissingSplitError: the split cannot be made from what there is.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {quoted(split)}", f"choose one of {', '.join(SPLITS)}")
    has = set(available)
    if split == "train" and "train" in has:
        return SplitPlan("train", "all" if "validation" in has else "kept")
    if split == "test" and "test" in has:
        return SplitPlan("test", "all")
    instead = "" if split == "validation" else "there is no test split; "
    if split != "train" and "validation" in has:
        return SplitPlan("validation", "all", instead and instead + "the validation split stands in for it")
    if split != "train" and "train" in has:
        held = "a seeded part of the train images is held out, and the train split excludes it"
        return SplitPlan("train", "held", instead + held)
    have = ", ".join(sorted(has)) or "none"
    fix = f"add a file named {split}, or choose another split"
    raise MissingSplitError(f"{name} has no {split} split (it has: {have})", fix)


def split_of_name(name: str) -> str | None:
    """The split that a file or folder name speaks of ("val-00000-of-00002.parquet" -> "validation"), or None."""
    words = re.split(r"[^a-z]+", Path(name).stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def files_by_split(path: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Sort the data files under `path` by the split that their names (or their folders' names) speak of.

    Args:
        path: one file, or a folder that is searched with its subfolders.
        suffixes: file endings to take, e.g. (".parquet",).

    Returns:
        Files in sorted order by split; files that name no split count as train.

    Raises:
        DataError: there is no such file.
    """
    if path.is_file():
        return {split_of_name(path.name) or "train": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path).parts
        if any(part.startswith(".") for part in inside) or not file.is_file():
            continue
        if Path(file.stem).suffix in suffixes:  # train.jsonl.gz beside the others would be passed over
            refuse_compressed(file)
        if file.suffix not in suffixes or file.name in NO_DATA:
            continue
        split = next((found_split for part in reversed(inside) if (found_split := split_of_name(part))), "train")
        found.setdefault(split, []).append(file)
    if not found:
        fix = "pass the file, or the folder that holds it"
        if not set(TABLES) & set(suffixes) and any(file.suffix.lower() in TABLES for file in path.rglob("*")):
            fix = f"import its tables: vlm-sft data import {path} --format csv --output FOLDER"
        raise DataError(f"{path} holds no {' or '.join(suffixes)} file", fix)
    return found


def apply_plan(
    plan: SplitPlan, samples: list[Sample], left_out: list[LeftOut], fraction: float
) -> tuple[list[Sample], list[LeftOut]]:
    """Cut what was read down to the planned side of the hold-out.

    Samples that share any image stay on one side. Left-out samples are dealt to the sides by their ids, so that each
    is counted exactly once over train and validation.

    Args:
        plan: what was asked for.
        samples: all samples of the source split.
        left_out: all left-out samples of the source split.
        fraction: share of the images to hold out, 0 to 1; at least one where there are two.
    """
    if plan.part == "all":
        return samples, left_out
    groups = _connected_images(samples)
    ranked = sorted(set(groups.values()), key=_rank)
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1) if ranked else 0
    held = set(ranked[:count])
    want = plan.part == "held"
    kept = [sample for sample in samples if (groups[sample.images[0].key] in held) == want]
    return kept, [item for item in left_out if below(item.id, fraction) == want]


def below(text: str, fraction: float) -> bool:
    """Whether a text falls into a seeded part of all texts; it does not depend on which others there are."""
    return int(_rank(text)[:8], 16) < fraction * 2**32


def _rank(text: str) -> str:
    return hashlib.sha256(f"{HOLD_OUT_SEED}:{text}".encode("utf-8", "replace")).hexdigest()


def _connected_images(samples: list[Sample]) -> dict[str, str]:
    """For each image key, the least key of the group of images that samples tie together (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for sample in samples:
        first = root(sample.images[0].key)
        for image in sample.images[1:]:
            other = root(image.key)
            low, high = min(first, other), max(first, other)
            parent[high] = low
            first = low
    return {key: root(key) for key in list(parent)}
