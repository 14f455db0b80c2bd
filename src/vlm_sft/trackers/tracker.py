"""What every tracker can do."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from vlm_sft.trackers.content import Outcome

PROJECT = "vlm-sft"  # where the tracker's own variables name no project or experiment
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"


@dataclass(frozen=True)
class About:
    """The run that is tracked.

    Attributes:
        folder: its folder.
        name: what trackers call it; the same when it is resumed.
        recipe: the resolved recipe.
        facts: base model, data sets, folder: what the recipe does not say.
        step: of the checkpoint that it goes on from; 0 for a new run.
    """

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    facts: Mapping[str, str]
    step: int = 0


class Tracker(ABC):
    """One tracker of one run; used on rank 0 only.

    Args:
        about: the run.

    Attributes:
        label: what people call it.
        fix: what to do where it cannot be opened.
        place: where its run can be looked at: a folder or an address; known once it is open.
    """

    label = ""
    fix = ""

    def __init__(self, about: About) -> None:
        self.about = about
        self.place = ""

    @abstractmethod
    def begin(self, known: str | None) -> str:
        """Open a run and tell it the recipe.

        Args:
            known: what this method returned when the run that is now resumed was begun, or None.

        Returns:
            What opens the same run again.
        """

    @abstractmethod
    def callback(self) -> TrainerCallback:
        """The integration of transformers that logs metrics into the open run."""

    @abstractmethod
    def conclude(self, outcome: Outcome, step: int) -> None:
        """Log the results table and the sample predictions, after `step` optimizer steps."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Write what is waiting and end the run: FINISHED, FAILED or INTERRUPTED."""

    @abstractmethod
    def advice(self) -> str:
        """How to look at it: one line, after `close`."""


def set_quietly(variable: str, value: str) -> None:
    """Set a variable of the environment that the user has not set."""
    os.environ.setdefault(variable, value)
