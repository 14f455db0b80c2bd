"""The training itself: weights, adapter, trainer. Imports data, model and the rest of this room."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback

from vlm_sft import artifacts
from vlm_sft.console import is_main_process, say, warn
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.errors import ModelError
from vlm_sft.evaluate.caches import one_an_image
from vlm_sft.forecast.run import FEATURES, LOAD, SAVES
from vlm_sft.launch import agree
from vlm_sft.model.families import PackMode
from vlm_sft.model.kernels import choose_kernels
from vlm_sft.model.load import Base, load_model
from vlm_sft.model.partitioned import is_partitioned
from vlm_sft.model.parts import ALL
from vlm_sft.model.saved_adapter import changes_nothing
from vlm_sft.model.sharing import choose_mode
from vlm_sft.model.tune import checkpoint_layers, described, tune
from vlm_sft.record import versions
from vlm_sft.trackers.session import Trackers
from vlm_sft.train.arguments import training_arguments
from vlm_sft.train.callbacks import LastStep, MetricsFile, Progress
from vlm_sft.train.checkpoints import checkpoint_step
from vlm_sft.train.foretell import Clock, Foretelling
from vlm_sft.train.options import Run
from vlm_sft.train.prepare import Plan
from vlm_sft.train.probe import Probe, half_precision
from vlm_sft.train.saving import CheckpointPolicy
from vlm_sft.train.trainer import PackTrainer
from vlm_sft.train.validation import Validation, ValidationPlan


def fit(run: Run, plan: Plan, asked: ValidationPlan | None, told: Foretelling, trackers: Trackers) -> bool:
    """Train the adapter and save it in the run's folder; returns whether a checkpoint keeps to the guard."""
    options, recipe, launch, checkpoint = run.options, run.recipe, run.launch, run.checkpoint
    base, schedule, planner, eval_planner = plan.base, plan.schedule, plan.planner, plan.eval_planner
    # Before the weights: with ZeRO-3 they are partitioned while they are loaded, once these arguments exist.
    bf16 = base.dtype == torch.bfloat16
    args = training_arguments(recipe, schedule, launch, options.output_dir, bf16, run.data_workers)
    model, lora = _adapted(run, base)
    mode = choose_mode(model, plan.data.encoder)
    run.record.update(attention=base.attention, dtype=base.dtype_name, lora=lora, image_sharing=mode.shares)
    _record_kernels(run, model)
    if not mode.shares:
        say(mode.note)
        planner, eval_planner = planner.separate(), eval_planner.separate() if eval_planner else None
    told.lap(LOAD)
    _keep_features(plan, model, asked)
    if run.data_workers != recipe.dataloader_num_workers:
        say(f"batches: {run.data_workers} processes prepare them (--dataloader_num_workers chooses another number)")
    told.lap(FEATURES)
    done = checkpoint_step(checkpoint)
    shown = Progress(planner, schedule.total_steps)
    metrics = [MetricsFile(options.output_dir / artifacts.METRICS, planner, done)]
    validation = Validation(asked, base, options.output_dir, run.tokens_per_pack, launch, done) if asked else None
    if validation is not None:
        validation.image_source = plan.cache.image_tensors
    trainer = PackTrainer(
        model=model,
        args=args,
        train_data=plan.data,
        eval_data=plan.evaluation,
        planner=planner,
        eval_planner=eval_planner,
        prompt=base.prompt,
        base=base,
        mode=mode,
        validation=validation,
        policy=_policy(run, plan),
        faults=run.faults,
        callbacks=[
            shown,
            *(metrics if is_main_process() else []),
            LastStep(schedule),
            Clock(told),
            *trackers.callbacks(),
        ],
    )
    shown.newest_loss = trainer.last_loss
    trainer.remove_callback(PrinterCallback)
    told.lap(LOAD)
    if options.probe:
        _probe(run, plan, told, trainer, mode, (planner, eval_planner))
    with _settled_heap(), plan.engine.counted(model), run.signals.at_step_end() if run.signals else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_adapter()
    _record_training(run, plan, trainer, planner)
    say(f"{'model' if ALL in recipe.train else 'adapter'} written to {options.output_dir}")
    if is_main_process() and not artifacts.holds_full_model(options.output_dir):
        _tell_silent(run)
    kept = validation.finish(trainer.state.best_global_step) if validation else True
    trainer.accelerator.free_memory()
    told.lap(SAVES)
    return kept


