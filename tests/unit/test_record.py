"""run.json of a run: the seconds of its stages, of those that break off too."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vlm_sft.common import artifacts
from vlm_sft.common.record import RunRecord


def seconds(record: RunRecord) -> dict[str, float]:
    return artifacts.read_json(record.path)["seconds"]


def test_a_stage_counts_however_it_ends(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {})
    with record.timed("data"):
        time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt), record.timed("train"):
        time.sleep(0.02)
        record.update(steps=1)
        so_far = seconds(record)["train"]
        time.sleep(0.02)
        raise KeyboardInterrupt
    record.finish("interrupted")
    found = seconds(record)
    assert found.keys() == {"data", "train"} and found["data"] >= 0.02
    assert so_far >= 0.02 and found["train"] >= so_far + 0.02
    time.sleep(0.02)
    with record.timed("train"):
        pass
    assert found["train"] <= seconds(record)["train"] < found["train"] + 0.02, "parts of one stage add up"


def test_a_signal_that_ends_the_process_leaves_the_time_of_its_stage(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {})
    with record.timed("train"):
        time.sleep(0.02)
        record.finish("interrupted")
        assert seconds(record)["train"] >= 0.02
