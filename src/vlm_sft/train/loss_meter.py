"""The losses of a training: the mean since the last log, and over all steps."""

from __future__ import annotations

from typing import Any


class LossMeter:
    """Adds up the losses of steps whose numbers were used; the same numbers on every rank."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0  # since the last log
        self._total, self._steps = 0.0, 0  # before it

    def add(self, loss: float) -> None:
        """Count one step, with its loss over all ranks, in nats a supervised token."""
        self._sum += loss
        self._count += 1

    def take(self) -> float | None:
        """The mean since the last log, which begins anew; None where no step was used since."""
        mean = self._sum / self._count if self._count else None
        self._total, self._steps = self._total + self._sum, self._steps + self._count
        self._sum, self._count = 0.0, 0
        return mean

    def mean(self) -> float | None:
        """The mean over all steps; None before there was one."""
        count = self._steps + self._count
        return (self._total + self._sum) / count if count else None

    def progress(self) -> dict[str, Any]:
        """What a resume goes on with."""
        return {"loss_sum": self._sum, "loss_count": self._count, "total_loss": self._total, "total_count": self._steps}

    def restore(self, progress: dict[str, Any], step: int) -> None:
        """Go on where a checkpoint was written.

        Args:
            progress: from `progress`, or what runs of earlier versions kept: each rank's sum since step `logged_step`.
            step: of the checkpoint.
        """
        self._total = progress["total_loss"]
        if "loss_sum" in progress:
            self._sum, self._count, self._steps = (
                progress["loss_sum"],
                progress["loss_count"],
                progress["total_count"],
            )
        else:
            sums = [rank["loss"] for rank in progress["ranks"]]
            self._sum, self._count = sum(sums) / len(sums), step - progress["logged_step"]
            self._steps = progress["logged_step"]
