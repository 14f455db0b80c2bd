"""The forecast of a training through its life: told at the start, refined by a probe, compared at the end.

Imports case, probe, forecast, and the report's number formats.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.common.console import is_main_process, say, warn
from vlm_sft.common.errors import ForecastError, RunError
from vlm_sft.common.formats import duration, relative, size
from vlm_sft.common.record import device_name, folder_bytes, peak_memory_bytes, resident_bytes
from vlm_sft.data.cache.directory import cache_bytes
from vlm_sft.distributed.collectives import agree, gather
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast import estimate as forecasts
from vlm_sft.forecast.calibration import (
    MEMORY,
    Calibration,
    add_past_run,
    from_past_runs,
    history_key,
    read_past_runs,
    settled_rates,
)
from vlm_sft.forecast.estimate import Case, Forecast, forecast
from vlm_sft.forecast.limits import Shortage, shortages
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.forecast_inputs import Known, case_of, free_space, history_setting, setting_of, shape_of
from vlm_sft.planning.options import Run
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.validation_plan import ValidationPlan

PROBING = "probe"
TRAINER_SECONDS = 0.03  # between a probe and the first step, without DeepSpeed
OUTCOMES = ("time_seconds", "peak_bytes", "disk_bytes")


@dataclass
class Foretelling:
    """The forecast of one run, and the clock that its outcome is taken from.

    Attributes:
        run: the run.
        case, calibration: what the forecast follows from.
        found: the forecast.
        key: what past runs are compared by.
        tasks: benchmarks that will be answered.
        seconds: what items took so far, by name.
        written_before: bytes of the cache before the run began.
    """

    run: Run
    case: Case
    calibration: Calibration
    found: Forecast
    key: dict[str, Any]
    tasks: list[Task]
    written_before: int
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._last = self.began

    @classmethod
    def begin(cls, run: Run, plan: Plan, asked: ValidationPlan | None, tasks: list[Task]) -> Foretelling:
        """Forecast a run whose data is prepared, tell it, and refuse what surely does not fit.

        Args:
            run, plan, asked, tasks: the run.

        Raises:
            ForecastError: memory or disk surely do not suffice.
        """
        shape = shape_of(plan.base)
        past = read_past_runs(plan.engine.root)

        def foresee() -> tuple[Case, Calibration, dict[str, Any]]:
            width = torch.finfo(plan.base.dtype).bits // 8
            setting = setting_of(run, shape, width, rates_here(shape, plan.base.dtype), plan.base.flash)
            key = history_key(device_name(), torch.get_num_threads(), shape.key, history_setting(run.launch, setting))
            setting = replace(setting, rates=settled_rates(past, key, setting.rates))
            case = case_of(
                run,
                Known.of_plan(plan, tasks),
                asked,
                tasks,
                setting,
                prepared_already=True,
                process_bytes=0.0 if setting.rates.gpu else float(resident_bytes()),
                written_bytes=float(cache_bytes(plan.engine.root) - plan.cache_before),
                done_steps=checkpoint_step(run.checkpoint),
            )
            return case, from_past_runs(past, key), key

        case, calibration, key = agree(foresee)
        told = cls(run, case, calibration, forecast(case, calibration), key, tasks, plan.cache_before)
        for line in describe(told.found, case):
            say(line)
        told._record(None)
        told._check(plan.engine.root)
        return told

    def lap(self, item: str) -> None:
        """Count the time since the last lap to an item."""
        now = time.monotonic()
        self.seconds[item] = self.seconds.get(item, 0.0) + now - self._last
        self._last = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count some seconds of one item to another one."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def refine(self, calibration: Calibration, case: Case, root: Path) -> None:
        """Forecast again after a probe.

        Args:
            calibration: what it measured.
            case: the run, with what is known by now.
            root: the cache folder.

        Raises:
            ForecastError: memory or disk surely do not suffice.
        """
        self.lap(PROBING)
        self.case, self.calibration = case, calibration
        plain = forecast(case, calibration)
        items = {**plain.items["time_seconds"], PROBING: self.seconds[PROBING]}
        starting = TRAINER_SECONDS + forecasts.ENGINE_SECONDS * case.ranks.engine
        items[forecasts.LOAD] += starting
        added = self.seconds[PROBING] + starting
        estimate = plain.time_seconds
        self.found = replace(
            plain,
            time_seconds=forecasts.Estimate(estimate.value + added, estimate.low + added, estimate.high + added),
            items={**plain.items, "time_seconds": items},
        )
        for line in describe(self.found, case):
            say(line)
        self._record(None)
        self._check(root)

    def _check(self, root: Path) -> None:
        """Warn of what may not fit; refuse what surely does not."""
        free = free_space(self.run.options.output_dir, root)
        found = agree(lambda: shortages(self.case, self.found, self.calibration, *free))
        refuse_or_warn(found, self.run.options.ignore_forecast)

    def finish(self, root: Path) -> None:
        """Compare with the outcome: on the terminal, in run.json, and among the past runs of this machine."""
        peak = max(gather(peak_memory_bytes()))  # of the process that needed most; waits for the others
        self.lap(forecasts.FINAL if self.case.final else forecasts.SAVES)
        if not is_main_process():
            return
        actual = {
            "time_seconds": round(time.monotonic() - self.began, 3),
            "peak_bytes": peak,
            "disk_bytes": folder_bytes([self.run.options.output_dir]) + cache_bytes(root) - self.written_before,
        }
        rounded = {item: round(seconds, 3) for item, seconds in self.seconds.items()}
        self._record({**actual, "items": {"time_seconds": rounded}})
        for line in outcome(self.found, actual):
            say(line)
        measured = {**self.seconds, MEMORY: actual["peak_bytes"] - self.case.process_bytes}
        try:
            add_past_run(root, forecasts.history_row(self.case, self.key, measured))
        except RunError as error:
            warn(f"this run is not kept for later forecasts: {error.what}")

    def _record(self, actual: dict[str, Any] | None) -> None:
        self.run.record.update(forecast={**self.found.to_dict(), "actual": actual})


def refuse_or_warn(found: Sequence[Shortage], ignored: bool) -> None:
    """Tell what a run lacks.

    Raises:
        ForecastError: even the low end of the forecast does not fit, and that is not ignored.
    """
    sure = [shortage for shortage in found if shortage.sure]
    if sure and not ignored:
        fix = "; ".join(shortage.fix for shortage in sure)
        raise ForecastError("; ".join(shortage.what for shortage in sure), f"{fix}; --ignore_forecast runs it as it is")
    for shortage in found:
        warn(f"{shortage.what}; {shortage.fix}")


def describe(found: Forecast, case: Case) -> list[str]:
    """A forecast as lines for a person: three numbers with their items, and what they rest on."""
    spent, held, stored = found.time_seconds, found.peak_bytes, found.disk_bytes
    lines = [
        f"forecast ({found.basis}): {duration(spent.value)} ({duration(spent.low)} to {duration(spent.high)}), "
        f"{size(held.value)} of memory a process ({size(held.low)} to {size(held.high)}), "
        f"{size(stored.value)} on disk ({size(found.fullest_bytes)} in the fullest moment)"
    ]
    for name, show in (("time_seconds", duration), ("peak_bytes", size), ("disk_bytes", size)):
        items = sorted(found.items[name].items(), key=lambda item: -item[1])
        label = {"time_seconds": "time", "peak_bytes": "memory", "disk_bytes": "disk"}[name]
        lines.append(f"  {label}: " + ", ".join(f"{item} {show(value)}" for item, value in items if value > 0))
    lines.append(f"  work: {case.flops:.3g} FLOP in {case.schedule.total_steps - case.done_steps:,} steps")
    return [*lines, *(f"  assumed: {line}" for line in found.assumptions)]


def outcome(found: Forecast, actual: dict[str, Any]) -> list[str]:
    """Forecast against outcome, one line each."""
    lines = []
    for name, label, show in zip(OUTCOMES, ("time", "memory", "disk"), (duration, size, size), strict=True):
        said: float = getattr(found, name).value
        came = float(actual[name])
        error = (said - came) / came if came else None
        lines.append(f"{label}: {show(said)} forecast, {show(came)} in fact ({relative(error)})")
    return ["forecast against outcome: " + "; ".join(lines)]
