"""What a sweep will take: the forecast of each setting, of all trials together, and what a budget leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.console import muted, warn
from vlm_sft.common.errors import ForecastError
from vlm_sft.common.formats import duration, size
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.forecast.estimate import CACHED_IMAGES, DATA, FEATURES, Estimate
from vlm_sft.forecast.limits import shortages
from vlm_sft.planning.dry_run import cache_root, plan_run
from vlm_sft.planning.forecast_inputs import free_space
from vlm_sft.planning.options import PlanOptions, TrainOptions
from vlm_sft.planning.plan_report import PlannedRun
from vlm_sft.planning.run_forecast import refuse_or_warn
from vlm_sft.planning.run_plan import few_steps
from vlm_sft.search.request import SweepSetting

SHARED_TIME = (DATA, FEATURES)  # what the first trial on some data does for all of them
SHARED_DISK = (CACHED_IMAGES, FEATURES)


@dataclass(frozen=True)
class Outlook:
    """The forecast of one trial of a setting.

    Attributes:
        setting: the setting.
        dataset: what it trains on: trials on the same data share its preparation.
        seconds, memory, disk: with intervals, of one trial alone; memory of one process.
        shared_seconds, shared_disk: how much of them only the first trial on the data needs.
        steps: optimizer steps.
        advice: where they are too few to learn from; else "".
    """

    setting: SweepSetting
    dataset: str
    seconds: Estimate
    memory: Estimate
    disk: Estimate
    shared_seconds: float
    shared_disk: float
    steps: int
    advice: str = ""


class Forecaster:
    """Forecasts settings, each once; images whose tokens were counted are not looked at again.

    Args:
        train: what all trials share.
        gpus: devices of each.
    """

    def __init__(self, train: TrainOptions, gpus: int) -> None:
        self._train, self._gpus = train, gpus
        self._counted: dict[str, EncodedGroup] = {}
        self._known: dict[SweepSetting, Outlook] = {}

    def of(self, setting: SweepSetting) -> Outlook:
        """The forecast of a setting; the set-up is told with the first one.

        Raises:
            ForecastError: memory or disk surely do not suffice for it.
            VlmSftError: a mistake in recipe, data, model or options.
        """
        if setting not in self._known:
            options = PlanOptions(setting.applied(self._train), gpus=self._gpus)
            with muted(bool(self._known)):
                planned = plan_run(options, self._counted)
            self._known[setting] = _outlook(setting, planned)
            found = shortages(
                planned.inputs,
                planned.forecast,
                planned.calibration,
                *free_space(self._train.output_dir, cache_root(self._train)),
            )
            refuse_or_warn(found, self._train.ignore_forecast)
        return self._known[setting]


def _outlook(setting: SweepSetting, planned: PlannedRun) -> Outlook:
    forecast = planned.forecast
    shared = {
        name: sum(forecast.items[name].get(item, 0.0) for item in items)
        for name, items in (("time_seconds", SHARED_TIME), ("disk_bytes", SHARED_DISK))
    }
    return Outlook(
        setting,
        planned.run.options.dataset,
        forecast.time_seconds,
        forecast.peak_bytes,
        forecast.disk_bytes,
        shared["time_seconds"],
        shared["disk_bytes"],
        planned.data.schedule.total_steps,
        few_steps(planned.run.recipe, planned.data.schedule, planned.data.planner),
    )


def total(trials: Iterable[Outlook], parallel: int = 1) -> tuple[Estimate, Estimate, Estimate]:
    """Time, memory of one and disk of trials, so many of which run at a time.

    The forecasts of one machine err together, so the ends of their intervals are added, not only their variances.

    Args:
        trials: at least one.
        parallel: how many run at a time.
    """
    listed = list(trials)
    seen: set[str] = set()
    seconds, disk = [], []
    for one in listed:
        again = one.dataset in seen
        seen.add(one.dataset)
        seconds.append(_scaled(one.seconds, one.shared_seconds if again else 0.0))
        disk.append(_scaled(one.disk, one.shared_disk if again else 0.0))
    memory = max((one.memory for one in listed), key=lambda one: one.value)
    rounds = -(-len(listed) // parallel) / len(listed)  # the last trials may leave devices idle
    whole = _sum(seconds)
    return Estimate(*(rounds * end for end in (whole.value, whole.low, whole.high))), memory, _sum(disk)


def _scaled(estimate: Estimate, less: float) -> Estimate:
    """An estimate without a part of it."""
    share = 1 - less / estimate.value if estimate.value else 1.0
    return Estimate(estimate.value * share, estimate.low * share, estimate.high * share)


def _sum(parts: Sequence[Estimate]) -> Estimate:
    return Estimate(*(sum(getattr(one, name) for one in parts) for name in ("value", "low", "high")))


def within_budget(
    outlooks: Sequence[Outlook], seeds: Sequence[int], budget: float | None, parallel: int = 1
) -> tuple[list[Outlook], list[int], list[str]]:
    """Leave out what a budget does not allow: seeds first, the last one first, then the settings that take most.

    Seeds are left out whole: what is compared was trained with the same ones.

    Args:
        outlooks: of the settings.
        seeds: of each setting.
        budget: seconds; None for no limit.
        parallel: trials at a time.

    Returns:
        Settings and seeds that are kept, and one sentence for each cut.

    Raises:
        ForecastError: not even two settings with one seed fit.
    """
    kept, kept_seeds = list(outlooks), list(seeds)

    def seconds() -> float:
        return total(kept * len(kept_seeds), parallel)[0].value

    if budget is None or seconds() <= budget:
        return kept, kept_seeds, []
    whole = seconds()
    while len(kept_seeds) > 1 and seconds() > budget:
        kept_seeds.pop()
    while len(kept) > 2 and seconds() > budget:
        kept.remove(max(kept, key=lambda one: one.seconds.value))
    if seconds() > budget:
        raise ForecastError(
            f"--budget: {len(kept)} settings with one seed take {duration(seconds())} by the forecast, more than "
            f"{duration(budget)}",
            "allow more time, or train less: fewer epochs, --max_train",
        )
    notes = [f"--budget {duration(budget)}: all trials would take {duration(whole)} by the forecast"]
    if len(kept_seeds) < len(seeds):
        notes.append(f"{len(kept_seeds)} of {len(seeds)} seeds are trained")
    gone = [one.setting.label for one in outlooks if one not in kept]
    if gone:
        notes.append(f"settings left out, the longest trainings: {'; '.join(gone)}")
    return kept, kept_seeds, notes


def outlook_cells(outlooks: Sequence[Outlook], seeds: int, parallel: int) -> list[list[str]]:
    """A table of the trials with their forecasts: header, one row a setting, the sum."""
    rows = [["setting", "trials", "steps", "time of one (90 % interval)", "memory", "disk"]]
    for one in outlooks:
        cells = _time(one.seconds), size(one.memory.value), size(one.disk.value)
        rows.append([one.setting.label, str(seeds), f"{one.steps:,}", *cells])
    spent, memory, disk = total([*outlooks] * seeds, parallel)
    name, each = (f"all, {parallel} at a time", " each") if parallel > 1 else ("in sum", "")
    rows.append([name, str(len(outlooks) * seeds), "", _time(spent), size(memory.value) + each, size(disk.value)])
    return rows


def _time(estimate: Estimate) -> str:
    return f"{duration(estimate.value)} ({duration(estimate.low)} to {duration(estimate.high)})"


def warn_of_few_steps(outlooks: Sequence[Outlook]) -> None:
    """Warn of settings whose trials can hardly learn, as a training of theirs would."""
    for advice in dict.fromkeys(one.advice for one in outlooks if one.advice):
        labels = [one.setting.label for one in outlooks if one.advice == advice]
        warn(advice if len(labels) == len(outlooks) else f"{'; '.join(dict.fromkeys(labels))}: {advice}")


def check_disk(outlooks: Sequence[Outlook], train: TrainOptions) -> None:
    """Warn where all trials together may not fit onto the disk."""
    free, needed = free_space(train.output_dir, cache_root(train))[0], total(outlooks)[2]
    if needed.value > free:
        warn(
            f"disk: all trials together take {size(needed.value)} by the forecast, {size(free)} are free; "
            "--save_total_limit 1 keeps fewer checkpoints"
        )


def forecast_facts(outlooks: Sequence[Outlook], parallel: int) -> dict[str, Any]:
    """The forecast of all trials as JSON values."""
    names = ("time_seconds", "peak_bytes", "disk_bytes")
    return {
        name: one.to_dict(name != "time_seconds") for name, one in zip(names, total(outlooks, parallel), strict=True)
    }
