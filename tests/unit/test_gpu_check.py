"""The check of a GPU: every step runs here with a tiny model, a step that fails is told, and tables show what was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import gpu_check
import gpu_tables
from gpu_steps.context import Context
from shapes import SPECIAL, VOCABULARY
from vlm_sft.common import artifacts

GIT = {"git": {"hash": "0123456789", "dirty": False}}
SPECIAL_NAMES = {
    "<|endoftext|>": 151_643,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<|vision_start|>": 151_652,
    "<|vision_end|>": 151_653,
    "<|image_pad|>": 151_655,
    "<|video_pad|>": 151_656,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes whose special tokens have the ids of Qwen's."""
    names = {number: name for name, number in SPECIAL_NAMES.items()}
    assert names[SPECIAL["image_token_id"]] == "<|image_pad|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<|unused {number}|>" for number in range(len(alphabet), max(names) + 1))]
    for number, name in names.items():
        words[number] = name
    assert len(words) <= VOCABULARY
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(SPECIAL_NAMES))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def checked(
    steps: str, tokenizer: Path, work: Path, monkeypatch: pytest.MonkeyPatch, seconds: int = 1500
) -> tuple[int, dict[str, Any]]:
    """The exit code and the steps of a check."""
    words = [
        "--device",
        "cpu",
        "--steps",
        steps,
        "--tokenizer",
        str(tokenizer),
        "--work_dir",
        str(work),
        "--data",
        str(work / "none"),
        "--seconds",
        str(seconds),
        "--commit",
        "0123456789",
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    code = gpu_check.main()
    return code, artifacts.read_json(next(work.glob("gpu_check-*.json")))["steps"]


def in_this_process(command: list[str], **more: Any) -> subprocess.CompletedProcess[Any]:
    """Run the step that a command line of the check names; other commands as ever."""
    if command[1:2] != [gpu_check.__file__]:
        return run(command, **more)
    return subprocess.CompletedProcess(command, gpu_check.run_inside(gpu_check.parse(command[2:])))


run = subprocess.run


def test_kernels(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.subprocess, "run", in_this_process)  # what a process of its own adds: the next test
    code, steps = checked("installed,kernels,memory", tokenizer, tmp_path, monkeypatch)
    assert code == 0, steps
    assert steps["installed"]["flash_problem"] == "no GPU" and steps["installed"]["git"]["hash"] == "0123456789"
    assert all(max(row["sdpa_errors"]) < 1e-5 for row in steps["kernels"]["rows"])
    assert "skipped" in steps["memory"] and "**failed**" not in gpu_tables.tables(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_modes_and_features(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, steps = checked("modes,features", tokenizer, tmp_path, monkeypatch)
    assert code == 0, steps
    modes = {row["mode"]: row for row in steps["modes"]["rows"]}
    exact = modes["dropout 0"]["loss"]
    assert modes["dropout 0, checkpointing"]["loss"] == pytest.approx(exact, rel=1e-6)
    assert modes["dropout 0, SDPA"]["loss"] == pytest.approx(exact, rel=1e-6)
    # A fresh adapter adds nothing, so neither dropout nor its place changes the loss of the first pass.
    assert modes["dropout 0.05, modules of the libraries"]["loss"] == pytest.approx(exact, rel=1e-5)
    assert all(not row["cut_in_two"] and row["tokens_per_second"] > 0 for row in modes.values())
    assert sum(steps["modes"]["profile"]["groups"].values()) > 0
    pixels, kept = steps["features"]["rows"]
    assert pixels["loss"] == pytest.approx(kept["loss"], rel=1e-5)
    text = gpu_tables.tables(tmp_path)
    assert "| dropout 0, SDPA |" in text and "**failed**" not in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_public_command(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, steps = checked("training,questions", tokenizer, tmp_path, monkeypatch)
    assert code == 0, steps
    assert [row["code"] for row in steps["training"]["rows"]] == [0, 75, 0, 0]
    assert steps["training"]["resumed"]["bit_equal"] and len(steps["training"]["losses"]) == 6
    assert not steps["questions"]["refused"] and steps["questions"]["sides"]["ours"]["warm"] > 0
    assert "bit for bit" in gpu_tables.tables(tmp_path)


def test_a_step_that_fails_or_takes_too_long_is_told(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").write_text("no folder", encoding="utf-8")  # rows are drawn then
    (tmp_path / "cases").write_text("in the way", encoding="utf-8")
    code, steps = checked("features", tokenizer, tmp_path, monkeypatch)
    assert code == 1 and "Error" in steps["features"]["failed"]
    code, steps = checked("installed", tokenizer, tmp_path, monkeypatch, seconds=0)
    assert code == 1 and steps["installed"]["failed"] == "no time was left for it"
    assert "features" in steps, "steps of an earlier check stay"
    assert "**failed**: no time was left for it" in gpu_tables.tables(tmp_path)


def test_a_number_that_is_none_costs_no_step(tmp_path: Path) -> None:
    context = Context("cpu", tmp_path, tmp_path, tmp_path)
    with context.writing("memory"):
        context.row(loss=float("nan"), errors=[1.0, float("inf")])
    assert artifacts.read_json(tmp_path / "memory.json")["rows"] == [{"loss": None, "errors": [1.0, None]}]


def test_a_gpu_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.parse(["--device", "cuda"])
    assert ended.value.code == 2 and "there is no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.parse(["--device", "cpu", "--steps", "modes,bogus"])
    assert "--steps bogus" in capsys.readouterr().err


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    speed = {
        "first_seconds": 2.0,
        "seconds": 0.5,
        "tokens_per_second": 16_000.0,
        "mfu": 0.41,
        "language_mfu": 0.39,
        "peak_bytes": 40e9,
        "cut_in_two": False,
    }
    launched = [{"launch": "zero2", "code": 0, "seconds": 9.0, "losses": [1.25, 1.0]}]
    steps = {
        "features": {"rows": [{"mode": "pixels", **speed}, {"mode": "kept", "failed": "out of memory"}]} | GIT,
        "memory": {
            "rows": [
                {
                    "share": 0.75,
                    "cut_in_two": True,
                    "too_large": False,
                    "loss": 2.0,
                    "whole_loss": 2.0,
                    "largest_gradient_error": 1e-3,
                }
            ]
        }
        | GIT,
        "launches": {"rows": launched, "failed": "cut off after 9 s"} | GIT,
    }
    result = {"device": "H100", "versions": {"torch": "2.11", "numpy": "2"}, "steps": steps}
    (tmp_path / "gpu_check-h100.json").write_text(json.dumps(result), encoding="utf-8")
    text = gpu_tables.tables(tmp_path)
    assert "**H100** (torch 2.11)" in text
    assert "| pixels | 2.00 / 0.500 | 16,000 | 41 % | 39 % | 40.0 |" in text and "| kept | out of memory" in text
    assert "| 75 % of what it takes | yes | 2.0000, 2.0000 | 1.0e-03 |" in text
    assert "*launches*, commit 0123456, **failed**: cut off after 9 s" in text
    assert "| zero2 | code 0 | 9.0 | 1.2500, 1.0000 |" in text
