"""`--adapter`: a second stage goes on with an adapter's weights, or merges them first; its model is reproduced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import save_base
from tests.invariant.test_full_training import evaluate, facts, predictions, refused, same, train
from vlm_sft.api.keywords import train_options
from vlm_sft.cli.main import main

WEIGHTS = "adapter_model.safetensors"
FIRST = ("--eval_benchmarks", "none", "--prompt_template", "{question} Be short:", "--eval_strategy", "no")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "run"
    assert train(base, folder, *FIRST) == 0
    return folder


def stage(first: Path, output: Path, *flags: str) -> int:
    """A second stage whose base is the one that the adapter names."""
    fixed = ["--dataset", "demo_charts", "--max_train", "16", "--max_eval", "6", "--global_batch_size", "4"]
    fixed += ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--learning_rate", "0.01", "--lora_r", "4"]
    fixed += ["--report_to", "none", "--cache_dir", str(first.parent / "cache")]
    return main(["train", "--adapter", str(first), "--output_dir", str(output), *fixed, *flags])


def test_the_weights_go_on(base: Path, first: Path, tmp_path: Path) -> None:
    """A step of nearly nothing leaves the first stage's weights; the same adapter, base and prompt are recorded."""
    run = tmp_path / "run"
    assert stage(first, run, "--learning_rate", "1e-30", "--eval_benchmarks", "none") == 0
    assert same(run / WEIGHTS, first / WEIGHTS)
    recorded = facts(run)
    started = recorded["starting_adapter"]
    assert (started["mode"], started["folder"], started["base_model"]) == ("continue", str(first), str(base))
    assert recorded["base_model"] == str(base) and len(started["sha256"]) == 64
    assert json.loads((run / "prompt.json").read_text())["template"] == "{question} Be short:"
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_a_second_stage_resumes_exactly_and_is_asked_again(base: Path, first: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert stage(first, whole) == 0
    assert not same(whole / WEIGHTS, first / WEIGHTS)
    answers = predictions(whole / "evaluation" / "tuned" / "demo_charts")
    assert evaluate(tmp_path / "asked", "--base_model", str(base), "--adapter", str(whole)) == answers
    torn.mkdir()
    assert stage(first, torn, "--resume", str(whole / "checkpoint-2"), "--eval_benchmarks", "none") == 0
    assert same(whole / WEIGHTS, torn / WEIGHTS)


def test_another_adapter_is_another_training(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert stage(first, run, "--eval_benchmarks", "none") == 0
    other.mkdir()
    save_file({name: value * 2 for name, value in load_file(first / WEIGHTS).items()}, other / WEIGHTS)
    for name in ("adapter_config.json", "prompt.json"):
        shutil.copy(first / name, other / name)
    code = stage(other, tmp_path / "o", "--resume", str(run / "checkpoint-2"))
    refused(capsys, code, "--adapter: it is another one than the training began with")


def test_merged_first(base: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New weights on top of base and first adapter; every command opens them on the merged base by itself."""
    run, torn = tmp_path / "run", tmp_path / "torn"
    flags = ("--adapter_mode", "merge", "--lora_r", "2", "--target_modules", "k_proj,down_proj")
    assert stage(first, run, *flags) == 0
    merged = run / "merged_base"
    recorded = facts(run)
    assert recorded["starting_adapter"]["mode"] == "merge" and recorded["base_model"] == str(merged)
    origin = json.loads((merged / "origin.json").read_text())
    assert origin["adapter_sha256"] == recorded["starting_adapter"]["sha256"] and origin["base_model"] == str(base)
    update, name = load_file(first / WEIGHTS), "model.language_model.layers.0.self_attn.q_proj"
    product = update[f"base_model.model.{name}.lora_B.weight"] @ update[f"base_model.model.{name}.lora_A.weight"]
    key = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[key] for folder in (base, merged))
    torch.testing.assert_close(after - before, 32 / 4 * product, rtol=1e-4, atol=1e-6)
    assert all("k_proj" in name or "down_proj" in name for name in load_file(run / WEIGHTS))
    # Before the first step the model is the first stage's own.
    asked = evaluate(tmp_path / "first", "--base_model", str(base), "--adapter", str(first))
    assert predictions(run / "evaluation" / "base" / "demo_charts") == asked
    answers = predictions(run / "evaluation" / "tuned" / "demo_charts")
    assert evaluate(tmp_path / "asked", "--base_model", str(merged), "--adapter", str(run)) == answers
    command = ["export", "--adapter", str(run), "--questions", "2", "--output_dir", str(tmp_path / "out"), "--merge"]
    assert main([*command, "--dtype", "float32"]) == 0
    assert evaluate(tmp_path / "exported", "--base_model", str(tmp_path / "out")) == answers
    # On the base of the first stage it is refused.
    capsys.readouterr()
    asked_of = ("--base_model", str(base), "--adapter", str(run), "--benchmark", "demo_charts")
    assert main(["eval", *asked_of, "--output_dir", str(tmp_path / "wrong")]) == 2
    assert "was trained on" in capsys.readouterr().err
    # A resumed run takes the merged base that is there.
    shutil.copytree(run, torn)
    for path in torn.glob("checkpoint-4"):
        shutil.rmtree(path)
    written = (torn / "merged_base" / "model.safetensors").stat().st_mtime_ns
    assert stage(first, torn, *flags, "--resume", "auto", "--eval_benchmarks", "none") == 0
    assert same(run / WEIGHTS, torn / WEIGHTS)
    assert (torn / "merged_base" / "model.safetensors").stat().st_mtime_ns == written


def test_all_weights_after_an_adapter(first: Path, tmp_path: Path) -> None:
    flags = ("--adapter_mode", "merge", "--train", "all", "--eval_benchmarks", "none", "--learning_rate", "1e-30")
    assert stage(first, tmp_path / "run", *flags) == 0
    trained, merged = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run", tmp_path / "run" / "merged_base")
    )
    assert trained.keys() == merged.keys() and all(
        torch.allclose(trained[name], merged[name], 0, 1e-20) for name in merged
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora_r", "8"), ("lora_r is 4 there and 8 here", "pass --lora_r 4; or pass --adapter_mode merge")),
        (("--use_dora", "true"), ("use_dora is False there and True here", "--use_dora false")),
        (("--target_modules", "q_proj,k_proj"), ("in the adapter only: o_proj, v_proj", "in the recipe only: k_proj")),
        (("--train", "language,vision_lora"), ("in the recipe only:", "qkv", "the same --train")),
        (("--train", "language,projector"), ("cannot be continued under this recipe", "missing", "merger")),
        (("--train", "all"), ("there is no adapter to continue from", "--adapter_mode merge")),
    ],
    ids=["rank", "dora", "targets", "tower", "projector", "all"],
)
def test_what_does_not_fit_is_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(
        capsys,
        stage(first, tmp_path / "o", *flags),
        "cannot be continued" if "all" not in flags else "--train all",
        *words,
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_another_base_is_refused(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str) -> None:
    other = save_base(tmp_path / "other")
    weights: dict[str, Any] = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    code = stage(first, tmp_path / "o", "--base_model", str(other), "--adapter_mode", mode)
    message = capsys.readouterr().err
    assert code == 2 and "was trained on" in message and "its weights are others" in message
    assert "--allow_other_base" not in message and not (tmp_path / "o").exists()


def test_the_python_api_takes_it_too(base: Path, first: Path, tmp_path: Path) -> None:
    options = train_options(None, "demo_charts", tmp_path, {"adapter": str(first), "adapter_mode": "merge"})
    assert (options.adapter, options.adapter_mode, options.base_model) == (first, "merge", str(base))


def test_a_mode_without_an_adapter_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, train(base, tmp_path / "o", "--adapter_mode", "merge"), "--adapter_mode has no effect")
