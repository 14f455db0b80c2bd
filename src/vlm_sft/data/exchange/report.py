"""What an import or an export writes into, and what came of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import LEFT_OUT
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.data.audit import enforce
from vlm_sft.data.exchange.image_folder import FOLDER
from vlm_sft.data.sample import LeftOut

PARTIAL = ".partial"
OUTSIDE_CAUTION = (
    "images that lie outside of the data's own folder, by their path or a link, and are copied with the others"
)


@dataclass
class ExchangeReport:
    """What came of an import or an export.

    Attributes:
        records: records read.
        questions: questions written, by split.
        conversations: records that became several questions.
        left_out: what cannot be used.
        changed: ids of what is not exactly as it was, by reason.
        files: the data files written.
        cautions: what a reader has to know of what was written, with the paths or ids that it is about.
    """

    records: int = 0
    questions: Counter[str] = field(default_factory=Counter)
    conversations: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    cautions: dict[str, set[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Questions written and left out."""
        return sum(self.questions.values()) + len(self.left_out)

    def counts(self) -> dict[str, Any]:
        """What import.json and export_data.json say of it."""
        return {
            "questions": dict(self.questions),
            "left_out": dict(Counter(item.reason for item in self.left_out)),
            "cautions": {caution: len(subjects) for caution, subjects in self.cautions.items()},
            "changed": {note: len(ids) for note, ids in self.changed.items()},
        }


def check_limits(limit: int | None, max_left_out: float) -> None:
    """Refuse numbers that cannot be meant, before the long work.

    Raises:
        DataError: the limit is below 1, or the share is not between 0 and 1.
    """
    enforce([], 0, max_left_out)
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit} is below 1", "give a number of questions, or leave it out")


def claim_output(output: Path) -> None:
    """Refuse a folder that holds anything but what an unfinished import or export left.

    Raises:
        RunError: it does, or it is a file.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"--output {output} is a file", "choose a folder")
    others = (
        [path.name for path in output.iterdir() if path.name != FOLDER and not path.name.endswith(PARTIAL)]
        if output.is_dir()
        else []
    )
    if others and set(others) != {LEFT_OUT}:
        raise RunError(f"--output {output} is not empty: {', '.join(sorted(others)[:3])}", "choose another folder")
