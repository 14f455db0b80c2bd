"""From a plan to a training that is ready to run: weights, adapter, optimizer, loop; and what is done with it after."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.common.console import detail, is_main_process, say, warn
from vlm_sft.common.errors import ModelError
from vlm_sft.common.manifest import read_manifest
from vlm_sft.common.record import versions
from vlm_sft.data.loader import StepDataset
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.distributed.collectives import agree
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.forecast.estimate import FEATURES, LOAD, SAVES, TRACKERS
from vlm_sft.model.cpu.matmul import mixed_precision
from vlm_sft.model.embedding_noise import add_noise
from vlm_sft.model.families import PackMode
from vlm_sft.model.gpu.kernels import choose_kernels
from vlm_sft.model.hub import model_config
from vlm_sft.model.load import Base, load_model
from vlm_sft.model.packed_forward import Positions
from vlm_sft.model.parts import ALL
from vlm_sft.model.saved_adapter import changes_nothing
from vlm_sft.model.sharded import divide_model, load_to_divide
from vlm_sft.model.sharing_check import choose_mode, computation_of
from vlm_sft.model.trainable import checkpoint_layers, described, save_tuned, tune
from vlm_sft.model.vision_features import tower_modules
from vlm_sft.planning.options import CONTINUE
from vlm_sft.planning.probe import Probe
from vlm_sft.planning.run_forecast import ForecastTracker
from vlm_sft.planning.run_plan import Plan, image_uses
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan
from vlm_sft.trackers.session import Trackers
from vlm_sft.train.callbacks import Clock, MetricsFile, Progress
from vlm_sft.train.checkpoint.saver import CheckpointPolicy
from vlm_sft.train.deepspeed_engine import (
    DeepSpeedOptimization,
    hidden_size_of,
    partition_while_loading,
    resolve_config,
)
from vlm_sft.train.fsdp_optimization import DividedOptimization
from vlm_sft.train.loop import TrainingLoop, TrainingPlan
from vlm_sft.train.model_card import write_card
from vlm_sft.train.optimization import TorchOptimization
from vlm_sft.train.second_stage import take_over
from vlm_sft.train.validation import Validation

FEATURES_CACHED = "features_cached"  # key of a checkpoint's manifest: whether vision features were kept


@dataclass
class Training:
    """A training that is ready to run.

    Attributes:
        run, plan: the run.
        loop: trains.
        callbacks: told what it does.
        forecast: the forecast of the run, whose clock goes on.
    """

    run: TrainingRun
    plan: Plan
    loop: TrainingLoop
    callbacks: Sequence[TrainerCallback]
    forecast: ForecastTracker

    @contextmanager
    def running(self) -> Iterator[None]:
        """What must hold while the loop runs: signals wait for the end of a step, and nothing old is searched."""
        signals = self.run.signals
        held = signals.at_step_end() if signals else nullcontext()
        with self.run.record.timed("train"), _settled_heap(), self.plan.engine.counted(self.loop.model), held:
            yield

    def finish(self) -> bool:
        """Write what was trained into the run's folder, and record what the training came to.

        Returns:
            Whether a checkpoint keeps to the guards.

        Raises:
            RunError: the folder cannot be written.
        """
        run, loop = self.run, self.loop
        with run.record.timed("train"):
            loop.saver.save_result(loop.state.global_step)
            self._record()
            say(f"{'model' if ALL in run.recipe.train else 'adapter'} written to {run.options.output_dir}")
            if is_main_process() and not artifacts.holds_full_model(run.options.output_dir):
                _tell_silent(run)
            kept = loop.validation.finish(loop.state.best_global_step) if loop.validation else True
            loop.optimization.close()
            self.forecast.lap(SAVES)
        return kept

    def _record(self) -> None:
        """Write what the training came to, and what it took from the cache, into run.json."""
        run, plan, state, recipe = self.run, self.plan, self.loop.state, self.run.recipe
        plan.engine.describe([plan.cache])
        plan.engine.facts["data_workers"] = run.data_workers
        run.record.update(engine=plan.engine.facts)
        best = {"step": state.best_global_step, "metric": recipe.metric_for_best_model, "value": state.best_metric}
        run.record.update(
            steps=state.global_step,
            questions_seen=self.loop.plan.steps.planner.questions_after(state.global_step),
            best=best if state.best_metric is not None else None,
            stopped_early=self.loop.stopped_early.to_dict() if self.loop.stopped_early else None,
        )
        if self.loop.stopped_early:
            say(self.loop.stopped_early.reason)
        if recipe.load_best_model_at_end and state.best_metric is not None:
            say(f"best checkpoint: step {best['step']}, {best['metric']} {best['value']:.4f}; its adapter is kept")


def _steps_of(run: TrainingRun, model: Any, mode: PackMode) -> partial[StepDataset]:
    """What makes the steps of this rank from data and a planner."""
    tower = [parameter for part in tower_modules(model).values() for parameter in part.parameters()]
    return partial(
        StepDataset,
        rank=run.launch.rank,
        replace_bad=run.faults.replace_bad,
        # Plain transformers finds the positions of separate questions itself.
        place=Positions(model) if mode.shares else None,
        accompany=is_partitioned(*tower),
    )


def build_training(
    run: TrainingRun,
    plan: Plan,
    asked: ValidationPlan | None,
    forecast: ForecastTracker,
    trackers: Trackers,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Load the weights and put the training together.

    Args:
        run, plan: the run.
        asked: questions of each evaluation; None where the evaluation loss is all.
        forecast: refined by a probe, where one is asked for.
        trackers: get the metrics; they begin here.
        callbacks: of the caller, told after our own.

    Raises:
        VlmSftError: the base cannot be trained as asked.
    """
    run.record.update(schedule=plan.schedule.to_dict(), loss_shares=plan.data.loss_shares)
    agree(trackers.begin)
    forecast.lap(TRACKERS)
    with run.record.timed("train"):
        model, optimize = _load(run, plan)
        mode = choose_mode(model, plan.data.encoder)
        _record_model(run, plan.base, model, mode.shares)
        planner = plan.planner.computed_as(mode.separate_rows)
        eval_planner = plan.eval_planner.computed_as(mode.separate_rows) if plan.eval_planner else None
        if mode.note:
            say(mode.note)
        forecast.lap(LOAD)
        _keep_features(run, plan, model, asked)
        if run.data_workers != run.recipe.dataloader_num_workers:
            line = f"{run.data_workers} processes prepare them (--dataloader_num_workers chooses another number)"
            detail(f"batches: {line}")
        forecast.lap(FEATURES)
        if run.options.probe:
            _probe(run, plan, forecast, model, mode, (planner, eval_planner))
        steps_of = _steps_of(run, model, mode)
        steps = steps_of(plan.data, planner)
        eval_steps = steps_of(plan.evaluation, eval_planner) if plan.evaluation and eval_planner else None
        followed = TrainingPlan(run.recipe, plan.schedule, steps, eval_steps, mode, run.data_workers)
        loop = TrainingLoop(
            followed,
            model,
            optimize(model),
            run.launch,
            run.options.output_dir,
            partial(_write_model, model, plan.base, run.options.output_dir),
            _policy(run, plan),
            run.faults,
            _validation(run, plan, asked),
        )
        forecast.lap(LOAD)
    told = [*_callbacks(run, loop, planner, forecast, trackers), *callbacks]
    return Training(run, plan, loop, told, forecast)


