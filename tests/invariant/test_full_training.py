"""`--train` through the public command: what is saved opens again, a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import save_base
from vlm_sft.cli.main import main
from vlm_sft.model import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


def train_flags(base: Path, output: Path, *flags: str) -> list[str]:
    """The flags of a short training; later ones win."""
    fixed = ["--base_model", str(base), "--dataset", "demo_charts", "--max_train", "16", "--max_eval", "6"]
    fixed += ["--global_batch_size", "4", "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]
    fixed += ["--learning_rate", "0.01", "--lora_r", "4", "--max_pixels", "15680", "--report_to", "none"]
    return [*fixed, "--cache_dir", str(output.parent / "cache"), "--output_dir", str(output), *flags]


def train(base: Path, output: Path, *flags: str) -> int:
    return main(["train", *train_flags(base, output, *flags)])


def predictions(folder: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def evaluate(output: Path, *flags: str) -> list[str]:
    command = ["eval", "--benchmark", "demo_charts", "--limit", "6", "--output_dir", str(output), *flags]
    assert main([*command, "--cache_dir", str(output.parent / "cache")]) == 0
    return predictions(output / "demo_charts")


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def same(left: Path, right: Path) -> bool:
    ours, theirs = load_file(left), load_file(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_projector_and_language_are_saved_together(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(base, run, "--train", "language,projector") == 0
    names = load_file(run / "adapter_model.safetensors")
    assert sum("lora_" in name for name in names) == 12
    merger = load_file(base / "model.safetensors")["visual.merger.mlp.0.weight"]
    trained = names["base_model.model.model.visual.merger.mlp.0.weight"]
    assert trained.shape == merger.shape and (trained - merger).abs().max() > 0.005
    recorded = facts(run)
    assert recorded["lora"]["saved_modules"] == ["model.visual.merger"] and recorded["lora"]["matched_modules"] == 6
    decisions = recorded["engine"]["feature_cache"]
    assert decisions["training"]["used"] is True  # what the projector reads is kept
    assert decisions["evaluation"]["used"] is False
    assert "its own vision tower or projector" in decisions["evaluation"]["reason"]
    sides = {side: predictions(run / "evaluation" / side / "demo_charts") for side in ("base", "tuned")}
    assert sides["base"] != sides["tuned"]
    assert evaluate(tmp_path / "base", "--base_model", str(base), "--max_pixels", "15680") == sides["base"]
    assert evaluate(tmp_path / "tuned", "--base_model", str(base), "--adapter", str(run)) == sides["tuned"]


def test_full_training_leaves_a_model_and_resumes_exactly(base: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    flags = ("--train", "all", "--learning_rate", "0.001")
    assert train(base, whole, *flags) == 0
    assert not (whole / "adapter_model.safetensors").exists()
    started, trained = load_file(base / "model.safetensors"), load_file(whole / "model.safetensors")
    assert started.keys() == trained.keys()
    assert all(not torch.equal(started[name], trained[name]) for name in started if name.endswith("proj.weight"))
    assert evaluate(tmp_path / "again", "--base_model", str(whole)) == predictions(
        whole / "evaluation" / "tuned" / "demo_charts"
    )
    # The same run again from its checkpoint in the middle.
    torn.mkdir()
    assert train(base, torn, *flags, "--resume", str(whole / "checkpoint-2"), "--eval_benchmarks", "none") == 0
    assert same(whole / "model.safetensors", torn / "model.safetensors")


def test_the_base_is_kept_apart_when_a_guard_asks_it(base: Path, tmp_path: Path) -> None:
    """Without an adapter to switch off, the base's answers come from a model that is loaded for them."""
    run = tmp_path / "run"
    flags = ("--train", "all", "--guard", "demo_charts:100", "--eval_samples", "6", "--load_best_model_at_end", "true")
    assert train(base, run, *flags) == 0
    best = load_file(run / f"checkpoint-{facts(run)['best']['step']}" / "model.safetensors")
    assert torch.equal(best["lm_head.weight"], load_file(run / "model.safetensors")["lm_head.weight"])
    asked = predictions(run / "validation" / "base" / "demo_charts")
    direct = evaluate(tmp_path / "base", "--base_model", str(base), "--max_pixels", "15680", "--split", "validation")
    assert asked == direct


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    message = capsys.readouterr().err
    assert code == 2 and message.count("error: ") == 1, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_4_bits_are_refused_without_the_package_for_them(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    code = train(base, tmp_path / "o", "--load_in_4bit", "true")
    refused(capsys, code, "--load_in_4bit true", "bitsandbytes is not installed", "pip install 'vlm-sft[qlora]'")


def test_contradictions(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train(base, tmp_path / "o", "--train", "all,vision", "--use_dora", "true", "--load_in_4bit", "true")
    refused(capsys, code, "3 mistakes", "all and a part", "DoRA is a kind of LoRA", "cannot be trained themselves")
    refused(capsys, train(base, tmp_path / "o", "--train", "decoder"), "language", "projector", "vision")
