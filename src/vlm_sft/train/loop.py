"""The trainer: transformers.Trainer whose batch is one whole optimizer step, cut into packs.

The loss of a step is the sum of the token losses of all its packs, on all ranks, divided by the number of supervised
tokens of the whole step. That number comes from the plan, so no rank has to ask the others.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import SchedulerType, speed_metrics

from vlm_sft.common import artifacts
from vlm_sft.common.errors import NumericalError
from vlm_sft.data.collate import PackedBatch
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.loader import StepDataset, StepLoader
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.evaluate.evaluator import EvaluationStopped
from vlm_sft.model import packed_forward
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import Base
from vlm_sft.model.positions import Positions
from vlm_sft.model.step_gradients import StepGradients, loss_problem
from vlm_sft.model.trainable import save_tuned
from vlm_sft.planning.training_run import FaultPolicy
from vlm_sft.recipe.schedule import rate_factor
from vlm_sft.train.checkpoint.saver import CheckpointTrainer
from vlm_sft.train.event_log import EventLog
from vlm_sft.train.health import WATCHED_STEPS, AdapterWatch, Health, memory_error
from vlm_sft.train.model_card import write_card
from vlm_sft.train.validation import Validation


class PackTrainer(CheckpointTrainer):
    """Trains on the steps of an `EpochPlanner`.

    Args:
        train_data, eval_data: encoded data; `eval_data` may be None.
        planner, eval_planner: plans over them.
        prompt: settings that are saved with every checkpoint.
        base: where the processor comes from that is saved with a whole model; an adapter needs none.
        mode: how the packs of this model are computed.
        validation: answers benchmark questions at each evaluation; None for the evaluation loss alone.
        faults: what happens when numbers, images or processes fail.
        **kwargs: those of CheckpointTrainer and transformers.Trainer.
    """

    def __init__(
        self,
        *,
        train_data: PreparedData,
        eval_data: PreparedData | None,
        planner: EpochPlanner,
        eval_planner: EpochPlanner | None,
        prompt: PromptSettings,
        base: Base | None = None,
        mode: PackMode,
        validation: Validation | None = None,
        faults: FaultPolicy | None = None,
        **kwargs: Any,
    ) -> None:
        rank = kwargs["args"].process_index
        faults = faults or FaultPolicy()
        replace = faults.replace_bad
        # Plain transformers finds the positions of separate questions itself.
        place = Positions(kwargs["model"]) if mode.shares else None
        self._steps = StepDataset(train_data, planner, rank, replace, place)
        self._eval_steps: StepDataset | None = None
        if eval_data and eval_planner:
            self._eval_steps = StepDataset(eval_data, eval_planner, rank, replace, place)
        self._prompt = prompt
        self._base = base
        self._mode = mode
        self._validation = validation
        self._loader: StepLoader | None = None
        self._random_from: str | None = None
        self._watch: AdapterWatch | None = None
        super().__init__(train_dataset=self._steps, eval_dataset=self._eval_steps, **kwargs)
        self._signals = faults.signals
        log = EventLog(self._run_folder / artifacts.ANOMALIES)
        self._health = Health(
            log,
            faults.max_bad_steps,
            lambda: bool(faults.signals and faults.signals.requested),
            self.args.device,
            self.args.world_size,
        )
        if validation is not None:
            validation.stop = self._health

    def get_train_dataloader(self) -> StepLoader:
        """The loader of this rank's steps; it is already split over ranks, so accelerate must not do it again."""
        self._loader = StepLoader(self._steps, self.args.dataloader_num_workers)
        return self._loader

    def last_loss(self) -> float | None:
        """Loss of the last step that was used, over all ranks; None before there was one."""
        return self._health.last_loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's course of the learning rate, whose first step is not at 0; under DeepSpeed too."""
        if self.lr_scheduler is None:
            kind = SchedulerType(self.args.lr_scheduler_type).value
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate_factor(kind, warmup, num_training_steps, step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def num_examples(self, dataloader: Any) -> int:
        """Questions of one epoch."""
        return self._steps.planner.questions_per_epoch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Take whole steps from the loader; the number of supervised tokens is in them."""
        if self._random_from is not None:
            # The workers' loader drew a seed when it began; an uninterrupted epoch did that at its start.
            self._load_rng_state(self._random_from)
            self._random_from = None
        batches = []
        for _ in range(num_batches):
            with contextlib.suppress(StopIteration):
                batches.append(next(epoch_iterator))
        for step in batches:
            step.supervised += self._health.settle(self.state.global_step + 1, step.faults, step.change)
        return batches, None

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # transformers calls it with names only
        """Begin a resumed epoch at the right step, without computing what was passed."""
        self._restore_progress()
        self._catch_up(**kwargs)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        done = self.state.global_step - kwargs["epoch"] * self._steps.planner.steps_per_epoch
        if kwargs["resume_from_checkpoint"] is not None and done > 0:
            assert self._loader is not None
            self._loader.start_at(done)
            self._random_from = kwargs["resume_from_checkpoint"]
            kwargs["num_update_steps_per_epoch"] -= done
            kwargs["resume_from_checkpoint"] = None
        super()._run_epoch(**kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of every pack of one optimizer step.

        Args:
            model: as transformers wrapped it.
            inputs: the StepPacks of the step.
            num_items_in_batch: not used, the packs know.

        Returns:
            () float32, this rank's share of the loss times the number of ranks: the mean over ranks is the loss. Of a
            step that is not used, the mean of those since the last log, which leaves that log as it would be.
        """
        model.train()
        # Gradients are averaged over ranks; the loss is divided by the whole step's tokens already.
        scale = self.args.world_size / inputs.supervised
        compute = self._partitioned_step if self._partitioned else self._whole_step
        loss = compute(model, inputs.packs, scale)
        self.accelerator.gradient_state._set_sync_gradients(True)
        if loss is None:
            return self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return loss

    @property
    def _partitioned(self) -> bool:
        """Whether the weights themselves are shared out over the ranks, so that every pass needs all of them."""
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    def _whole_step(self, model: Any, packs: list[PackedBatch], scale: float) -> torch.Tensor | None:
        """One step of a model whose weights every rank has; None where it is not used."""
        computed = StepGradients(
            self.model, self._mode, self.state.global_step, scale, self.compute_loss_context_manager
        )
        for pack in packs:
            computed.add(pack)
        loss = computed.loss.to(self.args.device)
        value = float(loss)
        bad = computed.problem(value) if computed.too_large is None else None
        step = self.state.global_step + 1
        if not self._health.agree(step, value, bad, computed.sample_ids, computed.splits, computed.too_large):
            self._pass_over(model)
            return None
        self._watch_adapter(step, computed)
        if self.is_deepspeed_enabled:
            self.accelerator.gradient_state._set_sync_gradients(True)
            self.accelerator.backward(computed.surrogate(), scale_wrt_gas=False)
            return loss
        if self.args.world_size > 1:
            computed.average(self.args.world_size)
        computed.assign()
        return loss

    def _watch_adapter(self, step: int, computed: StepGradients) -> None:
        """Report adapter matrices that get no gradient."""
        if self._watch is None:
            self._watch = AdapterWatch({n: p for n, p in self.model.named_parameters() if p.requires_grad})
        for name in self._watch.look(computed.named(), self._health.sums) if self._watch.active else ():
            detail = f"{name} had no gradient in {WATCHED_STEPS} steps: it is not trained"
            self._health.log.write(step, "dead_adapter", detail, parameter=name)

    def _pass_over(self, model: Any) -> None:
        """Take no optimizer step, but keep the learning rate in line with the number of steps."""
        if self.is_deepspeed_enabled and model.lr_scheduler is not None:
            model.lr_scheduler.step()

    def _partitioned_step(self, model: Any, packs: list[PackedBatch], scale: float) -> torch.Tensor | None:
        """One step under ZeRO-3, where every pass needs every rank; None where it is not used."""
        total = torch.zeros((), device=self.args.device)
        tokens: list[tuple[PackedBatch, torch.Tensor]] = []
        step, ids, good = self.state.global_step + 1, [name for pack in packs for name in pack.sample_ids], True
        for index, pack in enumerate(packs):
            last = index == len(packs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            try:
                here = pack.to(self.args.device)
                with packed_forward.packed(here, self._mode, self.state.global_step):
                    with self.compute_loss_context_manager():
                        losses = packed_forward.token_losses(model, here, self._mode)
                        loss = losses.sum() * (pack.weight * scale)
                    total += loss.detach().float()
                    tokens.append((pack, losses.detach()))
                    if last:
                        good = self._health.agree(step, float(total), loss_problem(tokens, float(total)), ids)
                    # The engine's optimizer drops a step whose gradient is not finite: on all ranks, or on none.
                    self.accelerator.backward(loss if good else loss * float("nan"), scale_wrt_gas=False)
            except torch.OutOfMemoryError as error:
                raise memory_error(step, self.args.process_index, pack.tokens) from error
        dropped = self.accelerator.optimizer_step_was_skipped
        if good and dropped:
            event = {"detail": "the gradient is not finite", "sample_ids": ids, "source": "gradient"}
            good = self._health.agree(step, float(total), event, ids)
        elif not good and not dropped:
            raise NumericalError(f"step {step}: this DeepSpeed stepped on numbers that are not finite", "update it")
        if good:
            return total
        self._pass_over(model)
        return None

    def _catch_up(self, **kwargs: Any) -> None:
        """After a resume: evaluate the checkpoint where a signal came before that was done."""
        step, every = self.state.global_step, self.args.eval_steps
        due = self.args.eval_strategy != "no" and (step >= self.state.max_steps or step % int(every or 1) == 0)
        done = any("eval_loss" in entry for entry in self.state.log_history if entry.get("step") == step)
        if kwargs["resume_from_checkpoint"] is None or not due or done:
            return
        self.control.should_evaluate = self.control.should_save = True
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._maybe_log_save_evaluate(self._tr_loss, None, **{name: kwargs[name] for name in names})
        self.control.should_evaluate = self.control.should_save = False

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; once the ranks agreed to stop, a checkpoint is written and the run ends here."""
        if not self._health.stopping:
            try:
                super()._maybe_log_save_evaluate(*args, **kwargs)
            except EvaluationStopped:
                pass
            else:
                return
        self.control.should_evaluate, self.control.should_save = False, True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        saved = (self._run_folder / f"checkpoint-{step}").is_dir()
        assert self._signals is not None
        raise self._signals.interruption(f"after step {step}, {'with its' if saved else 'without a'} checkpoint")

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here: the estimate of transformers does not know packs."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Not counted here."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per supervised token over the evaluation set, whatever the batches, and the benchmarks' scores."""
        assert self._eval_steps is not None
        began = time.time()
        loss = self._evaluation_loss(self._eval_steps)
        questions = self._eval_steps.planner.questions_per_epoch
        metrics = {f"{metric_key_prefix}_loss": loss}
        metrics.update(speed_metrics(metric_key_prefix, began, num_samples=questions))
        if self._validation is not None:
            began = time.time()
            scores = self._validation.measure(self.model, self._mode, self.state.global_step, loss)
            metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
            metrics[f"{metric_key_prefix}_answer_seconds"] = round(time.time() - began, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in transformers, but some are never the best: a loss that is not finite, a lost guard, a dropped step."""
        value = metrics.get(str(self.args.metric_for_best_model), 0.0)
        if not math.isfinite(value) or self._health.bad_step == self.state.global_step:
            return False
        if self._validation is not None and not self._validation.qualifies(self.state.global_step):
            return False
        return super()._determine_best_metric(metrics, trial)

    @torch.no_grad()
    def _evaluation_loss(self, steps: StepDataset) -> float:
        """Sum of token losses over all ranks divided by the number of supervised tokens."""
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for step in range(len(steps)):
            if self._health.stop_agreed():
                raise EvaluationStopped
            read = steps[0, step]
            self._health.settle(self.state.global_step, read.faults, 0)
            for pack in read.packs:
                batch = pack.to(self.args.device)
                with packed_forward.packed(batch, self._mode, 0), self.compute_loss_context_manager():
                    losses = packed_forward.token_losses(model, batch, self._mode)
                sums += pack.weight * torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
        total = self.accelerator.reduce(sums, reduction="sum")
        return float(total[0] / total[1])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save what is trained, and the prompt settings: safetensors and JSON, nothing pickled, no look at the Hub."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_tuned(self.model, folder, self._base, state_dict)
            self._prompt.save(folder)
            write_card(folder, self._run_folder)