def _record_kernels(run: Run, model: Any) -> None:
    """Check the kernels that this process will use, and record which they are."""
    kernels, notes = choose_kernels(model, torch.device(run.launch.device))
    for note in notes:
        say(note)
        run.record.note(note)
    run.record.update(kernels=kernels)


@contextmanager
def _settled_heap() -> Iterator[None]:
    """Spare Python's search for cycles what was there before: the objects of libraries, by far the most."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _probe(
    run: Run,
    plan: Plan,
    told: Foretelling,
    trainer: PackTrainer,
    mode: PackMode,
    planners: tuple[EpochPlanner, EpochPlanner | None],
) -> None:
    """Measure a few passes and forecast again."""
    model: Any = trainer.model
    if run.launch.deepspeed is not None:  # its engine takes the model over when the training begins
        if is_partitioned(*model.parameters()):
            say("--probe: under ZeRO-3 no rank has the whole model for a pass of its own; the forecast stays as it is")
            return
    # The trainer wraps the model in it only when the training begins.
    precision = partial(half_precision, run.launch, plan.base)
    case = replace(told.case, features=plan.cache.features is not None)
    probe = Probe(run, plan, model, mode, precision, case, *planners)
    calibration = probe.calibrate(told.tasks, told.seconds)
    told.refine(agree(lambda: calibration), case, plan.engine.root)


def _policy(run: Run, plan: Plan) -> CheckpointPolicy:
    """How checkpoints are kept, and what their manifests say."""
    facts = {"parallel": run.launch.parallel, "identity": plan.identity, "versions": versions()}
    return CheckpointPolicy(run.recipe.save_total_limit, run.options.on_save_error, facts, run.record.note)


def _keep_features(plan: Plan, model: Any, asked: ValidationPlan | None) -> None:
    """Let the vision tower run once an image, where that pays."""
    schedule = plan.schedule
    evaluations = schedule.total_steps / schedule.eval_steps if schedule.eval_steps else 0.0
    uses = [(plan.data.image_samples(), schedule.total_steps / schedule.steps_per_epoch)]
    if plan.evaluation is not None:
        uses.append((plan.evaluation.image_samples(), evaluations))
    if asked is not None:
        samples = [sample for task in asked.tasks for sample in task.samples]
        uses.append((one_an_image(samples), evaluations))
    plan.engine.keep_features(model, plan.cache, uses, "training")


def _adapted(run: Run, base: Base) -> tuple[Any, dict[str, Any]]:
    """Load the weights and make trainable what is trained; returns the model and what run.json says about that."""
    if base.load_in_4bit and run.launch.parallel == "zero3":
        raise ModelError("--load_in_4bit true: ZeRO-3 cannot partition 4-bit weights", "use --deepspeed zero2")
    # ZeRO-3 shares the weights out while they are read; a configuration of the user's may ask for that, too.
    whole = run.launch.parallel in ("single", "ddp", "zero2")
    loaded = load_model(base, run.launch.device if whole else "cpu")
    model, lora = tune(loaded, run.recipe, base.name, master=run.launch.deepspeed is None)
    say(described(lora))
    if run.checkpointing:
        checkpoint_layers(model)
    return model, lora


def _tell_silent(run: Run) -> None:
    """Say loudly that a finished training changed nothing."""
    if changes_nothing(run.options.output_dir):
        told = "this training changed nothing: every lora_B matrix of its adapter is zero, as before the first step"
        run.record.note(told)
        warn(f"{told}; look at learning_rate and grad_norm in {run.options.output_dir / artifacts.METRICS}")


def _record_training(run: Run, plan: Plan, trainer: PackTrainer, planner: EpochPlanner) -> None:
    """Write what the training came to, and what it took from the cache, into run.json."""
    plan.engine.describe([plan.cache])
    plan.engine.facts["data_workers"] = run.data_workers
    run.record.update(engine=plan.engine.facts)
    state, recipe = trainer.state, run.recipe
    best = {"step": state.best_global_step, "metric": recipe.metric_for_best_model, "value": state.best_metric}
    run.record.update(
        steps=state.global_step,
        questions_seen=planner.questions_after(state.global_step),
        best=best if state.best_metric is not None else None,
    )
    if recipe.load_best_model_at_end and state.best_metric is not None:
        say(f"best checkpoint: step {best['step']}, {best['metric']} {best['value']:.4f}; its adapter is kept")
