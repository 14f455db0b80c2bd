"""The trials of a sweep, carried out: in their order, as many at a time as there are devices for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from vlm_sft.common.console import say
from vlm_sft.common.errors import InterruptedRunError, RunError
from vlm_sft.common.formats import duration, number, percent
from vlm_sft.planning.validation_plan import LOSS
from vlm_sft.search.median import too_poor
from vlm_sft.search.optuna_search import OptunaSearch
from vlm_sft.search.outlook import Forecaster, Outlook
from vlm_sft.search.request import MEDIAN, OPTUNA, SweepSetting
from vlm_sft.search.state import SweepState
from vlm_sft.search.trials import (
    FINISHED,
    LOOK_SECONDS,
    PRUNED,
    SKIPPED,
    WAITING,
    Curve,
    RunningTrial,
    SweepTrial,
    interruptible,
    read_curve,
    settle,
)

if TYPE_CHECKING:
    from vlm_sft.search.sweep import Sweep

Job = tuple[SweepSetting, SweepTrial]
VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """The GPUs of this process by their names in CUDA_VISIBLE_DEVICES; [] on a machine without one."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def environments(parallel: int | None, gpus: int) -> list[dict[str, str]]:
    """The environment of each trial that runs at the same time: devices of its own, or a share of the processors.

    Args:
        parallel: trials at a time; None for as many as the visible devices suffice for.
        gpus: devices of each.

    Raises:
        RunError: more devices are needed than are visible.
    """
    devices = visible_devices()
    count = parallel or max(1, len(devices) // gpus)
    if count == 1:
        return [{}]
    if not devices:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (count * gpus))))
        return [{"OMP_NUM_THREADS": threads}] * count
    if count * gpus > len(devices):
        raise RunError(
            f"--parallel {count} with --gpus {gpus} needs {count * gpus} devices, and {len(devices)} are visible",
            f"pass --parallel {max(1, len(devices) // gpus)}, or leave it out",
        )
    return [{VISIBLE: ",".join(devices[place * gpus : (place + 1) * gpus])} for place in range(count)]


