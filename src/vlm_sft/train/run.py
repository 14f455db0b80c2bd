"""One training run from the command line to the results table, readable top to bottom.

recipe -> data -> model -> train -> evaluate -> report; the stages meet in files of the output folder.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.common.console import is_main_process, say, warn
from vlm_sft.common.errors import GuardError, InterruptedRunError, ModelError
from vlm_sft.common.record import RunRecord, versions
from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.distributed.collectives import agree, barrier
from vlm_sft.distributed.heartbeat import HostWatch
from vlm_sft.distributed.launch import Launch, connected, expand_segments, idle_gpus, quiet_libraries, read_launch
from vlm_sft.distributed.signals import StopSignals, resume_line
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.evaluate.guard import Guard
from vlm_sft.forecast.estimate import FEATURES, LOAD, SAVES, TRACKERS
from vlm_sft.model.families import PackMode
from vlm_sft.model.gpu.kernels import choose_kernels
from vlm_sft.model.load import Base, load_model, resolve_path
from vlm_sft.model.model_folder import require_utf8
from vlm_sft.model.saved_adapter import changes_nothing
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.trainable import ALL, checkpoint_layers, described, tune
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.pack_choice import pack_plan
from vlm_sft.planning.probe import Probe, half_precision
from vlm_sft.planning.run_forecast import ForecastTracker, cache_bytes
from vlm_sft.planning.run_plan import (
    Plan,
    final_tasks,
    fit_questions,
    image_uses,
    load_data,
    prepare,
    tell_parts,
    token_limits,
    validation_plan,
    with_token_limits,
)
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan, check_request
from vlm_sft.recipe.load import read_recipe
from vlm_sft.recipe.schema import Recipe
from vlm_sft.trackers.check import check_trackers
from vlm_sft.trackers.session import Trackers
from vlm_sft.trackers.tracker import INTERRUPTED
from vlm_sft.train.callbacks import Clock, LastStep, MetricsFile, Progress
from vlm_sft.train.checkpoint.saver import CheckpointPolicy
from vlm_sft.train.final_evaluation import evaluate_run, report_run, sizes
from vlm_sft.train.loop import PackTrainer
from vlm_sft.train.run_folder import DISK_ERRORS, START, RunLock, claim_folder, disk_error, holds_work
from vlm_sft.train.session import _facts, _lose, _open_folder
from vlm_sft.train.training_args import training_arguments
from vlm_sft.train.validation import Validation


def train(options: TrainOptions) -> dict[str, Any]:
    """Carry out one training run.

    Returns:
        The value of results.json, or {} without a final evaluation.

    Raises:
        VlmSftError: a mistake in the recipe, data, model, folder or launch.
        GuardError: the training is finished, and no checkpoint keeps to the guard.
    """
    quiet_libraries()
    loaded = read_recipe(options.sft_config, options.overrides)
    recipe = loaded.recipe
    specs = parse_datasets(options.dataset)
    guards = check_request(recipe, specs, options.guard, options.eval_samples)
    token_limits(options, specs)
    check_trackers(recipe.report_to)
    launch = read_launch(options.local_rank, options.deepspeed)
    expand_segments(launch)
    resolve_path(options.base_model)  # before the long reading of data
    require_utf8(options.output_dir, "--output_dir")
    place = artifacts.OutputFolder(options.output_dir, *(START if is_main_process() else ()))
    claim_folder(options.output_dir, options.resume, options.overwrite)
    with (
        RunLock(options.output_dir, wanted=is_main_process()),
        place.or_nothing(lambda: holds_work(options.output_dir)),
        connected(launch),
    ):
        checkpoint = agree(lambda: _open_folder(options, recipe, launch))
        _announce(options, launch, loaded.notes, checkpoint)
        return _carry_out(options, recipe, specs, guards, launch, checkpoint)


def _carry_out(
    options: TrainOptions,
    recipe: Recipe,
    specs: list[DatasetSpec],
    guards: list[Guard],
    launch: Launch,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Prepare, train, evaluate, report; returns as `train` does."""
    record = RunRecord(options.output_dir, _facts(options, specs, launch, checkpoint))
    signals = StopSignals(resume_line(sys.argv, launch), lambda: record.finish("interrupted"))
    run = TrainingRun(options, recipe, specs, launch, record, checkpoint, signals)
    trackers = _trackers(run)
    hosts = HostWatch(launch, signals.again, lambda reason: _lose(record, reason))
    with signals:
        try:
            # Before the first line of run.json a signal leaves nothing behind, from there on it is recorded.
            record.write()
            with trackers, hosts:
                results, kept = _watched(run, guards, trackers, hosts)
        except InterruptedRunError:
            record.finish("interrupted")
            raise
    report_run(options.output_dir, results)
    trackers.tell()
    barrier("end")
    if not kept:
        raise GuardError(
            f"no checkpoint of {options.output_dir} keeps to --guard {options.guard} (see {artifacts.GUARD}); "
            "the adapter there is that of the last step",
            "train less or with a lower learning rate, mix data of the guarded benchmark in, or allow more points",
        )
    return results


