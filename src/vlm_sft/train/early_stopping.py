"""Early stopping: whether the evaluations of a training say that it gets no better.

The answer depends on the history of the evaluations alone. Every checkpoint holds that history, so a resumed training
stops where the uninterrupted one does, and all ranks agree without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_sft.recipe.schema import Recipe


@dataclass(frozen=True)
class EarlyStop:
    """Why a training ended early.

    Attributes:
        step: after which it ended.
        metric: what was looked at.
        best, best_step: its value that no later evaluation improved on, and the step of that.
        evaluations: how many in a row did not.
        threshold: how much better they had to be.
    """

    step: int
    metric: str
    best: float | None
    best_step: int | None
    evaluations: int
    threshold: float

    @property
    def reason(self) -> str:
        """The same in words."""
        more = f" by more than {self.threshold:g}" if self.threshold else ""
        before = "was never a number" if self.best is None else f"did not improve on {self.best:.4f}{more}"
        where = "" if self.best is None else f" (step {self.best_step:,})"
        times = "evaluation" if self.evaluations == 1 else "evaluations"
        return f"stopped early after step {self.step:,}: {self.metric} {before}{where} in {self.evaluations} {times}"

    def to_dict(self) -> dict[str, Any]:
        """As run.json and results.json hold it."""
        return {**asdict(self), "reason": self.reason}


def early_stop(recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> EarlyStop | None:
    """Tell whether the evaluations so far end a training.

    An evaluation counts as better where the metric gains more than `early_stopping_threshold` on the best that counted
    so before: many small gains are one large gain in the end. A value that is not finite is never better.

    Args:
        recipe: has `early_stopping_patience`, the threshold and the metric.
        history: what was logged, in order, each with its `step`.

    Returns:
        Why the training ends, or None where it goes on.
    """
    if recipe.early_stopping_patience is None:
        return None
    sign = 1 if recipe.best_is_greatest else -1
    best, best_step, waited, step = None, None, 0, 0
    for row in history:
        value = row.get(recipe.best_metric_column)
        if value is None:
            continue
        step = row["step"]
        gain = math.inf if best is None else sign * (value - best)
        if math.isfinite(value) and gain > recipe.early_stopping_threshold:
            best, best_step, waited = value, step, 0
        else:
            waited += 1
    if waited < recipe.early_stopping_patience:
        return None
    return EarlyStop(step, recipe.metric_for_best_model, best, best_step, waited, recipe.early_stopping_threshold)
