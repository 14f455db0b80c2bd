"""Checks and counts that every source shares: texts of a row, the last step of loading."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_sft.common.artifacts import writable
from vlm_sft.common.errors import DataError, bounded, quoted, without_secrets
from vlm_sft.data.sample import LeftOut, Sample, counted, distinct_images
from vlm_sft.data.sources.splits import LoadedSplit, MissingSplitError, SplitPlan, apply_plan, shared_images

READ_KEYS = frozenset(  # of a record, into a sample
    "id image images question answer answers history system weight split "
    "messages conversations prompt completion".split()
)
DETAIL_CHARACTERS = 600  # of one reason, whatever it quotes
WITHOUT = {"validation": "--eval_strategy no", "test": "--eval_benchmarks none"}  # of vlm-sft train


class RowProblem(Exception):
    """Why one row cannot be used: a short reason that is counted, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = bounded(without_secrets(detail or reason), DETAIL_CHARACTERS)
        super().__init__(reason)


def clean_text(value: Any, what: str) -> str:
    """Return `value` stripped, as text that can be trained on.

    Args:
        value: a string; whole and decimal numbers are written out.
        what: "question" or "answer", for the reason.

    Raises:
        RowProblem: it is missing, empty, no text, or holds half of a surrogate pair.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowProblem(f"empty {what}")
    if not isinstance(value, str):
        raise RowProblem(f"{what} is not text", f"{what} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem(f"{what} is not valid Unicode", f"{what} holds a lone surrogate") from None
    return value.strip()


def texts_of(value: Any, what: str) -> tuple[str, ...]:
    """The texts that a value is or lists, as they stand: a benchmark's rule may count the spaces around an answer.

    Args:
        value: as of `clean_text`, or a list of such.
        what: as there.

    Raises:
        RowProblem: there is none, or one is not usable.
    """
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise RowProblem(f"empty {what}", f"the list of {what}s is empty")
    cleaned = [clean_text(one, what) for one in listed]
    return tuple(one if isinstance(one, str) else text for one, text in zip(listed, cleaned, strict=True))


def most_common(answers: Sequence[str]) -> str:
    """The most frequent answer; of equally frequent ones the first."""
    return Counter(answers).most_common(1)[0][0]


def reference_answers(value: Any) -> tuple[str, ...]:
    """The reference answers of a record, in their order.

    Args:
        value: one answer or a list of them; an answer is text, a number, or an object that holds it under "answer", as
            VQAv2, VizWiz and TextVQA write theirs: `{"answer": "net", "answer_confidence": "yes", "answer_id": 1}`
            (https://visualqa.org/download.html).

    Raises:
        RowProblem: the list is empty, or one of its answers is no text.
    """
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise RowProblem("empty answer", "the list of answers is empty")
    return tuple(
        clean_text(one["answer"] if isinstance(one, Mapping) and "answer" in one else one, "answer") for one in listed
    )


def other_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds besides its question, answers and images, as far as JSON can write it."""
    return {key: value for key, value in record.items() if key not in READ_KEYS and value is not None and _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def left_out(sample_id: str, where: str, problem: RowProblem) -> LeftOut:
    """Name one unusable row; texts are made safe to write as UTF-8."""
    return LeftOut(writable(sample_id), problem.reason, writable(f"{where}: {problem.detail}"))


def loss_weight(record: Mapping[str, Any], where: str = "the record") -> float:
    """The weight of a record, or of one answer, in the loss: its key `weight`; 1 where it has none.

    Raises:
        RowProblem: it is not a finite number, or below 0.
    """
    value = record.get("weight")
    if value is None:
        return 1.0
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not number:
        raise RowProblem("weight is not a number", f"{where} has the weight {quoted(value)}; it must be 0 or more")
    return float(value)


def finish_split(
    plan: SplitPlan, samples: list[Sample], left: list[LeftOut], fraction: float, origin: str
) -> LoadedSplit:
    """Apply the hold-out and describe the split.

    Args:
        plan: which side of which split was asked for.
        samples: all usable samples of the source split.
        left: its unusable ones.
        fraction: share of the images that a hold-out takes.
        origin: what was read, e.g. "ChartQA train from data/train.parquet".

    Raises:
        MissingSplitError: nothing can be held out for it.
        DataError: nothing can be used.
    """
    if not samples:
        first = "".join(f"\n  - {item.reason}: {item.detail}" for item in left[:3])
        what = f"none of its {len(left):,} samples can be used; the first reasons:{first}" if left else "it is empty"
        raise DataError(f"{origin}: {what}", "correct the data, then look at it with: vlm-sft data check DATASET")
    used, dropped, held = apply_plan(plan, samples, left, fraction)
    if not used:
        without = " ".join(WITHOUT[name] for name in plan.held)
        fix = f"add images, or a separate file named {plan.part}; or let vlm-sft train do without: {without}"
        raise MissingSplitError(f"{origin}: {_why_none_held(samples, plan.part)}", fix)
    description = f"{origin}: {counted(used)}"
    if plan.part == "train":
        description += (
            f" ({'images' if distinct_images(used) else 'openings'} for {' and '.join(held)} are held out)"
            if held
            else " (none can be held out)"
        )
    shared = shared_images(samples, fraction) if plan.part != "all" else set()
    if shared:
        description += f" ({len(shared)} shown beside many others may be in every part)"
    return LoadedSplit(used, dropped, f"{description}; {plan.note}" if plan.note else description)


def _why_none_held(samples: Sequence[Sample], part: str) -> str:
    """Why no image can be held out: there is one only, or all are tied together."""
    if not distinct_images(samples):
        return f"one text only, so none can be held out for {part}"
    if distinct_images(samples) == 1:
        return f"one image only, so none can be held out for {part}"
    sources = {image.key: image.source for sample in samples for image in sample.images}
    key, rows = Counter(key for sample in samples for key in {one.key for one in sample.images}).most_common(1)[0]
    return (
        f"its {distinct_images(samples):,} images are tied together by questions about several of them, so none can be "
        f"held out for {part} ({sources[key]} stands in {rows:,} of {len(samples):,} questions)"
    )