def _load(run: TrainingRun, plan: Plan) -> tuple[Any, Any]:
    """Load the weights and make trainable what is trained.

    Returns:
        The model, and what makes the optimization of it.
    """
    base, recipe, launch = plan.base, run.recipe, run.launch
    if base.load_in_4bit and launch.parallel == "zero3":
        raise ModelError("--load_in_4bit true: ZeRO-3 cannot partition 4-bit weights", "use --deepspeed zero2")
    optimize: Any
    if launch.deepspeed is None:
        kind = DividedOptimization if launch.fsdp else TorchOptimization
        optimize = partial(kind, recipe=recipe, schedule=plan.schedule, launch=launch, dtype=base.dtype)
    else:
        width = hidden_size_of(model_config(base.path))
        config = resolve_config(launch, recipe, base.dtype == torch.bfloat16, width)
        # Before the weights: ZeRO-3 shares them out over the ranks while they are loaded.
        loading = partition_while_loading(config)
        optimize = partial(DeepSpeedOptimization, recipe=recipe, schedule=plan.schedule, config=config, loading=loading)
    # ZeRO-3 shares the weights out while they are read; a configuration of the user's may ask for that, too.
    whole = launch.parallel in ("single", "ddp", "zero2")
    loaded = load_to_divide(base) if launch.fsdp else load_model(base, launch.device if whole else "cpu")
    model, lora = tune(loaded, recipe, base.name, master=launch.deepspeed is None)
    say(f"{described(lora)}, in {plan.schedule.total_steps:,} steps of {plan.planner.global_batch_size} questions")
    if run.options.adapter is not None and run.options.adapter_mode == CONTINUE:
        place = run.options.adapter
        # FSDP hands out what rank 0 has; other ranks have no weights yet.
        agree(lambda: take_over(model, place)) if launch.fsdp else take_over(model, place)
    run.record.update(lora=lora, dtype=base.dtype_name)
    if run.checkpointing:
        checkpoint_layers(model)
    if recipe.neftune_noise_alpha:
        add_noise(model, recipe.neftune_noise_alpha, recipe.seed)
    if launch.fsdp:
        divide_model(model, launch.device, base.dtype)
    return model, optimize


