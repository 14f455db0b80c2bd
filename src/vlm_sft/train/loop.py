"""The training loop: gradients of a step's packs, the ranks' vote, the optimizer; then log, evaluate, save, stop.

One loader batch is one optimizer step. The loss of a step is the sum of the token losses of all its packs on all ranks,
divided by the number of supervised tokens in the whole step. That number comes from the plan, so ranks need not
exchange it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.data.loader import StepDataset, StepLoader
from vlm_sft.distributed.launch import Launch
from vlm_sft.distributed.signals import StopSignals
from vlm_sft.evaluate.evaluator import EvaluationStopped
from vlm_sft.model.families import PackMode
from vlm_sft.model.vision_features import start_training
from vlm_sft.planning.training_run import FaultPolicy
from vlm_sft.recipe.metric_names import LOSS, is_loss
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.callbacks import Callbacks
from vlm_sft.train.checkpoint.saver import CheckpointPolicy, CheckpointSaver, WriteModel, restore_random
from vlm_sft.train.early_stopping import EarlyStop, early_stop
from vlm_sft.train.evaluation_loss import evaluation_loss
from vlm_sft.train.event_log import EventLog
from vlm_sft.train.health import Health
from vlm_sft.train.loss_meter import LossMeter
from vlm_sft.train.optimization import Optimization
from vlm_sft.train.training_args import callback_arguments, reporting_callbacks
from vlm_sft.train.validation import Validation


@dataclass(frozen=True)
class TrainingPlan:
    """What a training executes.

    Attributes:
        recipe, schedule: the recipe, and its schedule on this data.
        steps: this rank's optimizer steps.
        eval_steps: the questions for the evaluation loss, in steps; None without evaluations.
        mode: how packs of this model are computed.
        workers: processes that prepare batches.
    """

    recipe: Recipe
    schedule: Schedule
    steps: StepDataset
    eval_steps: StepDataset | None
    mode: PackMode
    workers: int = 0


class TrainingLoop:
    """Trains a model; every rank runs it.

    Args:
        plan: what to execute.
        model: the model with its trained parameters, not wrapped.
        optimization: takes the optimizer steps.
        launch: ranks and device.
        folder: the run's folder.
        write_model: as of `CheckpointSaver`.
        policy: which checkpoints are kept.
        faults: how to handle bad numbers, images and processes.
        validation: answers benchmark questions at each evaluation; None for the evaluation loss alone.

    Attributes:
        health: the ranks' vote, and the newest loss.
        callbacks: receive the events; their `state` is the progress of the training.
        stopped_early: why the training ended before its last step; None if it did not.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        model: Any,
        optimization: Optimization,
        launch: Launch,
        folder: Path,
        write_model: WriteModel,
        policy: CheckpointPolicy | None = None,
        faults: FaultPolicy | None = None,
        validation: Validation | None = None,
    ) -> None:
        faults = faults or FaultPolicy()
        self.plan, self.model, self.optimization, self.launch = plan, model, optimization, launch
        self.device = torch.device(launch.device)
        self.signals: StopSignals | None = faults.signals
        log = EventLog(folder / artifacts.ANOMALIES)
        self.health = Health(log, faults.max_bad_steps, self._stop_requested, self.device, launch.world_size)
        self.validation = validation
        self.saver = CheckpointSaver(folder, optimization, write_model, policy or CheckpointPolicy())
        self.losses = LossMeter()
        self.stopped_early: EarlyStop | None = None
        self.loader = StepLoader(plan.steps, plan.workers)
        args = callback_arguments(plan.recipe, plan.schedule, launch, folder)
        context = {"model": model, "optimizer": optimization.optimizer, "lr_scheduler": optimization.scheduler}
        self.callbacks = Callbacks(reporting_callbacks(args), args, **context)
        self.callbacks.tell("on_init_end")

    def _stop_requested(self) -> bool:
        return bool(self.signals and self.signals.requested)

    def run(self, callbacks: Sequence[TrainerCallback] = (), checkpoint: Path | None = None) -> None:
        """Train from the start or from a verified checkpoint; ends with the final weights.

        Args:
            callbacks: further callbacks, called after those of transformers' trackers.
            checkpoint: where to continue from; None for a new training.

        Raises:
            InterruptedRunError: the ranks agreed to stop, after trying to write a checkpoint of the last step.
            DataError, NumericalError, DeviceMemoryError: the training cannot continue.
        """
        progress = self._begin(callbacks, checkpoint)
        state, steps_per_epoch = self.state, self.plan.schedule.steps_per_epoch
        while state.global_step < state.max_steps and not self.callbacks.control.should_training_stop:
            epoch, first = divmod(state.global_step, steps_per_epoch)
            self.loader.set_epoch(epoch)
            self.loader.start_at(first)
            self.callbacks.tell("on_epoch_begin")
            for batch in self.loader:
                if progress is not None:  # reading the first batch draws random numbers too
                    restore_random(progress, self.launch.rank)
                    progress = None
                step = state.global_step + 1
                self.callbacks.tell("on_step_begin")
                supervised = batch.supervised + self.health.settle(step, batch.faults, batch.change)
                start_training(self.model)
                # Gradients are averaged over ranks, but the loss is already divided by the tokens of the whole step.
                gradients = self.optimization.begin(
                    len(batch.packs), step - 1, self.launch.world_size / supervised, self.plan.mode, self.health
                )
                for pack in batch.packs:
                    gradients.add(pack)
                self._log(self._update(step, gradients))
                self._evaluate_and_save()
                if state.global_step >= state.max_steps or self.callbacks.control.should_training_stop:
                    break
            self.callbacks.tell("on_epoch_end")
            self._evaluate_and_save()  # if a callback requested it
        self._end()

    @property
    def state(self) -> Any:
        """Progress of the training, as transformers' TrainerState."""
        return self.callbacks.state

    def _begin(self, callbacks: Sequence[TrainerCallback], checkpoint: Path | None) -> dict[str, Any] | None:
        """Restore what a checkpoint holds; returns its progress, or None for a new training."""
        self.began = time.monotonic()
        self.callbacks.add(callbacks)
        set_seed(self.plan.recipe.seed)
        progress = None
        if checkpoint is not None:
            self.callbacks.state, progress = self.saver.restore(checkpoint)
            self.losses.restore(progress, self.state.global_step)
        recipe, schedule, state = self.plan.recipe, self.plan.schedule, self.state
        state.max_steps = schedule.total_steps
        state.num_train_epochs = math.ceil(schedule.total_steps / schedule.steps_per_epoch)
        state.logging_steps, state.eval_steps, state.save_steps = (
            recipe.logging_steps,
            schedule.eval_steps,
            schedule.save_steps,
        )
        state.is_world_process_zero = self.launch.rank == 0
        state.is_local_process_zero = self.launch.local_rank == 0
        self.callbacks.tell("on_train_begin")
        if checkpoint is not None:
            self._catch_up()
            self._stop_early()
        return progress

    def _catch_up(self) -> None:
        """After a resume, evaluate the checkpoint if a signal prevented it."""
        step = self.state.global_step
        done = any("eval_loss" in entry for entry in self.state.log_history if entry.get("step") == step)
        if self.plan.schedule.evaluates_after(step) and not done:
            control = self.callbacks.control
            control.should_evaluate = control.should_save = True
            self._evaluate_and_save()

    def _update(self, step: int, gradients: Any) -> dict[str, float | None]:
        """Let the ranks vote on a step, take or skip it, and decide what follows.

        Returns:
            The log values of the step: its learning rate, and the gradient norm, None if the step was skipped.
        """
        norm, rate = None, self.optimization.learning_rate()
        if self.optimization.agree(step, gradients, self.health):
            self.callbacks.tell("on_pre_optimizer_step")
            norm = self.optimization.step(gradients)
            self.callbacks.tell("on_optimizer_step")
            assert self.health.last_loss is not None
            self.losses.add(self.health.last_loss)
        else:
            self.optimization.skip()
        state, schedule, control = self.state, self.plan.schedule, self.callbacks.control
        state.global_step = step
        state.epoch = step / schedule.steps_per_epoch
        last = step >= state.max_steps
        control.should_log = step == 1 or step % state.logging_steps == 0 or last
        control.should_evaluate = schedule.evaluates_after(step)
        control.should_save = schedule.saves_after(step)
        self.callbacks.tell("on_step_end")
        return {"grad_norm": norm, "learning_rate": rate}

    def _log(self, step: dict[str, float | None]) -> None:
        """If due, log the mean loss since the last log and the values of the newest step."""
        if self.callbacks.control.should_log:
            values = {"loss": self.losses.take(), **step}
            self.callbacks.log({name: value for name, value in values.items() if value is not None})

    def _evaluate_and_save(self) -> None:
        """Evaluate and save if due; once the ranks have agreed to stop, save and end the run.

        Raises:
            InterruptedRunError: the ranks agreed to stop.
        """
        control = self.callbacks.control
        if control.should_evaluate and not self.health.stopping:
            try:
                self._note_best(self._evaluate())
                self._stop_early()
            except EvaluationStopped:
                assert self.health.stopping
        saved = False
        if control.should_save or self.health.stopping:
            saved = self.saver.save(self.state, self.losses.progress())
            self.callbacks.tell("on_save")
        control.should_log = control.should_evaluate = control.should_save = False
        if self.health.stopping:
            assert self.signals is not None
            there = "with its" if saved else "without a"
            raise self.signals.interruption(f"after step {self.state.global_step}, {there} checkpoint")

    def _evaluate(self) -> dict[str, float]:
        """Mean loss per supervised token over the evaluation set, whatever the packs, and the benchmarks' scores."""
        steps = self.plan.eval_steps
        if steps is None:  # only a callback asks without a schedule
            raise RunError("a callback asked for an evaluation, and eval_strategy is no", "pass eval_strategy steps")
        state, began = self.state, time.monotonic()
        mode, shares = self.plan.mode, self.plan.steps.data.loss_shares
        losses = evaluation_loss(self.optimization, mode, steps, shares, self.health, self.device, state.global_step)
        chosen = self.plan.recipe.best_metric_column
        if is_loss(chosen):
            losses.setdefault(chosen, losses[LOSS])  # of the only data set with questions for it
        seconds = time.monotonic() - began
        questions = steps.planner.questions_per_epoch
        metrics = {
            **losses,
            "eval_runtime": round(seconds, 4),
            "eval_samples_per_second": round(questions / max(seconds, 1e-9), 3),
        }
        if self.validation is not None:
            began = time.monotonic()
            loss = losses.get(chosen, losses[LOSS])
            scores = self.validation.measure(self.model, self.plan.mode, state.global_step, loss, self.health)
            metrics |= {f"eval_{name}": score for name, score in scores.items()}
            metrics["eval_answer_seconds"] = round(time.monotonic() - began, 3)
        self.callbacks.log(dict(metrics))
        self.callbacks.tell("on_evaluate", metrics=metrics)
        return metrics

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Record a new best step. A skipped step, a violated guard or a non-finite value is never the best."""
        recipe, state = self.plan.recipe, self.state
        value = metrics[recipe.best_metric_column]
        if not math.isfinite(value) or self.health.bad_step == state.global_step:
            return
        if self.validation is not None and not self.validation.qualifies(state.global_step):
            return
        sign = 1 if recipe.best_is_greatest else -1
        if state.best_metric is None or sign * value > sign * state.best_metric:
            state.best_metric = value
            state.best_global_step = state.global_step if self.plan.schedule.save_steps else None

    def _stop_early(self) -> None:
        """End the training once its evaluations stop improving, with a checkpoint if checkpoints are written."""
        schedule, state, control = self.plan.schedule, self.state, self.callbacks.control
        if self.plan.recipe.early_stopping_patience is None or state.global_step >= state.max_steps:
            return
        self.stopped_early = early_stop(self.plan.recipe, state.log_history)
        if self.stopped_early:
            control.should_training_stop = True
            control.should_save |= control.should_evaluate and bool(schedule.save_steps)

    def _end(self) -> None:
        """Log the totals of the training and load the final weights."""
        seconds, steps = max(time.monotonic() - self.began, 1e-9), self.state.global_step
        questions = self.plan.steps.planner.questions_after(steps)
        values = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(questions / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_loss": self.losses.mean(),
        }
        self.callbacks.log({name: value for name, value in values.items() if value is not None})
        if self.plan.recipe.load_best_model_at_end:
            self.saver.load_best(self.state)
        self.callbacks.tell("on_train_end")
