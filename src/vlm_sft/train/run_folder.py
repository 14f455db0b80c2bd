"""The output folder of a run: is it free, what an earlier run left in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_sft.common import artifacts
from vlm_sft.common.console import warn
from vlm_sft.common.errors import RunError
from vlm_sft.common.record import command_line, now
from vlm_sft.report.card import may_write
from vlm_sft.train.checkpoint.directory import checkpoints

PREDICTIONS_OF_ANY_RANK = "predictions*.jsonl"

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES)


def disk_error(error: OSError) -> RunError:
    """A full, broken or read-only disk in the user's words."""
    where = f" with {error.filename}" if error.filename else ""
    return RunError(
        f"the disk fails{where}: {error.strerror}",
        "repair the disk or free some space, then continue with --resume auto: the checkpoints are intact",
    )


# A start that fails removes the file of its lock: whoever has opened that file must look again.
_LOCK_SECONDS = 0.5

# What a start writes before the training begins.
START = (
    artifacts.RUN,
    artifacts.RECIPE,
    artifacts.DATA,
    artifacts.LEFT_OUT,
    artifacts.LOCK,
    artifacts.MERGED_BASE,
    artifacts.TRACKERS,
    artifacts.LOG,
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
            "choose another folder, continue with --resume, or start over with --overwrite_output_dir",
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
    folders = (artifacts.EVALUATION_FOLDER, artifacts.VALIDATION_FOLDER, artifacts.MERGED_BASE)
    for name in (*folders, *artifacts.TRACKER_FOLDERS):
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
        artifacts.LOG,
    ):
        (folder / name).unlink(missing_ok=True)
    if may_write(folder / artifacts.CARD):
        (folder / artifacts.CARD).unlink(missing_ok=True)


class RunLock:
    """Holds the output folder while the block runs; taken by rank 0 only.

    The system releases the lock when this process ends, however it ends; workers that it forks do not hold it. NFS
    passes it on to other machines. The file itself stays behind: unlocked, it means nothing.

    Args:
        folder: the run's folder; it exists.
        wanted: False takes no lock (other ranks).
    """

    def __init__(self, folder: Path, wanted: bool = True) -> None:
        self.path = folder / artifacts.LOCK
        self._lock = (
            FileLock(self.path, timeout=_LOCK_SECONDS, mode=artifacts.FILE_MODE, fallback_to_soft=False)
            if wanted
            else None
        )

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            RunError: another process holds it; the message says which one.
        """
        if self._lock is None:
            return self
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunError(
                f"--output_dir {self.path.parent} is in use by another run: {self._holder()}",
                "wait for it, stop it, or choose another folder",
            ) from error
        except OSError as error:
            reason = error.strerror or error
            warn(f"{self.path} cannot be locked ({reason}): a second run could write to this folder")
            return self
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "command": command_line()}
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            self.path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def _holder(self) -> str:
        """Who holds the lock, in words."""
        try:
            facts = artifacts.read_json(self.path)
            return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
        except (RunError, KeyError):
            return "a process that did not say which"