def _record_model(run: TrainingRun, base: Base, model: Any, shares: bool) -> None:
    """Check the kernels that this process will use, and record which they are and in what number format."""
    kernels, notes = choose_kernels(model, torch.device(run.launch.device))
    for note in notes:
        say(note)
        run.record.note(note)
    run.record.update(image_sharing=shares, kernels=kernels, **computation_of(base, model))


def _write_model(
    model: Any, base: Base, run_folder: Path, folder: Path, weights: dict[str, torch.Tensor] | None
) -> None:
    """Save what is trained, and the prompt settings: safetensors and JSON, nothing pickled, no look at the Hub."""
    save_tuned(model, folder, base, weights)
    base.prompt.save(folder)
    write_card(folder, run_folder)


def _validation(run: TrainingRun, plan: Plan, asked: ValidationPlan | None) -> Validation | None:
    """What answers the questions of each evaluation."""
    if asked is None:
        return None
    done = checkpoint_step(run.checkpoint)
    folder, budget = run.options.output_dir, run.tokens_per_pack
    return Validation(asked, plan.base, folder, budget, run.launch, done, plan.cache.image_tensors)


def _callbacks(
    run: TrainingRun, loop: TrainingLoop, planner: EpochPlanner, forecast: ForecastTracker, trackers: Trackers
) -> list[TrainerCallback]:
    """What is told of a training."""
    metrics = MetricsFile(run.options.output_dir / artifacts.METRICS, planner, checkpoint_step(run.checkpoint))
    shown = Progress(planner, loop.plan.schedule.total_steps, loop.health)
    return [shown, *([metrics] if is_main_process() else []), Clock(forecast), *trackers.callbacks()]


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Spare Python's search for cycles what was there before: the objects of libraries, by far the most."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _probe(
    run: TrainingRun,
    plan: Plan,
    forecast: ForecastTracker,
    model: Any,
    mode: PackMode,
    planners: tuple[EpochPlanner, EpochPlanner | None],
) -> None:
    """Measure a few passes and forecast again."""
    if is_partitioned(*model.parameters()):
        say("--probe: no effect with sharded weights, where no rank holds the whole model")
        return
    precision = partial(mixed_precision, run.launch.device, plan.base.dtype)
    kept = forecast.inputs.images.keep_benchmark_features
    inputs = forecast.inputs.with_features(plan.cache.features is not None, kept)
    probe = Probe(run, plan, model, mode, precision, inputs, *planners)
    calibration = probe.calibrate(forecast.tasks, forecast.seconds)
    forecast.refine(agree(lambda: calibration), inputs, plan.engine.root)


def _policy(run: TrainingRun, plan: Plan) -> CheckpointPolicy:
    """How checkpoints are kept, and what their manifests say."""
    cached = plan.cache.features is not None
    facts = {
        "parallel": run.launch.parallel,
        "identity": plan.identity,
        "versions": versions(),
        FEATURES_CACHED: cached,
    }
    return CheckpointPolicy(run.recipe.save_total_limit, run.options.on_save_error, facts, run.record.note)


def _keep_features(run: TrainingRun, plan: Plan, model: Any, asked: ValidationPlan | None) -> None:
    """Let the vision tower run once an image, where that pays; a resume goes on as the run was.

    A tower that sees other images beside an image rounds otherwise, so the choice is part of a run's bits.
    """
    before = read_manifest(run.checkpoint).get(FEATURES_CACHED) if run.checkpoint is not None else None
    evaluation = plan.evaluation.image_samples() if plan.evaluation is not None else []
    uses = image_uses(plan.schedule, plan.data.image_samples(), evaluation, asked)
    plan.engine.keep_features(model, plan.cache, uses, "training", before)


def _tell_silent(run: TrainingRun) -> None:
    """Say loudly that a finished training changed nothing."""
    if changes_nothing(run.options.output_dir):
        told = "this training changed nothing: every lora_B matrix of its adapter is zero, as before the first step"
        run.record.note(told)
        warn(f"{told}; look at learning_rate and grad_norm in {run.options.output_dir / artifacts.METRICS}")
