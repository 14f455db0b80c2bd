"""The checkpoints of a run on disk: which there are, which verify, publish, rotate, clean.

A checkpoint is written into `checkpoint-N.partial` and renamed when it is complete, so `checkpoint-N` is whole or not
there. What is to go is renamed to `checkpoint-N.removed` first; what a new one takes the place of, to
`checkpoint-N.replaced`. A crash leaves such names behind, and the next start puts them in order.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import _CHECKPOINT, checkpoint_step
from vlm_sft.common.console import warn
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import size
from vlm_sft.common.manifest import flush, folder_problems, read_manifest

PARTIAL, REMOVED, REPLACED = ".partial", ".removed", ".replaced"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whether they verify or not."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def checkpoint_problems(path: Path) -> list[str]:
    """Why a checkpoint cannot be used, one sentence each; empty when it verifies."""
    found = folder_problems(path)
    if not found and read_manifest(path).get("step") != checkpoint_step(path):
        found = ["its manifest is of another step"]
    return found


def choose_resume(folder: Path, resume: str | None) -> Path | None:
    """Find the checkpoint to go on from; those that do not verify are told and left alone.

    Args:
        folder: the run's folder.
        resume: None for a new run; "auto" for the newest checkpoint that verifies, or a new run when there is none; or
            a checkpoint folder.

    Raises:
        RunError: the named folder is no checkpoint, or does not verify.
    """
    if resume is None:
        return None
    if resume == "auto":
        for path in reversed(checkpoints(folder)):
            problems = checkpoint_problems(path)
            if not problems:
                return path
            warn(f"{path} cannot be resumed: {'; '.join(problems[:3])}")
        return None
    path = Path(resume)
    if path not in checkpoints(path.parent):
        have = ", ".join(known.name for known in checkpoints(folder)) or "none"
        raise RunError(f"--resume {resume}: no checkpoint folder", f"in {folder}: {have}; or use --resume auto")
    problems = checkpoint_problems(path)
    if problems:
        raise RunError(f"--resume {resume}: {'; '.join(problems[:3])}", "use --resume auto for the newest intact one")
    return path


def begin_checkpoint(folder: Path, step: int, needed_bytes: int) -> Path:
    """Make the folder that a checkpoint is written into.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        needed_bytes: about what it will take.

    Raises:
        OSError: the disk has no room for it, or cannot be written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(f"{size(free)} are free, and it takes about {size(needed_bytes)}")
    partial = folder / f"checkpoint-{step}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def publish(partial: Path) -> Path:
    """Give a complete checkpoint its name; one that has it already is replaced.

    Raises:
        OSError: it cannot be renamed, or the disk does not take its name; all names are as they were before.
    """
    target = partial.with_suffix("")
    replaced = target.with_name(target.name + REPLACED)
    steps = [(target, replaced)] if target.exists() else []
    done: list[tuple[Path, Path]] = []
    try:
        for before, after in [*steps, (partial, target)]:
            os.rename(before, after)
            done.append((before, after))
        flush(target.parent)
    except OSError:
        for before, after in reversed(done):
            with suppress(OSError):
                os.rename(after, before)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def rotate(folder: Path, limit: int | None, keep: set[int]) -> None:
    """Remove the oldest checkpoints beyond a number.

    Args:
        folder: the run's folder.
        limit: how many may stay; None for all. Those to keep stay even if they are more.
        keep: steps that must stay: the one just written, and the best.
    """
    have = checkpoints(folder)
    spare = [path for path in have if checkpoint_step(path) not in keep]
    for path in spare[: max(0, len(have) - limit)] if limit else ():
        gone = path.with_name(path.name + REMOVED)
        try:
            os.rename(path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            warn(f"{path} cannot be removed: {error.strerror}")


def tidy(folder: Path) -> None:
    """Put in order what a killed run left behind: half-written and half-removed checkpoints, temporary files.

    Args:
        folder: the run's folder; no other run writes it.
    """
    for path in folder.glob(f"checkpoint-*{REPLACED}"):
        original = path.with_suffix("")
        if not original.exists():
            os.rename(path, original)
    for suffix in (PARTIAL, REMOVED, REPLACED):
        for path in folder.glob(f"checkpoint-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / artifacts.ADAPTER_PARTIAL, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def last_bytes(folder: Path) -> int:
    """Bytes of the newest checkpoint; 0 when there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            return sum(file["bytes"] for file in read_manifest(path)["files"].values())
        except RunError:
            continue
    return 0
