"""One training run from the command line to the results table, readable top to bottom. May import every room.

recipe -> data -> model -> train -> evaluate -> report; the stages meet in files of the output folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vlm_sft import artifacts
from vlm_sft.console import is_main_process, say
from vlm_sft.data.cache_folder import default_cache_dir
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.errors import GuardError, InterruptedRunError, RunError
from vlm_sft.evaluate.guard import Guard
from vlm_sft.forecast.run import TRACKERS
from vlm_sft.launch import Launch, agree, barrier, connected, expand_segments, idle_gpus, quiet_libraries, read_launch
from vlm_sft.model.folder import require_utf8
from vlm_sft.model.load import resolve_path
from vlm_sft.recipe.load import read_recipe
from vlm_sft.recipe.schema import Recipe
from vlm_sft.record import RunRecord, device_name, now
from vlm_sft.trackers.check import check_trackers
from vlm_sft.trackers.session import Trackers
from vlm_sft.trackers.tracker import INTERRUPTED
from vlm_sft.train.checkpoints import checkpoint_step, choose_resume, tidy
from vlm_sft.train.final import evaluate_run, report_run, sizes
from vlm_sft.train.fit import fit
from vlm_sft.train.folder import DISK_ERRORS, START, claim_folder, clear_run, disk_error, holds_work
from vlm_sft.train.foretell import Foretelling, cache_bytes
from vlm_sft.train.hosts import HostWatch
from vlm_sft.train.identity import check_ranks, recipe_identity, refuse_changes
from vlm_sft.train.lock import RunLock
from vlm_sft.train.options import Run, TrainOptions
from vlm_sft.train.passes import with_passes
from vlm_sft.train.prepare import (
    final_tasks,
    fit_questions,
    limited,
    load_data,
    prepare,
    tell_parts,
    token_limits,
    validation_plan,
)
from vlm_sft.train.signals import StopSignals, resume_line
from vlm_sft.train.validation import check_request


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


def _open_folder(options: TrainOptions, recipe: Recipe, launch: Launch) -> Path | None:
    """On rank 0: put the folder in order and find the checkpoint to go on from; what differs at once is refused."""
    try:
        tidy(options.output_dir)
        if options.overwrite and options.resume is None:
            clear_run(options.output_dir)
    except OSError as error:
        raise disk_error(error) from error
    checkpoint = choose_resume(options.output_dir, options.resume)
    check_ranks(checkpoint, launch)
    refuse_changes(checkpoint, {"recipe": recipe_identity(recipe, launch.world_size)}, options.allow_changes)
    return checkpoint


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
    run = Run(options, recipe, specs, launch, record, checkpoint, signals)
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


def _watched(run: Run, guards: list[Guard], trackers: Trackers, hosts: HostWatch) -> tuple[dict[str, Any], bool]:
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


def _stages(run: Run, guards: list[Guard], trackers: Trackers) -> tuple[dict[str, Any], bool]:
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
        tasks, asked = limited(run, tasks, asked, plan.base.prompt, plan.data.encoder.chat.plain)
    run, plan = with_passes(run, plan)
    told = Foretelling.begin(run, plan, asked, tasks, cache_before)
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


def _trackers(run: Run) -> Trackers:
    """What `report_to` names."""
    options = run.options
    facts = {"base_model": options.base_model, "dataset": options.dataset, "folder": str(options.output_dir)}
    return Trackers(options.output_dir, run.recipe.to_dict(), facts, checkpoint_step(run.checkpoint), run.record.note)


def _lose(record: RunRecord, reason: str) -> None:
    """Record that a machine or process of the run is gone."""
    record.note(reason)
    record.finish("interrupted")


def _announce(options: TrainOptions, launch: Launch, notes: list[str], checkpoint: Path | None) -> None:
    """Say what will be done."""
    source = options.sft_config or "the default recipe"
    say(f"training {options.base_model} on {options.dataset} with {source}")
    say(f"launch: {launch.world_size} process(es), {launch.parallel}, {'CPU' if launch.cpu else 'GPU'}")
    for note in filter(None, [idle_gpus(launch, sys.argv), *notes]):
        say(note)
    if options.resume is not None:
        say(f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting from the beginning")


def _facts(options: TrainOptions, specs: list[DatasetSpec], launch: Launch, checkpoint: Path | None) -> dict[str, Any]:
    """What run.json says from the start."""
    return {
        "resumes": _resumes(options.output_dir, checkpoint),
        "base_model": options.base_model,
        "datasets": [spec.name for spec in specs],
        "dataset": options.dataset,
        "recipe_file": str(options.sft_config) if options.sft_config else None,
        "device": device_name(),
        "world_size": launch.world_size,
        "parallel": launch.parallel,
    }


def _resumes(folder: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """When and at which step this run was resumed, earlier times first."""
    if checkpoint is None or not is_main_process():
        return []
    try:
        earlier = artifacts.read_json(folder / artifacts.RUN).get("resumes", [])
    except (RunError, AttributeError):
        earlier = []
    return [*earlier, {"step": checkpoint_step(checkpoint), "at": now()}]
