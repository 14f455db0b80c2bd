"""State files, manifests, rotation, cleaning up, the lock: what a checkpoint is made of, without a training."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import environment
from tests.wording import line_with
from vlm_sft.common.errors import RunError
from vlm_sft.common.manifest import folder_problems, write_manifest
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.planning.fingerprint import differences
from vlm_sft.train.checkpoint.directory import (
    begin_checkpoint,
    checkpoint_problems,
    checkpoints,
    choose_resume,
    publish,
    rotate,
    tidy,
)
from vlm_sft.train.checkpoint.serialization import load_state, random_state, save_state, set_random_state
from vlm_sft.train.run_folder import RunLock


def made(folder: Path, step: int) -> Path:
    """A checkpoint as the trainer makes it."""
    partial = begin_checkpoint(folder, step, 0)
    (partial / "weights.safetensors").write_bytes(bytes(range(100)))
    write_manifest(partial, None, {"step": step})
    return publish(partial)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "SGD"])
def test_optimizer_and_schedule_go_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    def begin() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(model: Any, optimizer: Any, schedule: Any) -> None:
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    whole, other = begin(), begin()
    for _ in range(3):
        step(*whole)
    save_state(tmp_path / "state.safetensors", [part.state_dict() for part in whole[1:]])
    other[0].load_state_dict(whole[0].state_dict())
    for part, state in zip(other[1:], load_state(tmp_path / "state.safetensors"), strict=True):
        part.load_state_dict(state)
    for _ in range(3):
        step(*whole)
        step(*other)
    assert all(torch.equal(*pair) for pair in zip(whole[0].parameters(), other[0].parameters(), strict=True))


def test_state_keeps_bits_and_types(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    value = {
        0: shared,
        "view": shared[1:],
        "t": (1, [None, True], 0.1),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "nan": math.nan,
        "low": -math.inf,
        "array": np.arange(3, dtype=np.uint32),
        "n": np.int64(3),
    }
    save_state(tmp_path / "a.safetensors", value)
    found = load_state(tmp_path / "a.safetensors")
    assert list(found) == list(value) and found["t"] == (1, [None, True], 0.1) and found["n"] == 3
    assert torch.equal(found[0], shared) and torch.equal(found["view"], shared[1:])
    assert found["half"].dtype == torch.bfloat16 and found["half"].shape == ()
    assert math.isnan(found["nan"]) and found["low"] == -math.inf
    assert found["array"].dtype == np.uint32 and found["array"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="type object"):
        save_state(tmp_path / "b.safetensors", {"x": object()})


def test_random_numbers_go_on(tmp_path: Path) -> None:
    save_state(tmp_path / "random.safetensors", random_state())
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    set_random_state(load_state(tmp_path / "random.safetensors"))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


def test_the_newest_that_verifies_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4, 10):
        made(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    (tmp_path / "checkpoint-10" / "weights.safetensors").unlink()
    assert choose_resume(tmp_path, "auto") == tmp_path / "checkpoint-4"
    assert line_with(capsys.readouterr().err, "checkpoint-10 ", "weights.safetensors is missing")
    with pytest.raises(RunError, match="weights.safetensors is missing"):
        choose_resume(tmp_path, str(tmp_path / "checkpoint-10"))
    with pytest.raises(RunError, match="no checkpoint folder"):
        choose_resume(tmp_path, str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-5")
    assert checkpoint_problems(tmp_path / "checkpoint-5") == ["its manifest is of another step"]
    assert choose_resume(tmp_path, "auto") == tmp_path / "checkpoint-2"


def test_a_pickle_that_is_not_listed_is_a_stranger(tmp_path: Path) -> None:
    folder = made(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    assert checkpoint_problems(folder) == []
    (folder / "mp_rank_00_optim_states.pt").write_bytes(b"evil")
    assert folder_problems(folder) == ["mp_rank_00_optim_states.pt is not in its manifest"]


def test_rotation_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        made(tmp_path, step)
        rotate(tmp_path, 2, {1, step})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    rotate(tmp_path, 1, {1, 4})
    assert len(checkpoints(tmp_path)) == 2
    rotate(tmp_path, None, set())
    assert len(checkpoints(tmp_path)) == 2


def test_what_a_crash_leaves_is_put_in_order(tmp_path: Path) -> None:
    made(tmp_path, 2)
    made(tmp_path, 4).rename(tmp_path / "checkpoint-4.replaced")
    made(tmp_path, 6).rename(tmp_path / "checkpoint-6.removed")
    begin_checkpoint(tmp_path, 8, 0)
    (tmp_path / ".run.json.x.tmp").write_text("{")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert checkpoint_problems(tmp_path / "checkpoint-4") == []


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="are free, and it takes about"):
        begin_checkpoint(tmp_path, 2, 10**18)
    assert list(tmp_path.iterdir()) == []


LOCK = """
import os, sys, time
from pathlib import Path
from vlm_sft.train.run_folder import RunLock
with RunLock(Path(sys.argv[1])):
    child = os.fork()  # as a worker of the loader, which outlives a killed parent for a while
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path)], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunError, match=f"another run: process {holder.pid} on .* since 20"), RunLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with RunLock(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_whose_file_was_taken_away_keeps_others_out(tmp_path: Path) -> None:
    """A start that failed takes its file away while it holds the lock."""
    with RunLock(tmp_path):
        (tmp_path / ".lock").unlink()
        with RunLock(tmp_path), pytest.raises(RunError, match="in use"), RunLock(tmp_path):
            pass


def test_a_folder_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path):
        assert "a second run could write" in capsys.readouterr().err


def test_seeking_in_a_million_questions_takes_a_moment() -> None:
    planner = EpochPlanner((GroupLengths(300, (30,), (4,)),) * 1_000_000, 64, 4096, 1, 42)
    seconds = []
    for epoch in range(3):  # the best of three: other programs slow a machine down, and none speeds it up
        began = time.process_time()
        step = planner.step_of(planner.batches(epoch)[12_345])
        seconds.append(time.process_time() - began)
        assert step.questions == 64
    assert min(seconds) < 10.0  # where others share a core, CPU time grows too


def test_an_identity_is_compared_by_what_both_versions_wrote() -> None:
    now = {"base_model": "b", "base_settings_sha256": "1", "base_weights": "2", "data_sha256": "3"}
    assert differences(now, now) == []
    for key, part in (
        ("base_settings_sha256", "base model"),
        ("base_weights", "base model"),
        ("data_sha256", "training"),
    ):
        (line,) = differences(now | {key: "other"}, now)
        assert line.startswith(part)
    older = {"base_model": "b", "base_model_sha256": "of another kind", "base_weights": "2", "data_sha256": "3"}
    assert differences(older, now) == []
