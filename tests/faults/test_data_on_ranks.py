"""Images and data workers that fail on one of two ranks: both follow the policy, in a minute; none waits for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.harness import arguments, metrics
from tests.faults.injection import Fault, Injected, layer
from tests.processes import Warm, start_ranks
from vlm_sft.train.checkpoint.directory import checkpoint_problems, checkpoints

STEPS = 4
BAD = "5.png"
LIMIT = 60.0  # seconds from the fault to the end, or to the step after it
# Of a tenth of the real length: a worker that has been at one image for so long counts as hung.
SHORT = {"vlm_sft.data.workers:HANG_SECONDS": 5.0}
FAULTS = {
    "unreadable": (Fault("read", f"*/{BAD}", rank="1", place="worker"), "unreadable_image", "Input/output error"),
    "killed": (Fault("read", f"*/{BAD}", "kill", rank="1", place="worker"), "worker_died", "killed by SIGKILL"),
    "hung": (Fault("read", f"*/{BAD}", "stop", rank="1", place="worker"), "worker_hung", "has been at one image for"),
}


def flags(place: Path, output: Path, policy: str) -> list[str]:
    """A training that reads its images again for each step, in one worker a rank."""
    found = arguments(
        place,
        output,
        "--max_steps",
        str(STEPS),
        "--logging_steps",
        "1",
        "--prepared_cache",
        "off",
        "--feature_cache",
        "off",
        "--dataloader_num_workers",
        "1",
        "--on_bad_sample",
        policy,
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
    )
    at = found.index("--eval_samples")
    return found[:at] + found[at + 2 :]


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "anomalies.jsonl").read_text().splitlines()]


def on_two_ranks(warm: Warm, place: Path, folder: Path, name: str, policy: str) -> tuple[list[int | None], str, float]:
    """Run with a fault on rank 1; exit codes, what was said, seconds from the fault to the end."""
    folder.mkdir(exist_ok=True)
    faults, log = Injected(folder / "faults", FAULTS[name][0]), folder / "log"
    ranks = warm.start_ranks(flags(place, folder / "run", policy), log, faults.variables, SHORT)
    while not faults.met[0] and ranks[0].wait(0.02) is None:
        pass
    began = time.monotonic()
    codes = [rank.wait(max(1.0, began + LIMIT - time.monotonic())) for rank in ranks]
    seconds = time.monotonic() - began
    for rank, code in zip(ranks, codes, strict=True):
        if code is None:
            rank.kill()
    return codes, log.read_text(), seconds


def replaced(warm: Warm, place: Path, name: str) -> Path:
    """The run under "replace" with one of the faults."""
    folder = place / f"two ranks, {name}"
    if not folder.is_dir():
        codes, told, seconds = on_two_ranks(warm, place, folder, name, "replace")
        assert codes == [0, 0] and "Traceback" not in told, told[-3000:]
        assert seconds < LIMIT
    return folder / "run"


@pytest.mark.parametrize("name", ["hung", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unreadable", "killed"))])
def test_under_replace_both_ranks_train_another_sample(name: str, injected_warm: Warm, injected_place: Path) -> None:
    output, (_, kind, reason) = replaced(injected_warm, injected_place, name), FAULTS[name]
    told = (output.parent / "log").read_text()
    found = events(output)
    assert found[0]["kind"] == kind and reason in found[0]["detail"] and reason in told
    assert {event["rank"] for event in found} == {1}
    exchanged = [event for event in found if event["action"] == "replaced"]
    assert exchanged and all(event["replaced_by"] for event in exchanged)
    assert json.loads((output / "run.json").read_text())["steps"] == STEPS
    assert [row["step"] for row in metrics(output) if "loss" in row] == list(range(1, STEPS + 1))
    assert [checkpoint_problems(path) for path in checkpoints(output)] == [[], []]


def test_two_ranks_take_the_step_that_one_takes(injected_warm: Warm, injected_place: Path) -> None:
    """The image fails for the only rank of another run: the adapter is the same up to rounding."""
    both = replaced(injected_warm, injected_place, "hung")
    folder = injected_place / "alone"
    faults = Injected(folder / "faults", Fault("read", f"*/{BAD}", place="worker"))
    output, log = folder / "run", folder / "log"
    run = injected_warm.start(flags(injected_place, output, "replace"), log, faults.variables)
    assert run.wait(120) == 0, log.read_text()[-2000:]
    alone, two = (
        sorted((e["step"], *e["sample_ids"], *e["replaced_by"]) for e in events(one) if e["action"] == "replaced")
        for one in (output, both)
    )
    assert alone == two != []  # rank 1 had all of the image's questions: only then are these the same steps
    one, other = (load_file(run / "adapter_model.safetensors") for run in (output, both))
    assert max(float((one[name] - tensor).abs().max()) for name, tensor in other.items()) < 1e-5
    assert all(tensor.any() for tensor in one.values())


@pytest.mark.slow
def test_whatever_the_fault_is_the_steps_are_the_same(injected_warm: Warm, injected_place: Path) -> None:
    outputs = [replaced(injected_warm, injected_place, name) for name in FAULTS]
    assert len({(output / "adapter_model.safetensors").read_bytes() for output in outputs}) == 1
    rows = [metrics(output) for output in outputs]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("unreadable", "hung")), "killed"])
def test_under_stop_both_ranks_end(name: str, injected_warm: Warm, injected_place: Path, tmp_path: Path) -> None:
    _, kind, reason = FAULTS[name]
    codes, told, seconds = on_two_ranks(injected_warm, injected_place, tmp_path / name, name, "stop")
    assert codes == [2, 2] and "Traceback" not in told, (codes, told[-3000:])
    assert seconds < LIMIT
    output = tmp_path / name / "run"
    (*_, last) = events(output)
    assert (last["kind"], last["action"], last["rank"]) == (kind, "stop", 1)
    error = next(line for line in told.splitlines() if line.startswith("error: "))
    assert reason in error and last["sample_ids"][0] in error
    assert json.loads((output / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_worker_that_dies_once_changes_nothing(injected_warm: Warm, injected_place: Path, tmp_path: Path) -> None:
    outputs = []
    for name, count in (("dies", 1), ("lives", 0)):
        fault = Fault("read", f"*/{BAD}", "kill", count=count, rank="1", place="worker")
        faults, output = Injected(tmp_path / name, fault), tmp_path / name / "run"
        line = flags(injected_place, output, "stop")
        ranks = injected_warm.start_ranks(line, tmp_path / "log", faults.variables)
        assert [rank.wait(120) for rank in ranks] == [0, 0], (tmp_path / "log").read_text()[-3000:]
        assert faults.met[0] > count
        outputs.append(output)
    (event,) = events(outputs[0])
    assert (event["kind"], event["action"], event["rank"]) == ("worker_died", "tried again", 1)
    one, other = ((output / "adapter_model.safetensors").read_bytes() for output in outputs)
    assert one == other and metrics(outputs[0]) == metrics(outputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("policy", ["stop", "replace"])
def test_under_torchrun_and_with_the_real_patience(
    name: str, policy: str, injected_place: Path, tmp_path: Path
) -> None:
    faults, log, output = Injected(tmp_path / "faults", FAULTS[name][0]), tmp_path / "log", tmp_path / "run"
    run = start_ranks(flags(injected_place, output, policy), log, layer(tmp_path) | faults.variables)
    while not faults.met[0] and run.wait(0.02) is None:
        pass
    began = time.monotonic()
    while not (output / "anomalies.jsonl").is_file() and run.wait(0.05) is None:
        pass
    assert time.monotonic() - began < LIMIT
    code = run.wait(LIMIT)
    told = log.read_text()
    assert code == (0 if policy == "replace" else 1), told[-3000:]
    (*_, last) = events(output)
    assert FAULTS[name][2] in told and last["sample_ids"][0] in told and last["rank"] == 1
    if policy == "stop":
        assert told.count("error: step ") == 2  # both ranks say so
