"""What past runs and the machine's rates teach a forecast: bounded, weighed, forgotten, and never believed at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_sft.common.artifacts import write_jsonl
from vlm_sft.forecast.calibration import (
    KEPT_LINES,
    LARGEST_FACTOR,
    MEMORY,
    OTHER_SPREAD,
    PAST,
    PAST_RUNS,
    PAST_SPREAD,
    TABLE,
    WIDEST_SPREAD,
    Calibration,
    add_past_run,
    from_past_runs,
    history_key,
    read_past_runs,
    settled_rates,
)
from vlm_sft.forecast.hardware import Rates
from vlm_sft.model.load import find_base
from vlm_sft.planning import device_rates
from vlm_sft.planning.device_rates import (
    MOST_UNREST,
    TimedCalls,
    call_seconds,
    measured_rates,
    rates_here,
    settled,
    unrest,
)
from vlm_sft.planning.run_setting import shape_of

KEY = history_key("cpu", 2, "shape", {"dtype": 4})
NOW = datetime(2026, 3, 1, tzinfo=UTC)
FORECAST = {"loading the model": 2.0, "training steps": 20.0, "final evaluation": 7.0}  # 29 s, as reported


def row(ratio: float, seconds: float = 29.0, days: float = 0.0, flops: float = 1e11, **more: Any) -> dict[str, Any]:
    """A past run that was forecast to take so many seconds, and took `ratio` times as long."""
    said = {item: value * seconds / 29.0 for item, value in FORECAST.items()}
    return {
        "key": KEY,
        "at": (NOW - timedelta(days=days)).isoformat(),
        "forecast": said | {MEMORY: 100.0},
        "actual": {item: value * ratio for item, value in said.items()} | {MEMORY: 150.0},
        "rates": {"flops": flops, "bandwidth": flops / 10, "launch": 1e12 / flops * 1e-7, "unrest": 1.0} | more,
    }


def corrected(found: Calibration) -> float:
    """The forecast of 29 s with its corrections."""
    return sum(value * found.factor(item) for item, value in FORECAST.items())


def test_past_runs_that_agree_are_followed(tmp_path: Path) -> None:
    for ratio in (2.0, 2.2, 2.1):
        add_past_run(tmp_path, row(ratio))
    rows = read_past_runs(tmp_path)
    found = from_past_runs(rows, KEY, NOW)
    assert found.basis == PAST and found.factors["training steps"] == pytest.approx(2.1, rel=0.08)
    assert found.factors[MEMORY] == pytest.approx(1.5, rel=0.05)
    assert found.spread == pytest.approx(PAST_SPREAD, rel=0.05)
    other = from_past_runs(rows, history_key("cpu", 2, "another", {"dtype": 4}), NOW)
    assert set(other.factors) == {"training steps", "final evaluation"}, "nothing short, and no memory"
    assert other.factors["training steps"] == pytest.approx(2.1, rel=0.08) and other.spread == OTHER_SPREAD
    assert from_past_runs(rows, history_key("gpu", 2, "shape", {}), NOW).factors == {}


@pytest.mark.parametrize("ratio", [125.0, 40.0, 1 / 60])
@pytest.mark.parametrize("seconds", [0.5, 2.0, 29.0])
@pytest.mark.parametrize("disturbed", [1.0, 4.0])
def test_two_slow_runs_ruin_no_forecast(ratio: float, seconds: float, disturbed: float) -> None:
    """Reported: two small runs beside other programs made the next forecast 1 h 02 min for 29 s."""
    rows = [row(ratio, seconds, unrest=disturbed), row(0.8 * ratio, seconds, unrest=disturbed)]
    found = from_past_runs(rows, KEY, NOW)
    assert 29.0 / LARGEST_FACTOR <= corrected(found) <= 29.0 * LARGEST_FACTOR
    if seconds <= 2.0 or disturbed > 1:
        assert 29.0 / 2 <= corrected(found) <= 29.0 * 2, "short or disturbed runs teach little"
    assert found.spread == WIDEST_SPREAD, "and the interval says that the machine has been seen like that"


def test_one_accident_among_sound_runs_is_passed_over() -> None:
    sound = [row(1.2), row(1.25), row(1.15)]
    usual = corrected(from_past_runs(sound, KEY, NOW))
    for place in range(4):
        rows = [*sound[:place], row(60.0), *sound[place:]]
        found = from_past_runs(rows, KEY, NOW)
        assert corrected(found) == pytest.approx(usual, rel=0.1)
        assert found.spread is not None and found.spread > PAST_SPREAD


def test_long_and_new_runs_count_for_more_than_short_and_old_ones() -> None:
    def learned(*rows: dict[str, Any]) -> float:
        return from_past_runs(rows, KEY, NOW).factors["training steps"]

    assert 1.0 < learned(row(2.0, 0.3)) < learned(row(2.0, 3.0)) < learned(row(2.0, 300.0)) < 2.0
    assert learned(row(2.0, days=400)) < 1.1 < 1.5 < learned(row(2.0))
    assert learned(row(0.7, 3000.0), row(1.5, 2.0)) < 1.0, "the long one decides"
    assert learned(row(2.5, days=90), row(1.1)) < 1.3, "the new one decides"
    assert learned(*[row(2.9)] * 5, *[row(1.0)] * 5) == pytest.approx(1.0), "only the newest ones are looked at"


def test_a_tiny_run_says_nothing_about_other_shapes() -> None:
    tiny = [row(5.0, 0.2)]
    assert from_past_runs(tiny, history_key("cpu", 2, "another", {}), NOW).basis == TABLE
    starved = [row(300.0, 0.2)]  # it took a minute, and is as small
    assert from_past_runs(starved, history_key("cpu", 2, "another", {}), NOW).basis == TABLE


def test_old_damaged_and_foreign_lines_are_read(tmp_path: Path) -> None:
    plain = {"key": KEY, "forecast": {"training steps": 20.0}, "actual": {"training steps": 30.0}}  # of older versions
    broken = [{}, {"key": KEY}, {"key": 1, "forecast": [], "actual": None}, {**plain, "at": 7}, {**plain, "at": "then"}]
    write_jsonl(tmp_path / PAST_RUNS, [*broken, plain])
    rows = read_past_runs(tmp_path)
    assert len(rows) == 3
    assert 1.3 < from_past_runs(rows, KEY, NOW).factors["training steps"] < 1.5
    for _ in range(3):
        add_past_run(tmp_path, plain)
    assert len(read_past_runs(tmp_path)) == 6 < KEPT_LINES


def rates(flops: float) -> Rates:
    return Rates("cpu", flops, flops / 10, 1e-6, 1, False, "measured", 1.35)


def test_the_rate_now_goes_before_those_of_the_past() -> None:
    slow = [row(1.0, flops=2.5e9), row(1.0, flops=2.5e9)]  # 40 times slower, when other programs ran
    assert settled_rates(slow, KEY, rates(1e11)) == rates(1e11)
    assert settled_rates([row(1.0, flops=4e12)], KEY, rates(1e11)) == rates(1e11)
    assert settled_rates([], KEY, rates(1e11)) == rates(1e11)
    assert settled_rates([row(1.0, flops=1.2e11, unrest=3.0)], KEY, rates(1e11)) == rates(1e11)
    # What differs as little as two measurements do is steadied.
    near = [row(1.0, flops=value) for value in (1.1e11, 1.2e11, 1.15e11)]
    assert settled_rates(near, KEY, rates(1e11)).flops == 1.15e11
    assert settled_rates(near, history_key("cpu", 2, "another", {}), rates(1e11)) == rates(1e11)


def timed(typical: float, share: float = 1.0, count: int = 40, waits: float = 0.0) -> TimedCalls:
    """Calls of a round: one in four takes `waits` longer, one in ten is quick."""
    seconds = [typical + (waits if index % 4 == 0 else 0.0) for index in range(count)]
    return TimedCalls((*seconds, *[0.8 * typical] * (count // 8)), share)


def test_a_rate_is_believed_when_two_free_rounds_agree() -> None:
    assert not settled([timed(1.0)]) and settled([timed(1.0), timed(1.05)])
    assert not settled([timed(3.0), timed(1.0)]), "threads that had just been started"
    assert settled([timed(3.0), timed(1.0), timed(1.0)])
    assert not settled([timed(1.0, share=0.4), timed(1.0, share=0.4)]), "it is starved each time"
    assert not settled([timed(1.0), timed(1.0, share=0.4)])
    assert call_seconds([timed(3.0), timed(1.0), timed(1.1)]) == 1.0 and unrest([timed(3.0), timed(1.0)]) == 1.0


def test_a_busy_machine_is_measured_by_its_quickest_calls_and_says_so() -> None:
    """Reported: without a history a loaded machine said 2 h 40 min for what takes 1 min."""
    busy = [timed(160.0, 0.05), timed(90.0, 0.1, waits=300.0), timed(1.25, 0.5, waits=40.0)]
    assert call_seconds(busy) == 1.0
    assert unrest(busy) == MOST_UNREST
    assert call_seconds([*busy, timed(1.1)]) == 1.1 and unrest([*busy, timed(1.1)]) == 1.0
    assert call_seconds([TimedCalls((40.0, 45.0, 35.0), 0.05)] * 3) == pytest.approx(2.0), (
        "each of few calls was interrupted"
    )
    assert 1.0 < unrest([timed(1.25, 0.6, waits=1.0)]) < 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU of the table is not measured")
def test_a_measurement_holds_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(find_base("pocket"))
    first = rates_here(shape, torch.float32)
    assert rates_here(shape, torch.float32) is first
    monkeypatch.setattr(device_rates, "FRESH_SECONDS", 0.0)
    assert rates_here(shape, torch.float32) is not first


def test_this_machine_is_measured_beside_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real measurement, with four busy programs a core beside it."""
    monkeypatch.setattr(device_rates, "PIECE_SECONDS", 0.03)
    monkeypatch.setattr(device_rates, "PAUSE_SECONDS", 0.1)
    shape = shape_of(find_base("pocket"))
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.5)
        (busy,) = measured_rates(shape, torch.float32)
    finally:
        for one in others:
            one.kill()
            one.wait()
    (free,) = measured_rates(shape, torch.float32)
    assert busy.unrest > 1.0
    assert 0.4 < busy.flops / free.flops < 2.5, (busy, free)
