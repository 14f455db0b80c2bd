"""The path of a training sample, from the command line to its gradient, is the one that docs/ARCHITECTURE.md tells."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from vlm_sft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vlm_sft"
FILES = 30  # that the loop enters up to the first backward pass; it grew once, by model/cpu/rotary.py


class Reached(BaseException):
    """Ends the training at its first backward pass."""


def documented() -> list[tuple[str, str]]:
    """The calls of the page's table, file and function."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    return [(path, name.split(".")[-1]) for path, name in re.findall(r"^\| \d \| `([\w/.]+): ([\w.]+)`", text, re.M)]


def test_the_path_is_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack: list[tuple[str, str]] = []
    entered: set[str] = set()

    below = f"{PACKAGE}/"

    def own(filename: str) -> str:
        return filename[len(below) :] if filename.startswith(below) else ""

    def backward(*arguments: Any, **options: Any) -> Any:
        if not entered:  # a module is compared with its exchanged form
            return grad(*arguments, **options)
        sys.setprofile(None)
        stack.extend((own(frame.filename), frame.name) for frame in traceback.extract_stack() if own(frame.filename))
        raise Reached

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(below):
            name = own(frame.f_code.co_filename)
            if entered or (name, frame.f_code.co_name) == ("train/loop.py", "run"):
                entered.add(name)

    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", backward)
    command = f"train --base_model pocket --dataset demo_charts --output_dir {tmp_path / 'run'} --max_steps 1 "
    command += "--max_train 8 --global_batch_size 4 --eval_strategy no --load_best_model_at_end false "
    command += f"--eval_benchmarks none --report_to none --feature_cache off --cache_dir {tmp_path / 'cache'}"
    sys.setprofile(enter)
    try:
        with pytest.raises(Reached):
            main(command.split())
    finally:
        sys.setprofile(None)
    path = documented()
    assert len(path) == 5
    assert stack == path
    assert len(entered) <= FILES, sorted(entered)
