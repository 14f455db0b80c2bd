"""Corrections of a forecast by measurements: a probe of a few steps, or past runs.

Past runs are kept in `past_runs.jsonl` in the cache folder, one JSON object per line: device and shape, the uncorrected
forecast of every item, its outcome, and the machine's rates at the start. The weight of a run depends on its length and
age, and on whether other programs held the machine; no run moves an item far.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import read_jsonl, write_jsonl
from vlm_sft.common.errors import RunError
from vlm_sft.forecast.hardware import Rates

PAST_RUNS = "past_runs.jsonl"
KEPT_LINES = 400
USED_RUNS = 5  # the newest ones that match
TABLE, PROBE, PAST = "table", "probe", "past runs"
PROBE_SPREAD, PAST_SPREAD, OTHER_SPREAD = 1.1, 1.15, 1.35
WIDEST_SPREAD = 4.0  # a wider interval is of no use
# Shorter items say nothing about rates; those of another shape are mostly overhead that every run has.
SHORTEST_SECONDS, OTHER_SHORTEST_SECONDS = 0.05, 5.0
LARGEST_FACTOR = 3.0  # a larger ratio is an accident rather than a rate of the machine
TRUSTED_SECONDS = 5.0  # an item that took so long has half the weight of a very long one
NEWER_COUNTS = 0.7  # weight of a run over that of the next newer one
HALF_LIFE_DAYS = 30.0
DISTURBED = 0.25  # weight of a run that began beside other programs, or that was an accident
DOUBT = 0.1  # weight of the table, against that of the runs
SAME_RATE = 1.35  # rates that differ by less are taken for the same rate
MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Corrections of a forecast.

    Attributes:
        basis: "table", "probe" or "past runs".
        factors: what the seconds of an item are multiplied by; `MEMORY` for bytes beyond the process.
        spread: how far the outcome may lie from a corrected item, as a factor above 1; None for that of the rates.
        peak_bytes: the largest memory of a probe; None without one.
        note: one line for the list of assumptions.
    """

    basis: str = TABLE
    factors: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None
    peak_bytes: float | None = None
    note: str = ""

    def factor(self, item: str) -> float:
        """The correction of one item; 1 for an item that was not measured."""
        return self.factors.get(item, 1.0)


def history_key(device: str, threads: int, shape: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a past run to be like another one.

    Args:
        device: its name.
        threads: that compute in one process.
        shape: `ModelShape.key`.
        setting: what else changes the rate: number format, checkpointing, attention, parallelism.
    """
    return {"device": device, "threads": threads, "shape": shape, **setting}


def read_past_runs(folder: Path) -> list[dict[str, Any]]:
    """The past runs of this machine, oldest first; none where the file is missing or damaged."""
    try:
        rows = list(read_jsonl(folder / PAST_RUNS))
    except (OSError, RunError, UnicodeDecodeError):
        return []
    return [row for row in rows if all(isinstance(row.get(name), dict) for name in ("key", "forecast", "actual"))]


def add_past_run(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a finished run; the oldest lines go. Raises RunError where the folder cannot be written."""
    json.dumps(row)
    write_jsonl(folder / PAST_RUNS, [*read_past_runs(folder)[1 - KEPT_LINES :], dict(row)])


def settled_rates(rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any], measured: Rates) -> Rates:
    """The rates to forecast with: those measured now, steadied by those of undisturbed past runs that agree with them.

    Args:
        rows: from `read_past_runs`.
        key: of the run to come.
        measured: just now.
    """
    known = [row["rates"] for row in _alike(rows, key) if isinstance(row.get("rates"), dict) and not _disturbed(row)]
    if not known:
        return measured
    flops, bandwidth, launch = (
        statistics.median(float(one[name]) for one in known) for name in ("flops", "bandwidth", "launch")
    )
    if not 1 / SAME_RATE < flops / measured.flops < SAME_RATE:
        return measured
    return replace(measured, flops=flops, bandwidth=bandwidth, launch=launch)


