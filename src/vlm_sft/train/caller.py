"""What a caller from Python adds to a training that a command line cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import TrainerCallback

from vlm_sft.evaluate.metrics import Metric
from vlm_sft.evaluate.own_metrics import with_metrics
from vlm_sft.evaluate.tasks import Task


@dataclass(frozen=True)
class Caller:
    """Who calls a training; the defaults are those of the command line.

    Attributes:
        callbacks: told of the training after our own.
        metrics: further scores of the final evaluation by name: (prediction, answers) to a number.
        again: what goes on with an interrupted run, for its message; None for the command line of this process.
    """

    callbacks: Sequence[TrainerCallback] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    again: str | None = None

    @property
    def in_process(self) -> bool:
        """Whether the process is not ours: it outlives the training, whatever happens to that."""
        return self.again is not None

    def scored(self, tasks: list[Task]) -> list[Task]:
        """The tasks, with the caller's metrics among their secondary scores."""
        return with_metrics(tasks, self.metrics)
