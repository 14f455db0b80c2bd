"""`--train language,vision_lora,projector_lora` through the public commands: trained, resumed, asked, exported."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.adapters import save_base
from tests.invariant.test_full_training import evaluate, facts, predictions, refused, same, train, train_flags
from tests.processes import Warm
from vlm_sft.cli.main import main

PARTS = ("--train", "language,vision_lora,projector_lora", "--vision_lora_rank", "2", "--projector_lora_rank", "8")
RATES = ("--vision_learning_rate", "0.002", "--projector_learning_rate", "0.005", "--lora_dropout", "0.2")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(base, folder, *PARTS, *RATES) == 0
    return folder


def test_a_run_says_and_saves_what_it_trained(run: Path) -> None:
    names = load_file(run / WEIGHTS)
    parts = {
        "vision_lora": [name for name in names if ".visual." in name and ".merger." not in name],
        "projector_lora": [name for name in names if ".merger." in name],
    }
    recorded = facts(run)["lora"]
    for part, rank in (("vision_lora", 2), ("projector_lora", 8)):
        assert recorded["parts"][part]["r"] == rank
        assert len(parts[part]) == 2 * recorded["parts"][part]["matched_modules"] > 0
        assert all(names[name].shape[0] == rank for name in parts[part] if "lora_A" in name)
        assert all(names[name].abs().max() > 0 for name in parts[part])
    assert recorded["matched_modules"] == 6 and recorded["learning_rates"] == {"vision": 0.002, "projector": 0.005}
    assert recorded["trainable_parameters"] == sum(value.numel() for value in names.values())
    for stage, reason in {"training": "the vision tower is trained", "evaluation": "its own vision tower"}.items():
        decision = facts(run)["engine"]["feature_cache"][stage]
        assert decision["used"] is False and reason in decision["reason"]


def test_a_resumed_run_is_the_uninterrupted_one(base: Path, run: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    resumed = ("--resume", str(run / "checkpoint-2"), "--eval_benchmarks", "none")
    assert train(base, torn, *PARTS, *RATES, *resumed) == 0
    assert same(run / WEIGHTS, torn / WEIGHTS)


def test_another_rate_is_another_training(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = (*PARTS, *RATES, "--vision_learning_rate", "0.1", "--resume", str(run / "checkpoint-2"))
    refused(capsys, train(base, tmp_path / "o", *changed), "vision_learning_rate was 0.002 and is 0.1")


def test_the_adapter_answers_merged_and_alone(
    base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = predictions(run / "evaluation" / "tuned" / "demo_charts")
    assert evaluate(tmp_path / "tuned", "--base_model", str(base), "--adapter", str(run)) == answers
    command = ["export", "--adapter", str(run), "--questions", "2", "--output_dir"]
    assert main([*command, str(tmp_path / "merged"), "--merge", "--dtype", "float32"]) == 0
    assert evaluate(tmp_path / "asked", "--base_model", str(tmp_path / "merged")) == answers
    plain, merged = (
        AutoModelForImageTextToText.from_pretrained(folder).model.visual.blocks[0].attn.qkv.weight
        for folder in (base, tmp_path / "merged")
    )
    update = load_file(run / WEIGHTS)
    layer = "base_model.model.model.visual.blocks.0.attn.qkv"
    product = update[f"{layer}.lora_B.weight"] @ update[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(merged - plain, 32 / 4 * product, rtol=1e-4, atol=1e-6)  # the scale of rank 4
    capsys.readouterr()
    assert main([*command, str(tmp_path / "adapter")]) == 0
    told = capsys.readouterr()
    assert "--enable-lora --enable-tower-connector-lora --max-lora-rank 8" in told.out
    report = json.loads((tmp_path / "adapter" / "export.json").read_text())
    assert report["vllm"]["loads"] and report["vllm"]["enable_tower_connector_lora"] is True


def test_a_projector_behind_a_tower_whose_output_is_kept(base: Path, tmp_path: Path) -> None:
    """One question a step: the tower sees an image alone with and without a cache, so every bit is the same."""
    flags = ("--train", "projector_lora", "--global_batch_size", "1", "--eval_steps", "4")
    found = {}
    for kept in ("1GB", "off"):
        run = tmp_path / kept
        assert train(base, run, *flags, "--feature_cache", kept) == 0
        found[kept] = facts(run)
    recorded = found["1GB"]
    assert recorded["lora"]["matched_modules"] == 0 and list(recorded["lora"]["parts"]) == ["projector_lora"]
    assert all(".merger." in name for name in load_file(tmp_path / "1GB" / WEIGHTS))
    decisions = recorded["engine"]["feature_cache"]
    assert decisions["training"]["used"] and decisions["training"]["computed"] > 0
    assert (
        not decisions["evaluation"]["used"] and "its own vision tower or projector" in decisions["evaluation"]["reason"]
    )
    assert recorded["engine"]["training_tower"]["calls"] == 0 < found["off"]["engine"]["training_tower"]["calls"]
    assert same(tmp_path / "1GB" / WEIGHTS, tmp_path / "off" / WEIGHTS)
    answers = (predictions(tmp_path / kept / "evaluation" / "tuned" / "demo_charts") for kept in ("1GB", "off"))
    assert next(answers) == next(answers)
    told = recorded["forecast"]["assumptions"]
    assert any("inputs of the projector are cached" in line for line in told)


@pytest.mark.parametrize(
    ("parallel", "kept"),
    [
        ("ddp", True),
        pytest.param("fsdp", False, marks=pytest.mark.slow),
        pytest.param("zero2", True, marks=pytest.mark.slow),
        pytest.param("zero3", False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_feed_the_projector_from_the_cache(
    base: Path, tmp_path: Path, warm: Warm, parallel: str, kept: bool
) -> None:
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed")
    more = {"ddp": (), "fsdp": ("--fsdp",)}.get(parallel, ("--deepspeed", parallel))
    flags = ("--train", "language,projector_lora", "--feature_cache", "1GB", "--eval_benchmarks", "none")
    assert train(base, tmp_path / "alone", *flags) == 0
    started = warm.start_both(train_flags(base, tmp_path / "both", *flags, *more), tmp_path / "log")
    assert started.wait(300) == 0, (tmp_path / "log").read_text()
    alone, both = load_file(tmp_path / "alone" / WEIGHTS), load_file(tmp_path / "both" / WEIGHTS)
    for name, tensor in alone.items():
        assert (both[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    decision = facts(tmp_path / "both")["engine"]["feature_cache"]["training"]
    assert decision["used"] is kept and (kept or "divided over the ranks" in decision["reason"])


def test_contradictions(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train(base, tmp_path / "o", "--train", "vision,vision_lora", "--projector_lora_rank", "4")
    refused(capsys, code, "2 mistakes", "the vision tower in full and with LoRA", "no such LoRA")
    code = train(base, tmp_path / "o", "--vision_learning_rate", "0.1")
    refused(capsys, code, "a learning rate for the vision tower, which is not trained")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_keeps_the_parts_learning_rates(
    base: Path, run: Path, tmp_path: Path, warm: Warm, stage: str
) -> None:
    flags = train_flags(base, tmp_path / "run", *PARTS, *RATES, "--eval_benchmarks", "none", "--deepspeed", stage)
    started = warm.start_both(flags, tmp_path / "log")
    assert started.wait(300) == 0, (tmp_path / "log").read_text()
    alone, shared = load_file(run / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert (shared[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