def _watched(
    run: TrainingRun, guards: list[Guard], trackers: Trackers, hosts: HostWatch
) -> tuple[dict[str, Any], bool]:
    """Carry out the stages and record how they ended; returns as `_stages` does."""
    record = run.record
    try:
        return _stages(run, guards, trackers)
    except InterruptedRunError as stop:
        record.finish("interrupted")
        trackers.close(INTERRUPTED)
        if stop.everywhere:
            # A launcher ends the other ranks as soon as one is gone: none goes before all is written.
            barrier("stop")
        raise
    except KeyboardInterrupt:
        record.finish("interrupted")
        raise
    except BaseException as error:
        if (lost := hosts.explain(error)) is not None:
            _lose(record, str(lost))
            raise lost from error
        record.note(f"{type(error).__name__}: {error}")
        record.finish("failed")
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise disk_error(error) from error
        raise


def _stages(run: TrainingRun, guards: list[Guard], trackers: Trackers) -> tuple[dict[str, Any], bool]:
    """Prepare, train, evaluate.

    Returns:
        results: as of `train`.
        kept: whether a checkpoint keeps to the guards.
    """
    options, record = run.options, run.record
    cache_before = cache_bytes(options.engine.cache_dir or default_cache_dir())
    with record.timed("data"):
        train_samples, eval_samples, left_out = load_data(run.specs, run.recipe)
        tasks = final_tasks(run)
        asked = validation_plan(run, guards)
        tell_parts(run, train_samples, eval_samples, asked, tasks)
    with record.timed("load"):
        plan = prepare(run, train_samples, eval_samples, left_out)
        tasks, asked = fit_questions(run, tasks, asked, plan.data.encoder)
        tasks, asked = with_token_limits(run, tasks, asked, plan.base.prompt, plan.data.encoder.chat.plain)
    run, plan = pack_plan(run, plan)
    told = ForecastTracker.begin(run, plan, asked, tasks, cache_before)
    agree(trackers.begin)
    told.lap(TRACKERS)
    with record.timed("train"):
        kept = fit(run, plan, asked, told, trackers)
    results = evaluate_run(run, plan, tasks)
    trackers.conclude(record.values["steps"])
    record.update(bytes=sizes(options.output_dir))
    told.finish(plan.engine.root)
    record.finish("finished")
    return results, kept


def _trackers(run: TrainingRun) -> Trackers:
    """What `report_to` names."""
    options = run.options
    facts = {"base_model": options.base_model, "dataset": options.dataset, "folder": str(options.output_dir)}
    return Trackers(options.output_dir, run.recipe.to_dict(), facts, checkpoint_step(run.checkpoint), run.record.note)


def _announce(options: TrainOptions, launch: Launch, notes: list[str], checkpoint: Path | None) -> None:
    """Say what will be done."""
    source = options.sft_config or "the default recipe"
    say(f"training {options.base_model} on {options.dataset} with {source}")
    say(f"launch: {launch.world_size} process(es), {launch.parallel}, {'CPU' if launch.cpu else 'GPU'}")
    for note in filter(None, [idle_gpus(launch, sys.argv), *notes]):
        say(note)
    if options.resume is not None:
        say(f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting from the beginning")


def fit(run: TrainingRun, plan: Plan, asked: ValidationPlan | None, told: ForecastTracker, trackers: Trackers) -> bool:
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


def _record_kernels(run: TrainingRun, model: Any) -> None:
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
    run: TrainingRun,
    plan: Plan,
    told: ForecastTracker,
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
    inputs = told.inputs.with_features(plan.cache.features is not None, told.inputs.images.keep_benchmark_features)
    probe = Probe(run, plan, model, mode, precision, inputs, *planners)
    calibration = probe.calibrate(told.tasks, told.seconds)
    told.refine(agree(lambda: calibration), inputs, plan.engine.root)


def _policy(run: TrainingRun, plan: Plan) -> CheckpointPolicy:
    """How checkpoints are kept, and what their manifests say."""
    facts = {"parallel": run.launch.parallel, "identity": plan.identity, "versions": versions()}
    return CheckpointPolicy(run.recipe.save_total_limit, run.options.on_save_error, facts, run.record.note)


def _keep_features(plan: Plan, model: Any, asked: ValidationPlan | None) -> None:
    """Let the vision tower run once an image, where that pays."""
    evaluation = plan.evaluation.image_samples() if plan.evaluation is not None else []
    uses = image_uses(plan.schedule, plan.data.image_samples(), evaluation, asked)
    plan.engine.keep_features(model, plan.cache, uses, "training")


def _adapted(run: TrainingRun, base: Base) -> tuple[Any, dict[str, Any]]:
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


def _tell_silent(run: TrainingRun) -> None:
    """Say loudly that a finished training changed nothing."""
    if changes_nothing(run.options.output_dir):
        told = "this training changed nothing: every lora_B matrix of its adapter is zero, as before the first step"
        run.record.note(told)
        warn(f"{told}; look at learning_rate and grad_norm in {run.options.output_dir / artifacts.METRICS}")


def _record_training(run: TrainingRun, plan: Plan, trainer: PackTrainer, planner: EpochPlanner) -> None:
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
