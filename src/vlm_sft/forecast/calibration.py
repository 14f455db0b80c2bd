"""What measurements say about a forecast: a probe of a few steps, or past runs of this machine. Imports artifacts.

Past runs lie in `past_runs.jsonl` in the cache folder, one JSON object a line: device and shape, what the uncorrected
forecast said about every item, and what it came to.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.artifacts import read_jsonl, write_jsonl
from vlm_sft.errors import RunError

PAST_RUNS = "past_runs.jsonl"
KEPT_LINES = 400
USED_RUNS = 5  # the newest ones that match
TABLE, PROBE, PAST = "table", "probe", "past runs"
PROBE_SPREAD, PAST_SPREAD, OTHER_SPREAD = 1.1, 1.15, 1.35
# Items below this say nothing about rates; those of another shape below that are mostly what every run has in common.
SHORTEST_SECONDS, OTHER_SHORTEST_SECONDS = 0.05, 5.0
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
        """The correction of one item; that of the training steps for work of the model that was not measured."""
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
        return list(read_jsonl(folder / PAST_RUNS))
    except (OSError, RunError, UnicodeDecodeError):
        return []


def add_past_run(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a finished run; the oldest lines go. Raises RunError where the folder cannot be written."""
    json.dumps(row)
    write_jsonl(folder / PAST_RUNS, [*read_past_runs(folder)[1 - KEPT_LINES :], dict(row)])


def from_past_runs(rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Calibration:
    """Learn corrections from the runs of the same device and shape, or else of the same device.

    Args:
        rows: from `read_past_runs`.
        key: of the run to come.

    Returns:
        The calibration; that of the table where no run matches.
    """
    # Of other shapes only what took its time: a tiny model is all overhead.
    same = [row for row in rows if row.get("key") == dict(key)][-USED_RUNS:]
    device = [
        row for row in rows
        if all(row.get("key", {}).get(name) == key[name] for name in ("device", "threads"))
    ][-USED_RUNS:]
    chosen, shortest = (same, SHORTEST_SECONDS) if same else (device, OTHER_SHORTEST_SECONDS)
    factors: dict[str, float] = {}
    scatter = 1.0
    for item in {name for row in chosen for name in row["forecast"]}:
        ratios = [ratio for row in chosen if (ratio := _ratio(row, item, shortest)) is not None]
        if ratios and (same or item != MEMORY):
            factors[item] = statistics.median(ratios)
            if len(ratios) > 1 and item != MEMORY:
                scatter = max(scatter, max(ratios) / factors[item], factors[item] / min(ratios))
    if not factors:
        return Calibration()
    spread = max(PAST_SPREAD, min(scatter, OTHER_SPREAD)) if same else OTHER_SPREAD
    what = "of this shape" if same else "of other shapes"
    return Calibration(PAST, factors, spread, note=f"corrected by {len(chosen)} past run(s) {what} on this device")


def _ratio(row: Mapping[str, Any], item: str, shortest: float) -> float | None:
    """Actual over forecast of one item of a past run; None where it was too short to tell."""
    said, came = row["forecast"].get(item), row["actual"].get(item)
    if not said or not came or (item != MEMORY and said < shortest and came < shortest):
        return None
    return float(came) / float(said)
