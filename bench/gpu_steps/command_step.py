"""The public command on this device: train, stop, resume, export, answers; every launcher; questions a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import shapes
import throughput
from gpu_steps.context import Context
from peers.environment import ready
from vlm_sft.common import artifacts
from vlm_sft.common.errors import InterruptedRunError

STEPS, EVERY, BATCH, QUESTIONS = 6, 3, 8, 64
PEER = "msswift"  # measured beside this package where its environment lies in the work folder
TAIL = 6  # lines of a log that are kept of a command that failed
COMMON = [
    "--prompt_template",
    "{question}",
    "--logging_steps",
    "1",
    "--global_batch_size",
    str(BATCH),
    "--eval_strategy",
    "steps",
    "--eval_steps",
    str(EVERY),
    "--save_strategy",
    "steps",
    "--save_steps",
    str(EVERY),
    "--flash_attn",
    "--learning_rate",
    "1e-4",
    "--warmup_ratio",
    "0",
    "--max_steps",
    str(STEPS),
]
LAUNCHES = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"],
    "zero2": ["-m", "deepspeed.launcher.runner", "--num_gpus=1"],
    "zero3": ["-m", "deepspeed.launcher.runner", "--num_gpus=1"],
}
LIMITS = {"cuda": 100, "cpu": 300}  # seconds of one command


def training(context: Context) -> None:
    """Train, stop by SIGTERM, resume and export a model of the 7B's width; then compare with the run that went on."""
    model, rows = _model(context), context.rows_folder(QUESTIONS) / "ours"
    whole, stopped = context.work / "runs" / "whole", context.work / "runs" / "stopped"
    train = ["train", "--base_model", str(model), "--dataset", str(rows), "--eval_benchmarks", str(rows), *COMMON]
    context.row(command="train", **_run(context, "whole", [*train, "--output_dir", str(whole)]))
    context.row(
        command="train, SIGTERM",
        **_run(context, "stopped", [*train, "--output_dir", str(stopped)], stop_after=stopped / artifacts.METRICS),
    )
    context.row(command="resume", **_run(context, "resumed", [*train, "--output_dir", str(stopped), "--resume"]))
    context.note(resumed=_difference(whole, stopped), losses=_losses(whole), facts=_facts(whole))
    merged = ["export", "--adapter", str(whole), "--merge", "--output_dir", str(context.work / "runs" / "merged")]
    context.row(command="export --merge", **_run(context, "merged", merged))


def answers(context: Context) -> None:
    """Answers of the embedded model on this device and on the CPU."""
    found = {}
    for name, hidden in (("device", None), ("cpu", "")):
        folder = context.work / "runs" / f"answers-{name}"
        asked = ["eval", "--base_model", "pocket", "--benchmark", "demo_charts", "--limit", "100", "--output_dir"]
        context.row(command=f"eval, {name}", **_run(context, f"answers-{name}", [*asked, str(folder)], visible=hidden))
        lines = next(folder.rglob("predictions.jsonl")).read_text(encoding="utf-8").splitlines()
        found[name] = {row["id"]: row for row in map(json.loads, lines)}
    same = sum(found["cpu"][key]["prediction"] == row["prediction"] for key, row in found["device"].items())
    scores = {name: sum(row["score"] for row in rows.values()) / len(rows) for name, rows in found.items()}
    context.note(questions=len(found["cpu"]), equal_answers=same, scores=scores)


def launches(context: Context) -> None:
    """The same training under every launcher: its losses must be the same."""
    model, rows = _model(context), context.rows_folder(QUESTIONS) / "ours"
    for name, launcher in LAUNCHES.items():
        folder = context.work / "runs" / name
        flags = ["--deepspeed", name] if name.startswith("zero") else []
        command = [
            "train",
            "--base_model",
            str(model),
            "--dataset",
            str(rows),
            "--eval_benchmarks",
            "none",
            *COMMON,
            "--output_dir",
            str(folder),
            *flags,
        ]
        context.row(launch=name, **_run(context, name, command, launcher), losses=_losses(folder))


