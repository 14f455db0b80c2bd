"""All trackers of one run, from before the training until its results are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import detail, is_main_process, say, warn
from vlm_sft.common.errors import RunError
from vlm_sft.trackers.content import Outcome
from vlm_sft.trackers.tracker import FAILED, FINISHED, INTERRUPTED, About, Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback

SHOWN_IN = {"tensorboard": "TensorBoard", "wandb": "WeightsAndBiases", "mlflow": "MLflow", "trackio": "Trackio"}
"""Trackers that get recipe, table and predictions, with the class in the module of that name; others get metrics."""


class Trackers:
    """The trackers that `report_to` names; on ranks other than 0 it does nothing.

    A tracker that fails once the training has begun ends no training: what it was to be told is on disk, and a
    warning says so.

    Args:
        folder: the run's folder.
        recipe: the resolved recipe, as JSON holds it.
        facts: base model and data sets.
        step: of the checkpoint that the run goes on from; 0 for a new run.
        note: told what a tracker could not do.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        facts: Mapping[str, str],
        step: int,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self._note = note
        self._open: dict[str, Tracker] = {}
        self._closed = False
        self._facts, self._recipe, self._step = facts, recipe, step

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the runs: as failed or interrupted after an error."""
        stopped = isinstance(error, KeyboardInterrupt)
        self.close(FINISHED if error is None else INTERRUPTED if stopped else FAILED)

    def begin(self) -> None:
        """Open a run in every tracker; a resumed training goes on with the runs that it had.

        Raises:
            RunError: one cannot be opened.
        """
        names = [name for name in self._recipe["report_to"] if name in SHOWN_IN]
        if not names or not is_main_process():
            return
        before = self._earlier()
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        called = before.get("name") or f"{self.folder.resolve().name}-{stamp}"
        about = About(self.folder, called, self._recipe, self._facts, self._step)
        runs = dict(before.get("runs", {}))
        for name in names:
            tracker = getattr(import_module(f"vlm_sft.trackers.{name}"), SHOWN_IN[name])(about)
            self._open[name] = tracker
            try:
                known = tracker.begin(runs.get(name, {}).get("run"))
            except Exception as error:  # whatever a tracker's network, login or store may raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                remedy = f"update the package {name}" if isinstance(error, ImportError) else tracker.fix
                fix = f"{remedy}; or take it out of --report_to"
                raise RunError(f"report_to {name}: {reason}", fix) from error
            runs[name] = {"run": known, "place": tracker.place}
            (say if "://" in str(tracker.place) else detail)(f"{tracker.label}: {tracker.place}")
        artifacts.write_json(self.folder / artifacts.TRACKERS, {"schema": 1, "name": called, "runs": runs})

    def callbacks(self) -> list[TrainerCallback]:
        """What logs the metrics of the training into the open runs."""
        return [tracker.callback() for tracker in self._open.values()]

    def conclude(self, step: int) -> None:
        """Log the results table and sample predictions from the run's files, if there are any.

        Args:
            step: optimizer steps of the training.
        """
        outcome = Outcome(self.folder)
        if self._open and outcome.benchmarks:
            for name, tracker in self._open.items():
                self._try(name, partial(tracker.conclude, outcome, step))

    def close(self, status: str) -> None:
        """End the runs, once: FINISHED, FAILED or INTERRUPTED."""
        if not self._closed:
            self._closed = True
            for name, tracker in self._open.items():
                self._try(name, partial(tracker.close, status))

    def tell(self) -> None:
        """Say how to look at each of them."""
        for tracker in self._open.values():
            say(f"{tracker.label}: {tracker.advice()}")

    def _earlier(self) -> dict[str, Any]:
        """What trackers.json says of the run that is resumed."""
        if not self._step:
            return {}
        with contextlib.suppress(RunError):
            found = artifacts.read_json(self.folder / artifacts.TRACKERS)
            if isinstance(found, dict) and isinstance(found.get("runs"), dict):
                return found
        return {}

    def _try(self, name: str, work: Callable[[], None]) -> None:
        """Do something that may fail without harm to the run."""
        try:
            work()
        except Exception as error:  # whatever a tracker's network, login or store may raise
            text = f"report_to {name}: {type(error).__name__}: {error}"
            warn(f"{text}; the run's files have everything that it was to be told")
            self._note(text)
