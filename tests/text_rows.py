"""Text rows beside questions about images, for tests."""

from __future__ import annotations

from vlm_sft.data.sample import Sample, Turn


def text_row(question: str, target: str, number: int = 0, history: tuple[Turn, ...] = ()) -> Sample:
    """A question without an image."""
    return Sample(f"text/{number}", "tiny", "", (), question, target, (target,), history)