def questions(context: Context) -> None:
    """Questions a second of the whole command on the rows in their own size, beside ms-swift where it is at hand."""
    name = "native" if context.data.is_dir() else "drawn"
    envs = context.work / "envs"
    sides = ["ours", *(side for side in (PEER,) if ready(side, envs))]
    count = {"cuda": 384, "cpu": 16}[context.device]
    options = [
        "--device",
        context.device,
        "--shapes",
        context.shape,
        "--cases",
        name,
        "--sides",
        ",".join(sides),
        "--epochs",
        "2",
        "--questions",
        str(count),
        "--data",
        str(context.data),
        "--envs",
        str(envs),
        "--work_dir",
        str(context.work / "throughput"),
    ]
    args = throughput.parse(options)
    folder = args.envs / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(context.tokenizer.read_bytes())
    args.work_dir.mkdir(parents=True, exist_ok=True)
    context.note(**throughput.measure(args, name, context.shape))
    if "ours" not in context.values["sides"]:
        raise RuntimeError(f"no result; look at the logs in {args.work_dir / 'results'}")


def _model(context: Context) -> Path:
    """The folder of a model that is small enough to be written: of the 7B's width on a GPU."""
    folder = context.work / "models" / "wide"
    shape = "wide" if context.on_gpu else context.shape
    return shapes.build(shape, folder, context.tokenizer, context.case.max_pixels, context.device)


def _run(
    context: Context,
    name: str,
    words: list[str],
    launcher: list[str] | None = None,
    stop_after: Path | None = None,
    visible: str | None = None,
) -> dict[str, Any]:
    """Run a command of the package.

    Args:
        context: where.
        name: of its log.
        words: the verb and its flags.
        launcher: words between python and the program; None for python alone.
        stop_after: send SIGTERM once this file has a line.
        visible: value of CUDA_VISIBLE_DEVICES; None leaves it alone.

    Returns:
        Exit code, seconds, and the end of the log where the code is not the expected one.
    """
    program = [str(Path(__file__).resolve().parents[2] / "src" / "train_vlm_sft.py")] if launcher else ["-m", "vlm_sft"]
    command = [sys.executable, *(launcher or []), *program, *(words[1:] if launcher else words)]
    own = {"VLM_SFT_CACHE": str(context.work / "cache"), "HF_HUB_OFFLINE": "1"}
    own |= {} if context.on_gpu else {"DS_ACCELERATOR": "cpu"}
    environment = os.environ | own | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    log = context.work / f"{name}.log"
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            if stop_after is not None:
                _wait_for_line(process, stop_after, LIMITS[context.device])
                process.send_signal(signal.SIGTERM)
            code: int | str = process.wait(LIMITS[context.device])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "out of time"
    result: dict[str, Any] = {"code": code, "seconds": round(time.perf_counter() - began, 2)}
    if code != (InterruptedRunError.exit_code if stop_after is not None else 0):
        context.note(failed=f"{name} ended with code {code}")
        result["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return result


def _wait_for_line(process: subprocess.Popen[bytes], path: Path, seconds: float) -> None:
    """Wait until a file has a line, the process is over, or the time is."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if path.is_file() and path.stat().st_size:
            return
        time.sleep(0.05)


def _losses(folder: Path) -> list[float]:
    """The logged losses of a run."""
    path = folder / artifacts.METRICS
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return [row["loss"] for row in rows if "loss" in row]


def _facts(folder: Path) -> dict[str, Any]:
    """What a run recorded about its device, attention and peak memory."""
    record = artifacts.read_json(folder / artifacts.RUN)
    return {name: record.get(name) for name in ("device", "dtype", "attention", "seconds", "forecast")}


def _difference(whole: Path, stopped: Path) -> dict[str, Any]:
    """How far the adapter of a resumed run is from that of the run that went on."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped))
    largest = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    return {"bit_equal": all(torch.equal(one[name], two[name]) for name in one), "largest_difference": largest}
