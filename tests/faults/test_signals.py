"""Signals to a rank, to all of them or to the launcher: one agreed step, a checkpoint, an exit code meaning "again"."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import tiny_models
from tests.faults.test_workers import alive
from tests.processes import SCRIPT, Started, Warm, descendants, free_port, start
from tests.questions import questions
from vlm_sft.cli.main import main
from vlm_sft.common.artifacts import read_jsonl
from vlm_sft.distributed.heartbeat import HostWatch
from vlm_sft.distributed.launch import Launch
from vlm_sft.distributed.signals import resume_line
from vlm_sft.train.checkpoint.directory import checkpoint_problems

BIN = Path(sys.executable).parent
LONG = 100_000  # steps: no test waits for the end


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a training of a tiny model that goes on for hours if nobody stops it."""
    folder = tmp_path_factory.mktemp("signals")
    base = tiny_models.save("qwen2_5_vl", folder / "base")
    rows = []
    for seed in range(20):
        (folder / f"{seed}.png").write_bytes(questions(seed, 1)[0].images[0].load())
        rows += [{"image": f"{seed}.png", "question": s.question, "answer": s.target} for s in questions(seed, 2)]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--base_model",
        str(base),
        "--dataset",
        str(data),
        "--global_batch_size",
        "4",
        "--lora_r",
        "4",
        "--eval_benchmarks",
        "none",
        "--report_to",
        "none",
        "--logging_steps",
        "1",
        "--save_strategy",
        "no",
        "--eval_strategy",
        "no",
        "--cache_dir",
        str(folder / "cache"),
        "--load_best_model_at_end",
        "false",
        "--learning_rate",
        "1e-3",
        "--lr_scheduler_type",
        "constant",
    ]


def begin(warm: Warm, output: Path, line: list[str], *more: str) -> Started:
    """Start a training; each start has a log of its own."""
    log = output.parent / f"{output.name}-{time.monotonic_ns()}.log"
    return warm.start([*line, "--output_dir", str(output), *more], log)


def wait_for_step(output: Path, step: int, run: Started) -> None:
    until = time.monotonic() + 200
    while time.monotonic() < until:
        assert run.wait(0) is None, run.log.read_text()[-3000:]
        path = output / "metrics.jsonl"
        if path.is_file() and any(row["step"] >= step for row in read_jsonl(path)):
            return
        time.sleep(0.1)
    raise AssertionError("the training does not get there")


def ranks_of(pid: int) -> list[int]:
    """Process ids of the ranks below a launcher, first rank first."""
    found = {}
    for one in descendants(pid):
        environment = Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1])
        rank = next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)
        if rank is not None and found.get(rank, parent) == parent:
            found.setdefault(rank, one)
    return [found[rank] for rank in sorted(found)]


def stopped(output: Path, name: str) -> int:
    """Check what a stopped run left; returns the step of its checkpoint."""
    facts = json.loads((output / "run.json").read_text())
    assert facts["status"] == "interrupted"
    (checkpoint,) = output.glob("checkpoint-*")
    assert checkpoint_problems(checkpoint) == [], name
    return int(checkpoint.name.removeprefix("checkpoint-"))


def end(run: Started, seconds: float, grace: float = 5) -> tuple[int, str]:
    """Wait for the end, and for that of everything it started; returns the exit code and what was printed."""
    below = descendants(run.pid)
    code = run.wait(seconds)
    said = run.log.read_text()
    if code is None:
        run.kill()
        raise AssertionError(said[-3000:])
    until = time.monotonic() + grace
    while time.monotonic() < until and any(map(alive, below)):
        time.sleep(0.05)
    assert not any(map(alive, below)), said[-2000:]
    return code, run.log.read_text()


def test_stop_and_go_on(warm: Warm, line: list[str], tmp_path: Path) -> None:
    """SIGTERM to a training with workers; the line it names ends where an undisturbed run ends, bit for bit."""
    output = tmp_path / "run"
    first = begin(warm, output, line, "--max_steps", str(LONG), "--dataloader_num_workers", "1", "--resume", "auto")
    wait_for_step(output, 3, first)
    began = time.monotonic()
    os.killpg(first.pid, signal.SIGTERM)  # as a scheduler does: workers too
    code, said = end(first, 60)
    assert code == 75 and "Traceback" not in said, said[-2000:]
    assert time.monotonic() - began < 20
    step = stopped(output, "alone")
    trained = list(read_jsonl(output / "metrics.jsonl"))[-1]["time"]
    assert json.loads((output / "run.json").read_text())["seconds"]["train"] >= trained, "of the stage that was stopped"
    assert f"interrupted: stopped by SIGTERM after step {step}, with its checkpoint" in said
    assert f"--output_dir {output}" in said.split("go on with: ")[1] and "--resume auto" in said
    total = str(step + 3)
    code, said = end(begin(warm, output, line, "--max_steps", total, "--resume", "auto", "--allow_changes"), 120)
    assert code == 0, said[-3000:]
    steps = [row["step"] for row in read_jsonl(output / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, step + 4))
    assert end(begin(warm, tmp_path / "whole", line, "--max_steps", total), 120)[0] == 0
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once(second: int) -> None:
    code = (
        "import os, sys, time, signal\n"
        "from vlm_sft.distributed import signals\n"
        "signals.REPEAT_SECONDS = 0.3\n"
        "with signals.StopSignals('again', lambda: None) as stop:\n"
        "    with stop.at_step_end():\n"
        "        sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "        while True: time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGUSR1)
    run.send_signal(second)  # a launcher passes on what a rank has got already: one request
    time.sleep(1.0)
    assert run.poll() is None
    run.send_signal(second)
    _, said = run.communicate(timeout=10)
    assert run.returncode == 128 + second
    assert "saving after this step" in said


