"""Two machines: the same adapter as one, and an end in bounded time when one of them is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.harness import make_place
from tests.processes import ROOT, Warm, free_port
from tests.two_hosts import TwoHosts, await_file, two_hosts

STEPS = 8
LONG = "5000"  # steps of a training that is to be cut off
SILENCE = "4"  # seconds


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        with two_hosts() as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def flags(place: Path, output: Path, steps: str, save_steps: str = "2") -> list[str]:
    return [
        "--base_model",
        str(place / "model"),
        "--dataset",
        str(place / "data"),
        "--output_dir",
        str(output),
        "--cache_dir",
        str(place / "cache"),
        "--max_steps",
        steps,
        "--save_steps",
        save_steps,
        "--eval_strategy",
        "no",
        "--logging_steps",
        "1",
        "--global_batch_size",
        "5",
        "--learning_rate",
        "0.01",
        "--lora_dropout",
        "0.1",
        "--save_total_limit",
        "2",
        "--load_best_model_at_end",
        "false",
        "--eval_benchmarks",
        "none",
        "--report_to",
        "none",
        "--ignore_forecast",
    ]


def test_two_hosts_give_the_adapter_of_one(hosts: TwoHosts, place: Path, warm: Warm, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = ["--sft_config", str(ROOT / "configs" / "sft_config_smoketest.json")]  # of the script of the hosts
    alone = warm.start_both([*recipe, *flags(place, one, str(STEPS))], tmp_path / "one.log")
    assert alone.wait(200) == 0, (tmp_path / "one.log").read_text()[-3000:]
    port = free_port()
    logs = [tmp_path / f"{index}.log" for index in (0, 1)]
    both = [hosts.torchrun(index, flags(place, two, str(STEPS)), logs[index], port) for index in (0, 1)]
    assert [process.wait(200) for process in both] == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    facts = json.loads((two / "run.json").read_text())
    assert (facts["status"], facts["world_size"], facts["steps"]) == ("finished", 2, STEPS)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys() and all(tensor.abs().max() > 0 for tensor in found.values())
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-5


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_a_lost_host_ends_the_job_and_it_can_be_resumed(how: str, hosts: TwoHosts, place: Path, tmp_path: Path) -> None:
    output, port = tmp_path / "run", free_port()
    logs = [tmp_path / f"{index}.log" for index in (0, 1)]
    both = [
        hosts.torchrun(index, flags(place, output, LONG), logs[index], port, VLM_SFT_HOST_SECONDS=SILENCE)
        for index in (0, 1)
    ]
    assert await_file(output / "checkpoint-4", both, 200), "\n".join(log.read_text()[-2000:] for log in logs)
    began = time.monotonic()
    try:
        if how == "killed":
            hosts.kill(both[1])
        else:
            hosts.cut(1)
        code = both[0].wait(60)
    finally:
        if how == "unplugged":
            hosts.mend(1)
    said = logs[0].read_text()
    assert code not in (0, None) and time.monotonic() - began < 45, said[-3000:]
    reason = "has ended without a word" if how == "killed" else "nothing was heard of"
    assert f"interrupted: {reason}" in said or (how == "killed" and reason in said), said[-3000:]
    assert "(10.77.0.2, rank 1)" in said and "--resume auto" in said and "--nnodes=2" in said
    assert both[1].wait(60) not in (0, None)  # a host that is cut off ends too
    facts = json.loads((output / "run.json").read_text())
    assert facts["status"] == "interrupted" and any(reason in note for note in facts["notes"])
    if how == "unplugged":  # the other way leaves the same folder
        assert_it_goes_on(hosts, place, output, logs)


def assert_it_goes_on(hosts: TwoHosts, place: Path, output: Path, logs: list[Path]) -> None:
    """Both hosts resume a run that was cut off."""
    step = max(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*") if path.name[-1].isdigit())
    more = [*flags(place, output, str(step + 2)), "--allow_changes"]
    port = free_port()
    again = [hosts.torchrun(index, more, logs[index], port) for index in (0, 1)]
    assert [process.wait(200) for process in again] == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    facts = json.loads((output / "run.json").read_text())
    assert (facts["status"], facts["steps"]) == ("finished", step + 2) and facts["resumes"][-1]["step"] == step


def test_the_slurm_script_queues_an_interrupted_run_again(tmp_path: Path) -> None:
    """The script with stand-ins for Slurm's own commands, which are not here."""
    import os
    import subprocess

    tools, output = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    output.mkdir()
    words = {
        "srun": 'echo "srun $*"; echo "{\\"status\\": \\"$STATUS\\"}" > "' + str(output) + '/run.json"; exit "$CODE"',
        "scontrol": 'if [[ "$1" == show ]]; then echo node-1; echo node-2; else echo "scontrol $*"; fi',
    }
    for name, body in words.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def job(status: str, code: int, restarts: int = 0) -> tuple[int, str]:
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "STATUS": status,
            "CODE": str(code),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        script = ["bash", str(ROOT / "examples" / "clusters" / "slurm.sbatch"), str(output), "--base_model", "pocket"]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, said = job("interrupted", 1)
    assert code == 0 and "scontrol requeue 7" in said and f"--output_dir {output} --base_model pocket" in said
    assert "scontrol requeue 7" in job("running", 1)[1]  # the first machine died: nobody wrote the end down
    assert job("finished", 0)[0] == 0 and "requeue" not in job("finished", 0)[1]
    assert job("failed", 1)[0] == 1 and "requeue" not in job("failed", 1)[1]
    assert job("interrupted", 1, restarts=20)[0] == 1