class TrialQueue:
    """What is left to train, and what is being trained.

    Args:
        asked: the sweep.
        state: its record, written after each trial.
        outlooks: of the settings; of a search one for each that it may choose.
        seeds: of each setting.
        forecaster: of the settings.
    """

    def __init__(
        self, asked: Sweep, state: SweepState, outlooks: Sequence[Outlook], seeds: Sequence[int], forecaster: Forecaster
    ) -> None:
        self._asked, self._state, self._seeds, self._forecaster = asked, state, seeds, forecaster
        self._settings = [one.setting for one in outlooks]
        self._free = list(asked.environments)
        self._running: list[tuple[RunningTrial, Job, str, dict[str, str]]] = []
        self._parallel, self._begun, self._count = len(asked.environments), 0, len(outlooks) * len(seeds)
        self._left = sum(one.seconds.value for one in outlooks) * len(seeds) / self._parallel
        self._finished: dict[str, Curve] = {}
        self._spent = self._forecast = 0.0  # of the trials that were trained now

    def carry_out(self) -> list[SweepSetting]:
        """Train what is not trained yet; returns the settings.

        Raises:
            InterruptedRunError: a signal stopped the sweep or a trial; all trials have a checkpoint.
        """
        tried: dict[SweepSetting, None] = {}
        jobs: Iterator[Job | None] = self._jobs()
        more = True
        with interruptible():
            try:
                while more or self._running:
                    while more and self._free:
                        job = next(jobs, ())
                        more = job != ()
                        if not job:
                            break
                        tried[job[0]] = None
                        self._begin(job)
                    self._look()
            except (KeyboardInterrupt, InterruptedRunError) as error:
                self._stop()
                if isinstance(error, InterruptedRunError):
                    raise
                raise InterruptedRunError("the sweep was stopped", "go on with it: the same command again") from None
        return list(tried)

    def _jobs(self) -> Iterator[Job | None]:
        """The trials in their order, of a grid all settings with the first seed, then with the next.

        A search has as many settings open as trials run at a time; None says that it has to know more of these first.
        """
        asked, state, seeds = self._asked, self._state, self._seeds
        if asked.options.search != OPTUNA:
            trials = [(setting, state.trial(setting, seed)) for seed in seeds for setting in self._settings]
            yield from trials
            return
        search = OptunaSearch(asked.options, asked.greater, seeds[0])
        chosen = search.asked(len(self._settings))
        opened: list[tuple[int, list[SweepTrial]]] = []
        more = True
        while more or opened:
            for known in [one for one in opened if all(trial.status != WAITING for trial in one[1])]:
                opened.remove(known)
                values = [trial.value for trial in known[1] if trial.status == FINISHED and trial.value is not None]
                pruned = any(trial.status == PRUNED for trial in known[1])
                search.tell(known[0], fmean(values) if len(values) == len(seeds) else None, pruned)
            following = next(chosen, None) if more and len(opened) < self._parallel else ()
            if following:
                place, setting = following
                opened.append((place, [state.trial(setting, seed) for seed in seeds]))
                yield from [(setting, trial) for trial in opened[-1][1]]
            elif following is None:
                more = False
            elif opened:
                yield None

    def _begin(self, job: Job) -> None:
        """Start a trial, unless it is known how it ended."""
        setting, trial = job
        self._begun += 1
        recipe, place = self._asked.recipe(setting), self._asked.place(trial)
        label = f"{self._begun} of {self._count}: {setting.label}, seed {trial.seed}"
        lost = next((o for o in self._state.trials if o.setting == setting.label and o.status == PRUNED), None)
        if trial.status == WAITING and lost is not None:
            trial.status, trial.reason = SKIPPED, f"it was stopped early with seed {lost.seed}"
        if trial.status not in (WAITING, FINISHED) or settle(trial, place, recipe):
            self._end(job, label)
            return
        trial.status = WAITING
        environment = self._free.pop(0)
        where = f", {VISIBLE}={environment[VISIBLE]}" if VISIBLE in environment else ""
        say(f"{label} (log: {place}.log{where})")
        words = self._asked.words(setting, trial, environment.get(VISIBLE, ""))
        running = RunningTrial(trial, place, words, recipe, environment)
        self._running.append((running, job, label, environment))

    def _look(self) -> None:
        """Look after the running trials once."""
        if self._running:
            time.sleep(LOOK_SECONDS)
        for one in list(self._running):
            running, job, label, environment = one
            if running.is_over(self._too_poor):
                self._running.remove(one)
                self._free.append(environment)
                if job[1].status == FINISHED:
                    self._spent += job[1].seconds
                    self._forecast += self._forecaster.of(job[0]).seconds.value
                self._end(job, label)

    def _end(self, job: Job, label: str) -> None:
        """Record and tell what became of a trial."""
        setting, trial = job
        if trial.status == FINISHED:
            self._finished[trial.name] = read_curve(self._asked.place(trial), self._asked.recipe(setting))
        self._state.write()
        self._left = max(0.0, self._left - self._forecaster.of(setting).seconds.value / self._parallel)
        rate = self._spent / self._forecast if self._forecast else 1
        rest = f"; about {duration(self._left * rate)} left" if self._begun < self._count or self._running else ""
        told = f"{trial.status}: {trial.reason}"
        if trial.status == FINISHED:
            show = number if self._asked.metric == LOSS else percent
            told = f"{self._asked.metric} {show(trial.value)} in {duration(trial.seconds)}"
        say(f"{label}: {told}{rest}")

    def _too_poor(self, curve: Curve) -> str:
        """Why a training is not worth its end, by the trials that have ended; "" where it is."""
        asked = self._asked.options
        if asked.prune != MEDIAN:
            return ""
        finished = list(self._finished.values())
        return too_poor(curve, finished, self._asked.greater, asked.prune_after_trials, asked.prune_after_share)

    def _stop(self) -> None:
        """Stop all that runs, with checkpoints."""
        if self._running:
            say("stopping the running trials after a checkpoint")
        for running, *_ in self._running:
            running.ask_to_stop()
        for running, *_ in self._running:
            running.wait()
