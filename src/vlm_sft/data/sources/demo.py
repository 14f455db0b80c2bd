"""The synthetic demo sets, drawn by the package's own generator."""

from __future__ import annotations

from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import SPLITS, LoadedSplit

KINDS = {"demo_charts": ("demo_charts",), "demo_text": ("demo_text",), "demo": ("demo_charts", "demo_text")}
COUNTS = {"train": 8000, "validation": 300, "test": 1000}  # questions of each kind
SEED = 0  # fixed: the demo sets are the same for every run and every model


def load(spec: DatasetSpec, split: str, at_most: int | None = None) -> LoadedSplit:
    """Draw one split of a demo set; "demo" holds the charts and the signs.

    Args:
        spec: name "demo_charts", "demo_text" or "demo".
        split: "train", "validation" or "test".
        at_most: draw no more samples than this over all kinds; None draws the default counts.

    Raises:
        DataError: unknown split.
    """
    from vlm_sft.data.demo.generate import demo_samples

    if split not in SPLITS:
        raise DataError(f"unknown split {quoted(split)}", f"choose one of {', '.join(SPLITS)}")
    kinds = KINDS[spec.name]
    samples: list[Sample] = []
    for position, kind in enumerate(kinds):
        count = COUNTS[split]
        if at_most is not None:
            count = min(count, at_most // len(kinds) + (position < at_most % len(kinds)))
        samples += demo_samples(kind, split, count, SEED) if count else []
    return LoadedSplit(samples, [], f"{spec.name} {split}: {len(samples):,} synthetic questions", synthetic=True)
