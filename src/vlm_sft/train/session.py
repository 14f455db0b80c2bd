"""What surrounds the stages of a run: its folder, its record, how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.common.console import is_main_process
from vlm_sft.common.errors import RunError
from vlm_sft.common.record import RunRecord, device_name, now
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.distributed.launch import Launch
from vlm_sft.planning.fingerprint import check_ranks, recipe_identity, refuse_changes
from vlm_sft.planning.options import TrainOptions
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.checkpoint.directory import choose_resume, tidy
from vlm_sft.train.run_folder import clear_run, disk_error


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


def _lose(record: RunRecord, reason: str) -> None:
    """Record that a machine or process of the run is gone."""
    record.note(reason)
    record.finish("interrupted")


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
