"""One training of a sweep: a process of its own in a folder of its own, that is followed and may be stopped early."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.errors import GuardError, InterruptedRunError, RunError, bounded
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.run_folder import RunLock

WAITING, FINISHED, PRUNED, FAILED = "waiting", "finished", "pruned", "failed"
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 120.0  # for a trial of a sweep that was killed to save its checkpoint and end
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Curve = list[tuple[float, float]]  # share of the training, value of the metric


@dataclass
class SweepTrial:
    """One setting trained with one seed.

    Attributes:
        name: of its folder.
        setting: label of the setting.
        seed: of its recipe.
        status: "waiting", "finished", "pruned" or "failed".
        value: the metric of what it kept.
        step: optimizer steps that it took.
        seconds: wall seconds of its stages, from data to the last step.
        reason: why it was stopped early, or failed.
    """

    name: str
    setting: str
    seed: int
    status: str = WAITING
    value: float | None = None
    step: int = 0
    seconds: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What sweep.json says of it."""
        return asdict(self)


def read_curve(folder: Path, recipe: Recipe) -> Curve:
    """The evaluations of a training so far: the share of it that was done, and the metric that chooses checkpoints.

    Args:
        folder: of the run.
        recipe: of the run; its epochs or steps say how long it is.
    """
    path = folder / artifacts.METRICS
    points: dict[int, tuple[float, float]] = {}  # the later line of a step counts
    for row in artifacts.read_jsonl(path) if path.is_file() else ():
        value = row.get(recipe.best_metric_column)
        if isinstance(value, int | float):
            done = row["step"] / recipe.max_steps if recipe.max_steps > 0 else row["epoch"] / recipe.num_train_epochs
            points[row["step"]] = (min(1.0, done), float(value))
    return [points[step] for step in sorted(points)]


def settle(trial: SweepTrial, folder: Path, recipe: Recipe) -> bool:
    """Take the outcome of a training that is finished from its folder; False where it is not."""
    path = folder / artifacts.RUN
    facts = artifacts.read_json(path) if path.is_file() else {}
    if facts.get("status") != "finished":
        return False
    curve = read_curve(folder, recipe)
    kept = kept_step(folder)
    best = facts.get("best") or {}
    trial.status, trial.reason = FINISHED, ""
    trial.value = best.get("value") if best.get("step") == kept else curve[-1][1] if curve else None
    trial.step = int(facts.get("steps") or 0)
    trial.seconds = round(sum(facts["seconds"].get(stage, 0.0) for stage in ("data", "load", "train")), 3)
    return True


def kept_step(folder: Path) -> int | None:
    """The step whose adapter a run kept, where it chose the best one; None: the last one."""
    best = artifacts.read_json(folder / artifacts.RUN).get("best")
    chosen = artifacts.read_json(folder / artifacts.RECIPE).get("load_best_model_at_end")
    return int(best["step"]) if best and chosen else None


def start_process(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a training in a process group of its own, whose output goes to the end of `log`.

    On Linux it is asked to stop, with a checkpoint, when this process is gone.
    """
    with log.open("ab") as stream:
        return subprocess.Popen(
            words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_bound
        )


def _bound() -> None:
    """In the new process: end when the one that started it does."""
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


def run_trial(
    trial: SweepTrial, folder: Path, words: list[str], recipe: Recipe, too_poor: Callable[[Curve], str]
) -> None:
    """Train to the end, or until it is too poor; what became of it is noted in `trial`.

    Args:
        trial: what is trained.
        folder: of the run; its log lies beside it.
        words: the command line.
        recipe: of the run.
        too_poor: says of the evaluations so far why the training is not worth its end; "" where it is.

    Raises:
        InterruptedRunError: a signal stopped this process or the training, which can go on.
    """
    log = folder.with_name(folder.name + ".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _wait_until_free(folder)
    begin = log.stat().st_size if log.is_file() else 0
    reason, seen = "", 0
    with _interruptible():
        process = start_process(words, log)
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)
                curve = read_curve(folder, recipe)
                if not reason and len(curve) > seen:
                    seen, reason = len(curve), too_poor(curve)
                    if reason:
                        os.killpg(process.pid, signal.SIGTERM)
        except KeyboardInterrupt:
            say("stopping the trial after a checkpoint")
            _end(process)
            raise InterruptedRunError("the sweep was stopped", "go on with it: the same command again") from None
    code = process.wait()
    if code == 0 and settle(trial, folder, recipe):
        return
    trial.step = _newest_step(folder)
    trial.status, trial.reason = (PRUNED, reason) if reason else (FAILED, _failure(log, begin, code))
    if code == InterruptedRunError.exit_code and not reason:
        trial.status = WAITING
        raise InterruptedRunError(f"the trial {trial.name} was stopped", "go on with it: the same command again")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a training to stop, and wait until it has."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Take the signals by which a scheduler ends a program as Ctrl-C is taken."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_free(folder: Path) -> None:
    """Wait for the trial of a sweep that was killed, which may still be writing its checkpoint.

    Raises:
        RunError: it goes on.
    """
    end, told = time.monotonic() + PATIENCE_SECONDS, False
    while folder.is_dir():
        try:
            with RunLock(folder):
                return
        except RunError:
            if time.monotonic() > end:
                raise
            if not told:
                say(f"waiting for the process that still writes {folder}")
            told = True
            time.sleep(LOOK_SECONDS)


def _newest_step(folder: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    path = folder / artifacts.METRICS
    return max((row["step"] for row in artifacts.read_jsonl(path)), default=0) if path.is_file() else 0


def _failure(log: Path, begin: int, code: int) -> str:
    """Why a training failed: the error that it printed, else its last line."""
    if code == GuardError.exit_code:
        return "no checkpoint keeps to --guard"
    with log.open("rb") as stream:
        stream.seek(begin)
        lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    last = lines[errors[-1] :][:3] if errors else lines[-1:] or ["it printed nothing"]
    told = " ".join(line.strip() for line in last)
    return bounded(f"exit code {code}: {told}", 400)
