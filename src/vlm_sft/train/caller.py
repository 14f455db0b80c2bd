"""What a caller from Python adds to a training that a command line cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import TrainerCallback

from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.evaluate.metrics import Metric
from vlm_sft.evaluate.tasks import Task

_SHAPE = "a metric takes (prediction, answers), a text and a list of texts, and returns a finite number"


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


def with_metrics(tasks: list[Task], metrics: Mapping[str, Metric]) -> list[Task]:
    """Add secondary scores to tasks.

    Args:
        tasks: benchmarks with their questions.
        metrics: by name: (prediction, answers) to a number.
    """

    def scored(task: Task) -> Task:
        rules = task.benchmark
        return replace(task, benchmark=replace(rules, secondary={**rules.secondary, **metrics}))

    return [scored(task) for task in tasks] if metrics else tasks


def named(metrics: Sequence[Metric] | Mapping[str, Metric]) -> dict[str, Metric]:
    """Give metrics their names: those of the functions, where they come as a list.

    Args:
        metrics: functions of (prediction, answers), each of which gives a number.

    Raises:
        EvaluationError: two have one name, or one cannot be called.
    """
    pairs = list(metrics.items()) if isinstance(metrics, Mapping) else [(_name(metric), metric) for metric in metrics]
    found = {name: _numeric(name, metric) for name, metric in pairs}
    if len(found) < len(pairs):
        raise EvaluationError("two metrics have the same name", "pass a dict of names and functions")
    return found


def _name(metric: Metric) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


def _numeric(name: str, metric: Metric) -> Metric:
    """A metric whose values are checked."""
    if not callable(metric):
        raise EvaluationError(f"the metric {quoted(name)} is {quoted(metric)}, not a function", _SHAPE)

    def checked(prediction: str, answers: Sequence[str]) -> float:
        value = metric(prediction, answers)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise EvaluationError(f"the metric {quoted(name)} gave {quoted(value)} for {quoted(prediction)}", _SHAPE)
        return number

    return checked
