"""Metrics of the user's own: further scores beside a benchmark's rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.evaluate.metrics import Benchmark, Metric
from vlm_sft.evaluate.tasks import Task

_SHAPE = "a metric takes (prediction, answers), a text and a list of texts, and returns a finite number"


def with_secondary(rules: Benchmark, metrics: Mapping[str, Metric]) -> Benchmark:
    """The rules of a benchmark with further secondary scores."""
    return replace(rules, secondary={**rules.secondary, **metrics}) if metrics else rules


def with_metrics(tasks: list[Task], metrics: Mapping[str, Metric]) -> list[Task]:
    """Add secondary scores to tasks.

    Args:
        tasks: benchmarks with their questions.
        metrics: by name: (prediction, answers) to a number.
    """
    return [replace(task, benchmark=with_secondary(task.benchmark, metrics)) for task in tasks]


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
