"""Images and processes that fail while the training reads: named, replaced or the end, and never a zombie or a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import training
from tests.questions import PROMPT, questions
from vlm_sft.common.errors import DataError
from vlm_sft.data import images, workers
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.loader import StepDataset, StepLoader
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.planning.training_run import FaultPolicy

ROOT = Path(__file__).resolve().parents[2]


def stored(folder: Path, count: int = 8, each: int = 2) -> list[Sample]:
    """Questions about images that lie in files and are read for every step."""
    found = []
    for seed in range(count):
        for sample in questions(seed, each):
            path = folder / f"{seed}.png"
            path.write_bytes(sample.images[0].load())
            ref = ImageRef(sample.images[0].key, str(path), path.read_bytes)
            found.append(Sample(sample.id, "tiny", "", (ref,), sample.question, sample.target, sample.answers))
    return found


def loader(data: PreparedData, count: int, replace_bad: bool = False) -> StepLoader:
    planner = EpochPlanner(data.lengths, 4, 1000, 1, seed=1)
    return StepLoader(StepDataset(data, planner, 0, replace_bad), count)


def asked(step: Any) -> list[str]:
    return [name for pack in step.packs for name in pack.sample_ids]


def test_workers_give_what_the_process_itself_gives(tmp_path: Path) -> None:
    data = training.prepared(stored(tmp_path))
    alone, helped = list(loader(data, 0)), loader(data, 2)
    assert len(alone) == 4
    for _ in range(2):  # a second epoch starts new workers
        for one, other in zip(alone, helped, strict=True):
            for mine, theirs in zip(one.packs, other.packs, strict=True):
                assert torch.equal(mine.input_ids, theirs.input_ids) and mine.sample_ids == theirs.sample_ids
                assert torch.equal(mine.tensors[0]["pixel_values"], theirs.tensors[0]["pixel_values"])
    helped.start_at(2)
    assert [asked(step) for step in helped] == [asked(step) for step in alone[2:]]


@pytest.mark.parametrize("count", [0, 2])
def test_an_image_that_became_unreadable(count: int, tmp_path: Path) -> None:
    data = training.prepared(stored(tmp_path))
    (tmp_path / "3.png").write_bytes(b"")
    faults = [fault for step in loader(data, count) for fault in step.faults]
    assert all(fault.fatal and fault.sample_ids[0].startswith("picture 3/") for fault in faults)
    assert "3.png: the image is empty (0 bytes)" in faults[0].reason
    steps = list(loader(data, count, replace_bad=True))
    replaced = [fault for step in steps for fault in step.faults]
    assert sum(len(fault.sample_ids) for fault in replaced) == 2 and not any(fault.fatal for fault in replaced)
    named = [name for step in steps for name in asked(step)]
    assert len(named) == 16 and not any(name.startswith("picture 3/") for name in named)
    for fault in replaced:
        assert set(fault.replaced_by) <= set(named) and len(fault.replaced_by) == len(fault.sample_ids)
    again = [fault for step in loader(data, count, replace_bad=True) for fault in step.faults]
    assert again == replaced  # the same ones each time


@pytest.mark.parametrize("replace_bad", [False, True])
def test_a_training_stops_or_goes_on(replace_bad: bool, tmp_path: Path) -> None:
    data = training.prepared(stored(tmp_path))
    (tmp_path / "5.png").unlink()
    made = training.trainer(data, tmp_path, policy=FaultPolicy(replace_bad=replace_bad), max_steps=4, seed=3)
    if not replace_bad:
        with pytest.raises(DataError, match="5.png.* No such file.*picture 5/") as caught:
            made.run()
        assert "--on_bad_sample replace" in str(caught.value)
        assert [event["action"] for event in training.events(tmp_path)] == ["stop"]
        return
    made.run()
    found = training.events(tmp_path)
    assert found and {(event["kind"], event["action"]) for event in found} == {("unreadable_image", "replaced")}
    assert all(len(event["replaced_by"]) == event["samples"] for event in found)
    assert made.state.global_step == 4


def test_the_loss_counts_what_was_trained(tmp_path: Path) -> None:
    data = training.prepared(stored(tmp_path))
    (tmp_path / "2.png").write_bytes(b"no picture")
    for step in loader(data, 0, replace_bad=True):
        assert step.supervised + step.change == sum(len(pack.targets) for pack in step.packs)


def test_a_killed_worker_is_replaced(tmp_path: Path, others: set[int]) -> None:
    data = training.prepared(stored(tmp_path, count=24))  # more than the workers have done at the kill
    expected = [asked(step) for step in loader(data, 0)]
    steps, found = loader(data, 2), []
    for number, step in enumerate(iter(steps)):
        found.append(step)
        if number == 0:
            (victim, *_) = sorted(children() - others)
            os.kill(victim, signal.SIGKILL)
    assert [asked(step) for step in found] == expected
    (fault,) = [fault for step in found for fault in step.faults]
    assert fault.kind == "worker_died" and "killed by SIGKILL" in fault.reason and not fault.fatal
    assert children() <= others


@pytest.fixture
def others() -> set[int]:
    """Children that are no data workers: other tests keep a warm process for the runs that they start."""
    return children()


def children() -> set[int]:
    """Process ids of this process's children that are alive."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = {int(one): Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in found}
    return {one for one, state in names.items() if state != "Z"}


SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


class Trap:
    """Reads an image as a bad disk does: it kills the process that asks, or never answers."""

    def __init__(self, data: bytes, how: str) -> None:
        self.data, self.how, self.parent = data, how, os.getpid()

    def __call__(self) -> bytes:
        if os.getpid() != self.parent:
            if self.how in SIGNALS:
                os.kill(os.getpid(), SIGNALS[self.how])
            time.sleep(600)
        return self.data


def trapped(folder: Path, how: str) -> PreparedData:
    found = stored(folder)
    bad = [sample for sample in found if sample.id.startswith("picture 4/")]
    trap = Trap(bad[0].images[0].load(), how)
    refs = {id(sample): ImageRef(sample.images[0].key, sample.images[0].source, trap) for sample in bad}
    return training.prepared(
        [Sample(s.id, "tiny", "", (refs.get(id(s), s.images[0]),), s.question, s.target, s.answers) for s in found]
    )


@pytest.mark.parametrize(
    "how, kind",
    [("kill", "worker_died"), ("hang", "worker_hung"), ("freeze", "worker_hung"), ("read", "unreadable_image")],
)
@pytest.mark.parametrize("replace_bad", [False, True])
def test_an_image_that_takes_its_worker_down(
    how: str, kind: str, replace_bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: set[int]
) -> None:
    data = trapped(tmp_path, how)
    monkeypatch.setattr(workers, "HANG_SECONDS", 1.5 if how in ("hang", "freeze") else 60.0)
    monkeypatch.setattr(images, "READ_SECONDS", 0.5 if how == "read" else 60.0)
    began = time.monotonic()
    found = []
    for step in loader(data, 2, replace_bad):
        found.append(step)
        if any(fault.fatal for fault in step.faults):
            break
    assert time.monotonic() - began < 20
    faults = [fault for step in found for fault in step.faults]
    assert faults[0].kind == kind and faults[0].sample_ids[0].startswith("picture 4/")
    if replace_bad:
        assert faults[-1].replaced_by and len(found) == 4
        assert not any(name.startswith("picture 4/") for step in found for name in asked(step))
    else:
        assert faults[-1].fatal and len(found) <= 4
        deaths = sum(fault.kind == "worker_died" for fault in faults)
        assert deaths == (2 if how == "kill" else 0)  # one that died is tried once more
    assert children() <= others


def test_a_mistake_in_a_worker_comes_back_as_itself(
    tmp_path: Path, others: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = training.prepared(stored(tmp_path))
    monkeypatch.setattr(data.cache, "image_tensors", lambda sample: 1 / 0)
    with pytest.raises(RuntimeError, match="in a data worker(.|\n)*ZeroDivisionError"):
        list(loader(data, 1))
    assert children() <= others


ORPHANS = """
import os, sys, time
from vlm_sft.data.workers import WorkerPool
import torch
class Steps:
    slot, bad, at = 0, {}, torch.full((2, 2), -1.0, dtype=torch.float64).share_memory_()
    def __getitem__(self, index):
        if index == 1:
            time.sleep(600)
        return index
pool = WorkerPool(Steps(), range(4), 2)
sys.stdout.write(" ".join(str(w.process.pid) for w in pool._workers) + chr(10)); sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_workers_end_with_a_killed_training() -> None:
    """SIGKILL of the training, while one worker is idle and another hangs."""
    main = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    pids = [int(word) for word in main.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGTERM)  # a scheduler signals every process of a job: workers leave that to the training
    time.sleep(0.3)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    main.kill()
    main.wait()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_file_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "READ_SECONDS", 0.2)
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    ref = ImageRef("k" * 64, str(pipe), pipe.read_bytes)
    with pytest.raises(DataError, match="a.png: .*0.2 s"):
        images.read_bytes(ref)
    with pytest.raises(DataError, match="nothing came"):
        Encoder(training.tiny_models.build("qwen2_5_vl")[1], PROMPT).process_images(
            Sample("d/1", "d", "", (ref,), "q", "a", ("a",))
        )
