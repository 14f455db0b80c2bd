"""One training of a sweep: a process of its own in a folder of its own, followed, and stopped early if too poor."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.errors import GuardError, InterruptedRunError, RunError, bounded
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.run_folder import RunLock

WAITING, FINISHED, PRUNED, FAILED, SKIPPED = "waiting", "finished", "stopped early", "failed", "skipped"
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
        status: "waiting", "finished", "stopped early", "failed" or "skipped".
        value: the metric of what it kept.
        step: optimizer steps that it took.
        seconds: wall seconds of its stages, from data to the last step.
        reason: why it was stopped early, skipped, or failed.
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


def start_process(words: list[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a training in a process group of its own, whose output goes to the end of `log`.

    On Linux it is asked to stop, with a checkpoint, when this process is gone.
    """
    with log.open("ab") as stream:
        return subprocess.Popen(
            words,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=os.environ | variables,
            start_new_session=True,
            preexec_fn=_bound,
        )


def _bound() -> None:
    """In the new process: end when the one that started it does."""
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


class RunningTrial:
    """A trial in a process of its own, which is followed through the metrics that it writes.

    Args:
        trial: what is trained; what becomes of it is noted there.
        folder: of the run; its log lies beside it.
        words: the command line.
        recipe: of the run.
        variables: added to the environment, such as the devices that the trial has for itself.
    """

    def __init__(
        self, trial: SweepTrial, folder: Path, words: list[str], recipe: Recipe, variables: Mapping[str, str]
    ) -> None:
        self.trial, self.folder, self._recipe = trial, folder, recipe
        self._log = folder.with_name(folder.name + ".log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _wait_until_free(folder)
        self._begin = self._log.stat().st_size if self._log.is_file() else 0
        self._reason, self._seen = "", 0
        self._process = start_process(words, self._log, variables)

    def is_over(self, too_poor: Callable[[Curve], str]) -> bool:
        """Look after it: stop it where it is too poor; True once it has ended.

        Args:
            too_poor: says of the evaluations so far why the training is not worth its end; "" where it is.

        Raises:
            InterruptedRunError: someone else stopped the training, which can go on.
        """
        code = self._process.poll()
        if code is not None:
            self._note(code)
            return True
        curve = read_curve(self.folder, self._recipe)
        if not self._reason and len(curve) > self._seen:
            self._seen, self._reason = len(curve), too_poor(curve)
            if self._reason:
                self.ask_to_stop()
        return False

    def _note(self, code: int) -> None:
        """Note what became of it."""
        trial = self.trial
        if code == 0 and settle(trial, self.folder, self._recipe):
            return
        trial.step = _newest_step(self.folder)
        if self._reason:
            trial.status, trial.reason = PRUNED, self._reason
        elif code == InterruptedRunError.exit_code:
            raise InterruptedRunError(f"the trial {trial.name} was stopped", "go on with it: the same command again")
        else:
            trial.status, trial.reason = FAILED, _failure(self._log, self._begin, code)

    def ask_to_stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()


@contextmanager
def interruptible() -> Iterator[None]:
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