def test_before_the_training_a_signal_ends_the_run(warm: Warm, line: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = begin(warm, output, line, "--max_steps", "5")
    until = time.monotonic() + 100
    while not (output / "run.json").is_file() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    code, said = end(run, 60)
    assert code == 75 and "interrupted: stopped by SIGINT\n" in said, said[-2000:]
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert list(output.glob("checkpoint-*")) == []


@pytest.mark.parametrize("where", ["__enter__", "__exit__"])
def test_between_two_stages_a_signal_is_recorded(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def interrupted(self: HostWatch, *_: object) -> HostWatch | None:
        signal.raise_signal(signal.SIGTERM)
        return self if where == "__enter__" else None

    monkeypatch.setattr(HostWatch, where, interrupted)
    output = tmp_path / "run"
    assert main(["train", *line, "--output_dir", str(output), "--max_steps", "2"]) == 75
    assert "interrupted: stopped by SIGTERM" in capsys.readouterr().err
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_during_the_evaluation_loses_no_answer(warm: Warm, line: list[str], tmp_path: Path) -> None:
    def finished(name: str) -> list[dict[str, object]]:
        found = [tmp_path / name / "evaluation" / model / "demo_text" / "predictions.jsonl" for model in models]
        return [{key: row[key] for key in ("id", "prediction")} for path in found for row in read_jsonl(path)]

    def answered() -> int:
        parts = (tmp_path / "run" / "evaluation" / "base").glob("demo_text/predictions.rank*.jsonl")
        return sum(len(path.read_text().splitlines()) for path in parts)

    models = ("base", "tuned")
    wanted = [
        word if word != "none" or line[place - 1] != "--eval_benchmarks" else "demo_text"
        for place, word in enumerate(line)
    ]
    more = ("--max_steps", "2", "--max_eval", "120", "--tokens_per_pack", "1024")
    code, said = end(begin(warm, tmp_path / "whole", wanted, *more), 250)
    assert code == 0, said[-3000:]
    run = begin(warm, tmp_path / "run", wanted, *more)
    until = time.monotonic() + 200
    while not answered() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGTERM)
    code, said = end(run, 60)
    assert code == 75 and "interrupted: stopped by SIGTERM" in said, said[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert 0 < answered() < 120
    code, said = end(begin(warm, tmp_path / "run", wanted, *more, "--resume", "auto"), 250)
    assert code == 0, said[-3000:]
    assert finished("run") == finished("whole")


def port() -> str:
    return f"--master_port={free_port()}"


@pytest.mark.parametrize(
    "target, number", [("one rank", signal.SIGUSR1), pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_under_torchrun(target: str, number: int, line: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [str(BIN / "torchrun"), "--nproc_per_node=2", port(), str(SCRIPT), *line]
    run = start([*command, "--output_dir", str(output), "--max_steps", str(LONG)], tmp_path / "log")
    wait_for_step(output, 3, run)
    began = time.monotonic()
    os.kill(run.pid if target == "launcher" else ranks_of(run.pid)[1], number)
    code, said = end(run, 60)
    assert time.monotonic() - began < 30 and code != 0
    step = stopped(output, target)
    name = "SIGTERM" if target == "launcher" else "a signal to another rank"
    assert f"interrupted: stopped by {name} after step {step}, with its checkpoint" in said, said[-3000:]
    assert "go on with: torchrun --nproc_per_node=2" in said


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.slow
def test_under_deepspeed(line: list[str], tmp_path: Path) -> None:
    """`deepspeed` does not pass SIGTERM on: its ranks notice that it is gone."""
    output = tmp_path / "run"
    launcher = shutil.which("deepspeed", path=str(BIN)) or shutil.which("deepspeed")
    assert launcher is not None
    command = [launcher, "--num_gpus=2", port(), str(SCRIPT), *line]
    run = start([*command, "--output_dir", str(output), "--max_steps", str(LONG)], tmp_path / "log")
    wait_for_step(output, 3, run)
    os.kill(run.pid, signal.SIGTERM)
    code, said = end(run, 60, grace=60)
    assert code != 0
    step = stopped(output, "deepspeed")
    assert f"interrupted: stopped by SIGTERM after step {step}, with its checkpoint" in said, said[-3000:]
    assert "go on with: deepspeed --num_gpus=2" in said


def test_the_line_to_go_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Launch(0, 0, 1, True, None, "single")
    two = Launch(0, 0, 2, True, None, "ddp")
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["/bin/vlm-sft", "train", "--output_dir", "a b", "--overwrite_output_dir", "--resume"]
    assert resume_line(words, alone) == "vlm-sft train --output_dir 'a b' --resume auto"
    words = ["src/train.py", "--resume", "x/checkpoint-3", "--output_dir", "o"]
    assert resume_line(words, alone) == "python src/train.py --output_dir o --resume auto"
    words = ["src/train.py", "--local_rank=1", "--output_dir", "o", "--resume", "--seed", "3"]
    assert resume_line(words, two) == "deepspeed --num_gpus=2 src/train.py --output_dir o --seed 3 --resume auto"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_line(["t.py", "--seed", "3"], two) == "torchrun --nproc_per_node=4 t.py --seed 3 --resume auto"
