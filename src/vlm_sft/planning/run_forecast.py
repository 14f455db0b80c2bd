"""The forecast of a training through its life: made at the start, refined by a probe, compared at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.artifacts import MERGED_BASE, checkpoint_step
from vlm_sft.common.console import detail, is_main_process, say, warn
from vlm_sft.common.errors import ForecastError, RunError
from vlm_sft.common.formats import duration, size
from vlm_sft.common.record import folder_bytes, peak_memory_bytes, resident_bytes
from vlm_sft.data.cache.directory import cache_bytes
from vlm_sft.distributed.collectives import agree, gather
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast import estimate
from vlm_sft.forecast.calibration import (
    MEMORY,
    Calibration,
    add_past_run,
    from_past_runs,
    read_past_runs,
    settled_rates,
)
from vlm_sft.forecast.estimate import RunForecast, forecast_run
from vlm_sft.forecast.inputs import ForecastInputs
from vlm_sft.forecast.limits import Shortage, shortages
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.forecast_inputs import RunData, forecast_inputs, free_space
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.run_setting import past_runs_key, setting_of, shape_of
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan

PROBING = "probe"
TRAINER_SECONDS = 0.03  # between a probe and the first step, without DeepSpeed
OUTCOMES = ("time_seconds", "peak_bytes", "disk_bytes")


@dataclass
class ForecastTracker:
    """The forecast of one run, and the clock that its outcome is taken from.

    Attributes:
        run: the run.
        inputs, calibration: what the forecast follows from.
        forecast: the forecast.
        key: what past runs are compared by.
        tasks: benchmarks that will be answered.
        written_before: bytes of the cache before the run began.
        seconds: what items took so far, by name.
    """

    run: TrainingRun
    inputs: ForecastInputs
    calibration: Calibration
    forecast: RunForecast
    key: dict[str, Any]
    tasks: list[Task]
    written_before: int
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._last = self.began

    @classmethod
    def begin(
        cls, run: TrainingRun, plan: Plan, validation: ValidationPlan | None, tasks: list[Task]
    ) -> ForecastTracker:
        """Forecast a run whose data is prepared, print it, and refuse what surely does not fit.

        Args:
            run, plan, validation, tasks: the run.

        Raises:
            ForecastError: memory or disk surely do not suffice.
        """
        inputs, calibration, key = agree(lambda: _calibrated_inputs(run, plan, validation, tasks))
        tracker = cls(run, inputs, calibration, forecast_run(inputs, calibration), key, tasks, plan.cache_before)
        tracker._publish(plan.engine.root)
        return tracker

    def lap(self, item: str) -> None:
        """Count the time since the last lap to an item."""
        now = time.monotonic()
        self.seconds[item] = self.seconds.get(item, 0.0) + now - self._last
        self._last = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count some seconds of one item to another one."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def refine(self, calibration: Calibration, inputs: ForecastInputs, root: Path) -> None:
        """Forecast again after a probe.

        Args:
            calibration: what it measured.
            inputs: the run, with what is known by now.
            root: the cache folder.

        Raises:
            ForecastError: memory or disk surely do not suffice.
        """
        self.lap(PROBING)
        self.inputs, self.calibration = inputs, calibration
        plain = forecast_run(inputs, calibration)
        starting = TRAINER_SECONDS + estimate.ENGINE_SECONDS * inputs.setting.ranks.engine
        items = {**plain.items["time_seconds"], PROBING: self.seconds[PROBING]}
        items[estimate.LOAD] += starting
        added, time_ = self.seconds[PROBING] + starting, plain.time_seconds
        self.forecast = replace(
            plain,
            time_seconds=estimate.Estimate(time_.value + added, time_.low + added, time_.high + added),
            items={**plain.items, "time_seconds": items},
        )
        self._publish(root)

    def _publish(self, root: Path) -> None:
        """Print and record the forecast, warn of what may not fit, and refuse what surely does not."""
        first, *rest = describe(self.forecast, self.inputs)
        say(first)
        for line in rest:
            detail(line)
        self._record(None)
        free = free_space(self.run.options.output_dir, root)
        found = agree(lambda: shortages(self.inputs, self.forecast, self.calibration, *free))
        refuse_or_warn(found, self.run.options.ignore_forecast)

    def finish(self, root: Path) -> None:
        """Compare with the outcome: on the terminal, in run.json, and among the past runs of this machine."""
        peak = max(gather(peak_memory_bytes()))  # of the process that needed most; waits for the others
        self.lap(estimate.FINAL if self.inputs.passes.final else estimate.SAVES)
        if not is_main_process():
            return
        actual = {
            "time_seconds": round(time.monotonic() - self.began, 3),
            "peak_bytes": peak,
            "disk_bytes": folder_bytes([self.run.options.output_dir]) + cache_bytes(root) - self.written_before,
        }
        rounded = {item: round(seconds, 3) for item, seconds in self.seconds.items()}
        self._record({**actual, "items": {"time_seconds": rounded}})
        for line in outcome(self.forecast, actual):
            say(line)
        if self.run.record.values.get("stopped_early"):
            return  # it did less than was forecast: later forecasts would learn the wrong speed from it
        measured = {**self.seconds, MEMORY: actual["peak_bytes"] - self.inputs.process_bytes}
        try:
            add_past_run(root, estimate.history_row(self.inputs, self.key, measured))
        except RunError as error:
            warn(f"later forecasts will not use this run: {error.what}")

    def _record(self, actual: dict[str, Any] | None) -> None:
        self.run.record.update(forecast={**self.forecast.to_dict(), "actual": actual})


def _calibrated_inputs(
    run: TrainingRun, plan: Plan, validation: ValidationPlan | None, tasks: list[Task]
) -> tuple[ForecastInputs, Calibration, dict[str, Any]]:
    """What the forecast of a run follows from, what past runs correct, and what these are compared by."""
    shape, past = shape_of(plan.base), read_past_runs(plan.engine.root)
    width = torch.finfo(plan.base.dtype).bits // 8
    setting = setting_of(run, shape, width, rates_here(shape, plan.base.dtype), plan.base.flash)
    key = past_runs_key(shape, setting)
    setting = replace(setting, rates=settled_rates(past, key, setting.rates))
    merged = folder_bytes([run.options.output_dir / MERGED_BASE])  # of a second stage
    inputs = forecast_inputs(
        run,
        RunData.of_plan(plan, tasks),
        validation,
        tasks,
        setting,
        prepared_already=True,
        process_bytes=0.0 if setting.rates.gpu else float(resident_bytes()),
        written_bytes=float(cache_bytes(plan.engine.root) - plan.cache_before + merged),
        done_steps=checkpoint_step(run.checkpoint),
    )
    return inputs, from_past_runs(past, key), key


def refuse_or_warn(found: Sequence[Shortage], ignored: bool) -> None:
    """Say what a run lacks.

    Raises:
        ForecastError: even the low end of the forecast does not fit, and that is not ignored.
    """
    sure = [shortage for shortage in found if shortage.sure]
    if sure and not ignored:
        fix = "; ".join(shortage.fix for shortage in sure)
        raise ForecastError("; ".join(shortage.what for shortage in sure), f"{fix}; --ignore_forecast starts it anyway")
    for shortage in found:
        warn(f"{shortage.what}; {shortage.fix}")


def describe(forecast: RunForecast, inputs: ForecastInputs) -> list[str]:
    """A forecast as lines for a person: three numbers with their items, and what they rest on."""
    spent, held, stored = forecast.time_seconds, forecast.peak_bytes, forecast.disk_bytes
    lines = [
        f"forecast ({forecast.basis}): {duration(spent.value)} ({duration(spent.low)} to {duration(spent.high)}), "
        f"{size(held.value)} of memory per process ({size(held.low)} to {size(held.high)}), "
        f"{size(stored.value)} on disk ({size(stored.low)} to {size(stored.high)}; "
        f"{size(forecast.peak_disk_bytes)} at the peak)"
    ]
    for name, show in (("time_seconds", duration), ("peak_bytes", size), ("disk_bytes", size)):
        items = sorted(forecast.items[name].items(), key=lambda item: -item[1])
        label = {"time_seconds": "time", "peak_bytes": "memory", "disk_bytes": "disk"}[name]
        lines.append(f"  {label}: " + ", ".join(f"{item} {show(value)}" for item, value in items if value > 0))
    lines.append(f"  work: {inputs.flops:.3g} FLOP in {inputs.passes.steps:,} steps")
    return [*lines, *(f"  assumed: {line}" for line in forecast.assumptions)]


def outcome(forecast: RunForecast, actual: dict[str, Any]) -> list[str]:
    """Forecast against outcome, one line each."""
    lines = []
    for name, label, show in zip(OUTCOMES, ("time", "memory", "disk"), (duration, size, size), strict=True):
        expected: float = getattr(forecast, name).value
        real = float(actual[name])
        error = (expected - real) / real if real else 0.0
        apart = f"{100 * abs(error):.1f} % too {'high' if error > 0 else 'low'}"
        off = apart if abs(error) >= 0.0005 else "as forecast"
        lines.append(f"{label}: {show(real)}, forecast {show(expected)} ({off})")
    return ["forecast against outcome: " + "; ".join(lines)]
