"""Which rows make up train, validation and test: files by split, and hold-outs by image."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common.artifacts import CHANGED, EXCHANGE, IMPORT, LEFT_OUT, REPEATS
from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sample import LeftOut, Sample

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    "test": "test",
}
DATASET_INFO = "dataset_info.json"  # LLaMA-Factory's description of the files beside it
NO_DATA = (LEFT_OUT, CHANGED, REPEATS, IMPORT, EXCHANGE, DATASET_INFO)  # reports and descriptions beside data files
HOLD_OUT_FRACTION = 0.10  # of the images, for validation and for test, where a source says nothing else
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
        part: "all" of it, or the part for "train", "validation" or "test" of its seeded hold-out by image.
        held: the splits that are held out of it.
        note: said to the user; "" when the split simply exists.
    """

    source: str
    part: str
    held: tuple[str, ...] = ()
    note: str = ""


def plan_split(available: Iterable[str], split: str, name: str) -> SplitPlan:
    """Decide what to read for `split`.

    Where there is no validation split, a seeded part of the train images is held out of train, and another one for a
    test split that is missing too. With a validation split of its own, a missing test split falls back to it.

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
    if split in has and (split != "train" or "validation" in has):
        return SplitPlan(split, "all")
    if split == "test" and "validation" in has:
        return SplitPlan("validation", "all", note="there is no test split; the validation split is used instead")
    if "train" in has:
        held = tuple(name for name in ("validation", "test") if name not in has)
        note = "" if split == "train" else f"held out of train for {split}, by a seeded draw of its images"
        return SplitPlan("train", split, held, note)
    have = ", ".join(sorted(has)) or "none"
    fix = f"add a file named {split}, or choose another split"
    raise MissingSplitError(f"{name} has no {split} split (it has: {have})", fix)


def split_of_name(name: str) -> str | None:
    """The split that a file or folder name speaks of ("val-00000-of-00002.parquet" -> "validation"), or None."""
    words = re.split(r"[^a-z]+", Path(name).stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def apply_plan(
    plan: SplitPlan, samples: list[Sample], left_out: list[LeftOut], fraction: float
) -> tuple[list[Sample], list[LeftOut], tuple[str, ...]]:
    """Cut what was read down to the planned part of the hold-out.

    Samples that hang together through their images stay in one part, see `image_groups`. Left-out samples are dealt to
    the parts by their ids, so that each is counted exactly once; all are train's where nothing can be held out.

    Args:
        plan: what was asked for.
        samples: all samples of the source split.
        left_out: all left-out samples of the source split.
        fraction: share of the images of each part that is held out, 0 to 1; at least one. Two images are enough for
            validation alone, which then is the test part too.

    Returns:
        The samples and the left-out samples of the planned part, and the parts that are really held out.
    """
    if plan.part == "all":
        return samples, left_out, ()
    groups = image_groups(samples, fraction)
    ranked = sorted(set(groups), key=_rank)
    held = plan.held if len(ranked) > len(plan.held) else plan.held[:1]
    count = min(max(1, round(fraction * len(ranked))), (len(ranked) - 1) // len(held)) if ranked else 0
    part_of = {group: held[place // count] for place, group in enumerate(ranked[: count * len(held)])} if count else {}
    part = plan.part if plan.part in ("train", *held) else held[0]
    kept = [sample for sample, group in zip(samples, groups, strict=True) if part_of.get(group, "train") == part]
    if not part_of:  # all of it is train
        return kept, left_out if part == "train" else [], ()
    return kept, [item for item in left_out if dealt(item.id, fraction, held) == part], held


def dealt(text: str, fraction: float, held: Sequence[str]) -> str:
    """The part that a seeded draw deals a text to; it does not depend on which others there are."""
    drawn = int(_rank(text)[:8], 16) / 2**32
    return next((name for place, name in enumerate(held, start=1) if drawn < fraction * place), "train")


def _rank(text: str) -> str:
    return hashlib.sha256(f"{HOLD_OUT_SEED}:{text}".encode("utf-8", "replace")).hexdigest()


def shared_images(samples: Sequence[Sample], fraction: float = HOLD_OUT_FRACTION) -> set[str]:
    """Keys of images that are shown again and again beside others: a legend, a logo, a reference of a category.

    Such an image stands in more rows than a hold-out may take, and beside it, in most of them, an image that stands in
    half as many rows at most: the one that the question is about.

    Args:
        samples: of one data set.
        fraction: share of the rows that a hold-out takes.
    """
    rows = Counter(key for sample in samples for key in {image.key for image in sample.images})
    together: Counter[str] = Counter()
    beside_rarer: Counter[str] = Counter()
    for sample in samples:
        keys = {image.key for image in sample.images}
        for key in keys if len(keys) > 1 else ():
            together[key] += 1
            beside_rarer[key] += 2 * min(rows[other] for other in keys - {key}) <= rows[key]
    least = max(3, fraction * len(samples))
    return {key for key, count in together.items() if count >= least and 2 * beside_rarer[key] > count}


def own_images(sample: Sample, shared: set[str]) -> tuple[str, ...]:
    """Keys of the images that a sample is about: those that are not shared, or all where it has no other.

    A text row is about its opening text.
    """
    keys = tuple(dict.fromkeys(image.key for image in sample.images)) or (sample.subject,)
    return tuple(key for key in keys if key not in shared) or keys


def image_groups(samples: Sequence[Sample], fraction: float = HOLD_OUT_FRACTION) -> list[str]:
    """For each sample, the name of the group of samples that hang together through the images that they are about.

    Args:
        samples: of one data set.
        fraction: as in `shared_images`, whose images tie nothing together.

    Returns:
        The least key of the group's images (union-find), in the order of the samples.
    """
    shared = shared_images(samples, fraction)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts = []
    for sample in samples:
        keys = own_images(sample, shared)
        firsts.append(keys[0])
        for key in keys[1:]:
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
    return [root(key) for key in firsts]
