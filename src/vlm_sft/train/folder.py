"""The output folder of a run: is it free, what an earlier run left in it. Imports report."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from vlm_sft import artifacts
from vlm_sft.errors import RunError
from vlm_sft.report.card import may_write
from vlm_sft.train.checkpoints import checkpoints

PREDICTIONS_OF_ANY_RANK = "predictions*.jsonl"

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES)


def disk_error(error: OSError) -> RunError:
    """A full, broken or read-only disk in the user's words."""
    where = f" with {error.filename}" if error.filename else ""
    return RunError(
        f"the disk fails{where}: {error.strerror}",
        "mend the disk or make room, then go on with --resume auto: the checkpoints are as they were",
    )


# What a start writes before the training begins.
START = (
    artifacts.RUN,
    artifacts.RECIPE,
    artifacts.DATA,
    artifacts.LEFT_OUT,
    artifacts.LOCK,
    artifacts.TRACKERS,
    *artifacts.TRACKER_FOLDERS,
)
_WORK = (
    artifacts.METRICS,
    artifacts.ANOMALIES,
    artifacts.ADAPTER_WEIGHTS,
    artifacts.RESULTS,
    artifacts.GUARD,
    artifacts.EVALUATION_FOLDER,
    artifacts.VALIDATION_FOLDER,
)


def holds_work(folder: Path) -> bool:
    """Whether a folder holds what a training or an evaluation did, and not only what a start wrote down."""
    found = any((folder / name).exists() for name in _WORK) or any(folder.glob(f"*/{PREDICTIONS_OF_ANY_RANK}"))
    return found or artifacts.holds_full_model(folder) or bool(checkpoints(folder))


def claim_folder(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Make sure that the output folder can be used for this run.

    Raises:
        RunError: it holds another run, is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output_dir {folder} is a file", "choose a folder")
    if holds_work(folder) and resume is None and not overwrite:
        raise RunError(
            f"--output_dir {folder} holds another run",
            "choose another folder, go on with --resume, or start over with --overwrite_output_dir",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test.{os.getpid()}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"--output_dir {folder} cannot be written: {error.strerror}", "choose a folder that you may write to"
        ) from error


def clear_run(folder: Path) -> None:
    """Remove what an earlier run left in the folder, and nothing else."""
    recipe = artifacts.read_json(folder / artifacts.RECIPE) if (folder / artifacts.RECIPE).is_file() else {}
    # A whole model is removed only where a run made it: the folder could be that of a base model.
    for pattern in artifacts.MODEL_FILES if "all" in recipe.get("train", ()) else ():
        for path in folder.glob(pattern):
            path.unlink()
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for name in (artifacts.EVALUATION_FOLDER, artifacts.VALIDATION_FOLDER, *artifacts.TRACKER_FOLDERS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (
        artifacts.RUN,
        artifacts.RECIPE,
        artifacts.DATA,
        artifacts.LEFT_OUT,
        artifacts.METRICS,
        artifacts.RESULTS,
        artifacts.ADAPTER_WEIGHTS,
        artifacts.ADAPTER_CONFIG,
        artifacts.PROMPT,
        artifacts.REPORT,
        artifacts.GUARD,
        artifacts.MANIFEST,
        artifacts.MANIFEST_CHECKSUM,
        artifacts.TRACKERS,
    ):
        (folder / name).unlink(missing_ok=True)
    if may_write(folder / artifacts.CARD):
        (folder / artifacts.CARD).unlink(missing_ok=True)
