"""Mixtures and limits: which questions an epoch or an evaluation holds.

Every draw depends on its seed only: not on hash randomisation, threads or the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from vlm_sft.common.errors import DataError
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.spec import DatasetSpec

Key = TypeVar("Key", bound=Hashable)


def mix(parts: list[tuple[DatasetSpec, list[Sample]]], max_samples: int | None, seed: int) -> list[Sample]:
    """Draw the questions of one epoch from several data sets.

    Without weights every question comes once. With weights the epoch keeps its size N, and set i with n_i questions
    and weight w_i (1 where none is given) gets round(N * w_i * n_i / sum_j w_j * n_j): each of its questions is w_i
    times as likely as one of weight 1. A set that is drawn from more than once is used in whole passes, then a
    seeded remainder; repetitions get the id suffix "#2", "#3", ….

    Args:
        parts: each data set's spec and samples.
        max_samples: number of questions at most; None for no limit. The proportions are kept, and so are the
            questions of one image together: whole images are drawn, and only the last one of a set may be cut.
        seed: of all draws.

    Returns:
        The questions, set after set, in the order of their source; the training order is the trainer's.

    Raises:
        DataError: `max_samples` is below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples {max_samples} is below 1", "give a number of questions, or leave it out")
    sizes = [len(samples) for _, samples in parts]
    weights = [Fraction(1 if spec.weight is None else spec.weight) for spec, _ in parts]
    total = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    counts = [
        round(sum(sizes) * weight * size / total) if total else 0 for weight, size in zip(weights, sizes, strict=True)
    ]
    if max_samples is not None and max_samples < sum(counts):
        counts = list(_shares(dict(enumerate(counts)), max_samples).values())
    mixed: list[Sample] = []
    for (spec, samples), count in zip(parts, counts, strict=True):
        mixed += _draw(samples, count, f"{seed}:{spec.name}")
    return mixed


def _draw(samples: list[Sample], count: int, seed: str) -> list[Sample]:
    """Draw `count` questions: whole passes, then whole images in a seeded order; source order within a pass."""
    if not samples or not count:
        return []
    passes, rest = divmod(count, len(samples))
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.subject, []).append(index)
    order = sorted(groups)  # not the order of appearance: a file that is sorted differently gives the same draw
    random.Random(seed).shuffle(order)
    remainder = sorted([index for key in order for index in groups[key]][:rest])
    drawn = [_repeated(sample, number) for number in range(passes) for sample in samples]
    return drawn + [_repeated(samples[index], passes) for index in remainder]


def _repeated(sample: Sample, earlier: int) -> Sample:
    return dataclasses.replace(sample, id=f"{sample.id}#{earlier + 1}") if earlier else sample


def weighted(samples: list[Sample], weights: Mapping[str, float]) -> list[Sample]:
    """The samples with their weights in the loss multiplied by those of their data sets.

    Args:
        samples: of several data sets.
        weights: by the name of the data set; 1 for others.
    """
    if not weights:
        return samples
    factors = [weights.get(sample.dataset, 1.0) for sample in samples]
    return [
        dataclasses.replace(sample, weight=sample.weight * factor)
        for sample, factor in zip(samples, factors, strict=True)
    ]


def stratified_limit(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Draw a sample for an evaluation that mirrors the whole: by data set and split, then by question type.

    The draw depends on the ids and the seed only, so every model is asked the same questions. A head slice would be
    biased: the first rows of the official ChartQA test file are all of the human split.

    Args:
        samples: all questions; ids must be unique.
        limit: number of questions; None, or more than there are, keeps all.
        seed: of the draw.

    Returns:
        The questions drawn, in the order of `samples`.

    Raises:
        DataError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit {limit} is below 1", "give a number of questions, or leave it out")
    if limit is None or limit >= len(samples):
        return list(samples)
    parts: dict[tuple[str, str], dict[str, list[Sample]]] = {}
    for sample in samples:
        kind = str(sample.metadata.get("question_type", ""))
        parts.setdefault((sample.dataset, sample.split), {}).setdefault(kind, []).append(sample)
    chosen: set[str] = set()
    by_part = _shares({part: sum(map(len, kinds.values())) for part, kinds in parts.items()}, limit)
    for part, kinds in parts.items():
        by_kind = _shares({kind: len(members) for kind, members in kinds.items()}, by_part[part])
        for kind, members in kinds.items():
            ranked = sorted(members, key=lambda sample: hashlib.sha256(f"{seed}:{sample.id}".encode()).digest())
            chosen.update(sample.id for sample in ranked[: by_kind[kind]])
    return [sample for sample in samples if sample.id in chosen]


def _shares(sizes: dict[Key, int], count: int) -> dict[Key, int]:
    """Split `count` in proportion to `sizes`, exactly: the largest remainders round up (ties by name)."""
    total = sum(sizes.values())
    exact = {key: Fraction(count * size, total) for key, size in sizes.items()}
    shares = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda key: (shares[key] - exact[key], str(key)))
    for key in by_remainder[: count - sum(shares.values())]:
        shares[key] += 1
    return shares