def from_past_runs(
    rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any], today: datetime | None = None
) -> Calibration:
    """Learn corrections from the runs of the same device and shape, or else of the same device.

    Args:
        rows: from `read_past_runs`.
        key: of the run to come.
        today: what their age is counted from; None for now.

    Returns:
        The calibration; that of the table where no run matches.
    """
    # Of other shapes long items alone count: a tiny model is all overhead.
    same = _alike(rows, key)
    device = [row for row in rows if all(row.get("key", {}).get(name) == key[name] for name in ("device", "threads"))][
        -USED_RUNS:
    ]
    chosen, shortest = (same, SHORTEST_SECONDS) if same else (device, OTHER_SHORTEST_SECONDS)
    ages = [_age_weight(row, place, today or datetime.now(UTC)) for place, row in enumerate(reversed(chosen))][::-1]
    factors: dict[str, float] = {}
    for item in {name for row in chosen for name in row["forecast"]}:
        ratios = [
            (math.log(ratio), weight * age)
            for row, age in zip(chosen, ages, strict=True)
            if (found := _ratio(row, item, shortest)) is not None
            for ratio, weight in (found,)
        ]
        if ratios and (same or item != MEMORY):
            factors[item] = math.exp(_learned(ratios))
    if not factors:
        return Calibration()
    spread = _spread(chosen, ages, factors)
    what = "of this shape" if same else "of other shapes"
    note = f"corrected by {len(chosen)} past run(s) {what} on this device"
    return Calibration(PAST, factors, spread if same else max(spread, OTHER_SPREAD), note=note)


def _alike(rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The newest runs of the same device, shape and setting, oldest first."""
    return [row for row in rows if row.get("key") == dict(key)][-USED_RUNS:]


def _disturbed(row: Mapping[str, Any]) -> bool:
    """Whether other programs held the machine when a run began."""
    return float(row.get("rates", {}).get("unrest", 1.0)) > 1.0


def _age_weight(row: Mapping[str, Any], newer: int, today: datetime) -> float:
    """The weight of a run by its age: the number of `newer` runs, and days where its time is recorded."""
    weight = math.pow(NEWER_COUNTS, newer) * (DISTURBED if _disturbed(row) else 1.0)
    try:
        days = (today - datetime.fromisoformat(row["at"])).total_seconds() / 86_400
    except (KeyError, TypeError, ValueError):
        return weight
    return weight * math.pow(0.5, max(0.0, days) / HALF_LIFE_DAYS)


def _ratio(row: Mapping[str, Any], item: str, shortest: float) -> tuple[float, float] | None:
    """Actual over forecast of one item of a past run, bounded, and its weight; None where it was too short to tell."""
    expected, actual = row["forecast"].get(item), row["actual"].get(item)
    if not expected or not actual or expected < 0 or actual < 0:
        return None
    seconds = min(float(expected), float(actual))
    if item != MEMORY and seconds < shortest:
        return None
    weight = 1.0 if item == MEMORY else seconds / (seconds + TRUSTED_SECONDS)
    ratio = float(actual) / float(expected)
    bounded = min(max(ratio, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
    return bounded, weight if bounded == ratio else weight * DISTURBED


def _learned(ratios: Sequence[tuple[float, float]]) -> float:
    """The weighted median of logarithms, drawn towards 0 where their weights are small."""
    ratios = sorted(ratios)
    passed = list(accumulate(weight for _, weight in ratios))
    middle, _ = ratios[bisect_left(passed, passed[-1] / 2)]
    return middle * passed[-1] / (passed[-1] + DOUBT)


def _spread(rows: Sequence[Mapping[str, Any]], ages: Sequence[float], factors: Mapping[str, float]) -> float:
    """How far the seconds of these runs lie from their corrected forecast, as a factor."""
    misses, weights = [], []
    for row, age in zip(rows, ages, strict=True):
        items = [item for item in row["forecast"] if item != MEMORY and row["actual"].get(item)]
        expected = sum(float(row["forecast"][item]) * factors.get(item, 1.0) for item in items)
        actual = sum(float(row["actual"][item]) for item in items)
        if expected > 0 and actual > 0:
            misses.append(abs(math.log(actual / expected)))
            weights.append(age * min(expected, actual) / (min(expected, actual) + TRUSTED_SECONDS))
    total = sum(weights)
    if not total:
        return OTHER_SPREAD
    doubt = DOUBT / (total + DOUBT)
    usual = math.pow(PAST_SPREAD, 1 - doubt) * math.pow(OTHER_SPREAD, doubt)
    seen = math.exp(1.5 * sum(map(math.prod, zip(misses, weights, strict=True))) / total)
    return min(max(usual, seen), WIDEST_SPREAD)
