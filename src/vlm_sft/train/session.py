"""What surrounds the stages of a training: its folder, its ranks, its record, and how it ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.common.console import detail, folded, is_main_process, say
from vlm_sft.common.errors import InterruptedRunError, RunError
from vlm_sft.common.record import RunRecord, device_name, now
from vlm_sft.data.sources.spec import DatasetSpec, parse_datasets
from vlm_sft.distributed.collectives import agree, barrier
from vlm_sft.distributed.heartbeat import HostWatch
from vlm_sft.distributed.launch import Launch, connected, expand_segments, idle_gpus, quiet_libraries, read_launch
from vlm_sft.distributed.signals import StopSignals, resume_line
from vlm_sft.evaluate.guard import Guard
from vlm_sft.model.load import resolve_path
from vlm_sft.model.model_folder import require_utf8
from vlm_sft.planning.answer_limits import token_limits
from vlm_sft.planning.fingerprint import check_ranks, recipe_identity, refuse_changes
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.run_recipe import read_run_recipe
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import check_request
from vlm_sft.recipe.builtin import recipe_name
from vlm_sft.recipe.schema import Recipe
from vlm_sft.trackers.check import check_trackers
from vlm_sft.trackers.session import Trackers
from vlm_sft.trackers.tracker import INTERRUPTED
from vlm_sft.train.bitsandbytes_adamw import require_bitsandbytes
from vlm_sft.train.caller import Caller
from vlm_sft.train.checkpoint.directory import choose_resume, tidy
from vlm_sft.train.event_log import logged
from vlm_sft.train.fsdp_optimization import require_dividable
from vlm_sft.train.live_page import live_page
from vlm_sft.train.run_folder import DISK_ERRORS, START, RunLock, claim_folder, clear_run, disk_error, holds_work
from vlm_sft.train.second_stage import begin_second_stage


@contextmanager
def open_run(options: TrainOptions, caller: Caller) -> Iterator[tuple[TrainingRun, list[Guard]]]:
    """Check what was asked for, claim the folder and connect the ranks; all of it is held while the block runs.

    Args:
        options: what is asked for.
        caller: who asks: the process of a caller from Python is never ended.

    Yields:
        The run, and its guards.

    Raises:
        VlmSftError: a mistake in the recipe, folder or launch.
    """
    quiet_libraries()
    loaded = read_run_recipe(options)
    recipe = loaded.recipe
    specs = parse_datasets(options.dataset, options.columns)
    guards = check_request(recipe, specs, options)
    token_limits(options, specs)
    check_trackers(recipe.report_to)
    launch = read_launch(options.local_rank, options.deepspeed, options.fsdp)
    require_dividable(recipe, launch)
    require_bitsandbytes(recipe, launch)
    expand_segments(launch)
    resolve_path(options.base_model)  # before the long reading of data
    require_utf8(options.output_dir, "--output_dir")
    place = artifacts.OutputFolder(options.output_dir, *(START if is_main_process() else ()))
    claim_folder(options.output_dir, options.resume, options.overwrite)
    with (
        RunLock(options.output_dir, wanted=is_main_process()),
        place.or_nothing(lambda: holds_work(options.output_dir)),
        connected(launch),
        folded(not options.verbose),
        ExitStack() as stack,
    ):
        checkpoint = agree(lambda: _open_folder(options, recipe, launch))
        stack.enter_context(logged(options.output_dir / artifacts.LOG))
        _announce(options, launch, loaded.notes, checkpoint)
        stack.enter_context(live_page(options.output_dir, options.watch))
        facts = _facts(options, specs, launch, checkpoint)
        if options.adapter is not None:
            options, started = begin_second_stage(options, recipe)
            facts |= started
        record = RunRecord(options.output_dir, facts)
        again = caller.again or resume_line(sys.argv, launch)
        signals = StopSignals(again, lambda: record.finish("interrupted"), ends_process=not caller.in_process)
        yield TrainingRun(options, recipe, specs, launch, record, checkpoint, signals), guards


@contextmanager
def watched(run: TrainingRun) -> Iterator[Trackers]:
    """Watch for signals and lost machines while the stages run, and record how they ended.

    Yields:
        The trackers, not begun.
    """
    record, options, signals = run.record, run.options, run.signals
    assert signals is not None
    facts = {"base_model": options.base_model, "dataset": options.dataset, "folder": str(options.output_dir)}
    trackers = Trackers(options.output_dir, run.recipe.to_dict(), facts, checkpoint_step(run.checkpoint), record.note)
    hosts = HostWatch(run.launch, signals.again, lambda reason: _lose(record, reason))
    with signals:
        try:
            # Before the first line of run.json a signal leaves nothing behind, from there on it is recorded.
            record.write()
            with trackers, hosts:
                try:
                    yield trackers
                except BaseException as error:
                    _record_end(record, error, trackers, hosts)
                    raise
        except InterruptedRunError:
            record.finish("interrupted")
            raise


def _record_end(record: RunRecord, error: BaseException, trackers: Trackers, hosts: HostWatch) -> None:
    """Record why a run ended early, and raise the reason behind an error where there is one."""
    if isinstance(error, InterruptedRunError):
        record.finish("interrupted")
        trackers.close(INTERRUPTED)
        if error.everywhere:
            # A launcher ends the other ranks as soon as one is gone: none goes before all is written.
            barrier("stop")
        return
    if isinstance(error, KeyboardInterrupt):
        record.finish("interrupted")
        return
    if (lost := hosts.explain(error)) is not None:
        _lose(record, str(lost))
        raise lost from error
    record.note(f"{type(error).__name__}: {error}")
    record.finish("failed")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise disk_error(error) from error


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


def _announce(options: TrainOptions, launch: Launch, notes: list[str], checkpoint: Path | None) -> None:
    """Say what will be done."""
    source = recipe_name(options.sft_config) if options.sft_config else "the default recipe"
    say(f"training {options.base_model} on {options.dataset} with {source}")
    detail(f"launch: {launch.world_size} process(es), {launch.parallel}, {'CPU' if launch.cpu else 'GPU'}")
    place = shlex.quote(str(options.output_dir))
    if not options.watch:
        say(f"follow it in a browser: vlm-sft report {place} --watch")
    if not options.verbose:
        say(f"every detail: {place}/{artifacts.LOG}, or here with --verbose")
    for note in filter(None, [idle_gpus(launch, sys.argv), *notes]):
        say(note)
    if options.resume is not None:
        say(f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting from the beginning")


def _lose(record: RunRecord, reason: str) -> None:
    """Record that a machine or process of the run is gone."""
    record.note(reason)
    record.finish("interrupted")


def _facts(options: TrainOptions, specs: list[DatasetSpec], launch: Launch, checkpoint: Path | None) -> dict[str, Any]:
    """What run.json says from the start."""
    return {
        "resumes": _resumes(options.output_dir, checkpoint),
        "output_dir": str(options.output_dir),
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
