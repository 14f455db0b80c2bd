"""What follows a training: metrics.jsonl, the progress bar, the clock of the forecast, callbacks of trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlm_sft.common.artifacts import read_jsonl, write_jsonl
from vlm_sft.common.console import Bar, say
from vlm_sft.common.options import is_function
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.forecast import estimate as forecasts
from vlm_sft.planning.run_forecast import ForecastTracker
from vlm_sft.recipe.metric_names import EVALUATION_METRICS, is_loss
from vlm_sft.train.event_log import PatientLines
from vlm_sft.train.health import Health

_RENAMED = {"eval_runtime": "eval_seconds", "eval_samples_per_second": "eval_questions_per_second"}
_DROPPED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def _is_told(name: str) -> bool:
    """Whether a number of an evaluation is printed, and not only logged."""
    metric = name.removeprefix("eval_")
    return is_loss(name) or metric in EVALUATION_METRICS or is_function(metric)


class Callbacks:
    """Tells callbacks of transformers what a training does, as transformers.Trainer tells them.

    Args:
        callbacks: told in this order.
        args: the run as TrainingArguments, for callbacks that look there.
        context: model, optimizer and the rest that callbacks get by name.

    Attributes:
        state: progress of the training.
        control: what callbacks ask for.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], args: TrainingArguments, **context: Any) -> None:
        self.callbacks = list(callbacks)
        self.args = args
        self.state = TrainerState()
        self.control = TrainerControl()
        self._context = {"processing_class": None, "train_dataloader": None, "eval_dataloader": None, **context}

    def add(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Tell further callbacks from now on; the beginning comes first."""
        earlier, self.callbacks = self.callbacks, list(callbacks)
        self.tell("on_init_end")
        self.callbacks = [*earlier, *callbacks]

    def tell(self, event: str, **extra: Any) -> None:
        """Tell an event; a callback may return a control that takes the place of the present one.

        Args:
            event: name of the method, e.g. "on_step_end".
            **extra: what this event has beside, e.g. `logs`.
        """
        for callback in self.callbacks:
            answer = getattr(callback, event)(self.args, self.state, self.control, **self._context, **extra)
            self.control = answer or self.control

    def log(self, values: dict[str, Any]) -> None:
        """Keep values in the history and tell them, with step and epoch."""
        values = {**values, "epoch": self.state.epoch}
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.tell("on_log", logs=values)


class MetricsFile(TrainerCallback):
    """Writes every log event as one line of metrics.jsonl, with step, epoch and seconds since the start.

    Args:
        path: the file. On a resume, lines of steps after the checkpoint are taken out first.
        planner: tells how many questions a step has.
        resumed_step: step of the checkpoint; 0 for a new run.
    """

    def __init__(self, path: Path, planner: EpochPlanner, resumed_step: int) -> None:
        self.path = path
        self.planner = planner
        self.seconds_before = 0.0
        if path.is_file():
            # The summary of a run that was resumed after its end comes again.
            kept = [row for row in read_jsonl(path) if row["step"] <= resumed_step and "train_loss" not in row]
            self.seconds_before = kept[-1]["time"] if kept else 0.0
            write_jsonl(path, kept)
        self.began = time.monotonic()
        self._last = (resumed_step, self.began)
        self._lines = PatientLines(path)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()
        self._last = (state.global_step, self.began)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs:
            return
        now = time.monotonic()
        row: dict[str, Any] = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "time": round(self.seconds_before + now - self.began, 3),
        }
        for name, value in logs.items():
            if name in _DROPPED or name == "epoch":
                continue
            finite = not isinstance(value, float) or math.isfinite(value)
            row[_RENAMED.get(name, name)] = value if finite else repr(value)
        if "loss" in logs:
            step, moment = self._last
            questions = (state.global_step - step) * self.planner.global_batch_size
            row["questions_per_second"] = round(questions / max(now - moment, 1e-9), 3)
            self._last = (state.global_step, now)
        self._lines.append(json.dumps(row))


class Progress(TrainerCallback):
    """A bar over questions, with loss, questions/s and time left; evaluations are told as lines.

    The loss is that of the newest step, not the mean that is logged now and then; before the first one there is none.

    Args:
        planner: tells how many questions there are.
        total_steps: optimizer steps of the training.
        health: has the loss of the newest step.
    """

    def __init__(self, planner: EpochPlanner, total_steps: int, health: Health) -> None:
        self.planner = planner
        self.total = planner.questions_after(total_steps)
        self.bar: Bar | None = None
        self.shown = 0
        self._health = health

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Open the bar."""
        self.bar = Bar(self.total, "training", "questions")
        self.shown = 0
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Advance the bar."""
        self._advance(state.global_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **arguments: Any) -> None:
        """Tell the result of an evaluation."""
        values = ", ".join(f"{name} {value:.4f}" for name, value in arguments["metrics"].items() if _is_told(name))
        say(f"step {state.global_step}: {values}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self.bar is not None:
            loss = self._health.last_loss
            if loss is not None:
                self.bar.note(f"loss {loss:.4f}")
            done = self.planner.questions_after(step)
            self.bar.advance(done - self.shown)
            self.shown = done


class Clock(TrainerCallback):
    """Tells the forecast's clock what a training spends its time on.

    Args:
        told: the forecast.
    """

    def __init__(self, told: ForecastTracker) -> None:
        self.told = told

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """What came before was loading."""
        self.told.lap(forecasts.LOAD)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A step with the reading of its data."""
        self.told.lap(forecasts.STEPS)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **arguments: Any) -> None:
        """An evaluation: losses, and answers where they were asked for."""
        self.told.lap(forecasts.LOSSES)
        self.told.move(forecasts.LOSSES, forecasts.ANSWERS, arguments["metrics"].get("eval_answer_seconds", 0.0))

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A checkpoint."""
        self.told.lap(forecasts.SAVES)
