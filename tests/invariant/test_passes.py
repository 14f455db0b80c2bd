"""What every forward pass of a run is like: in the recipe's number format, with a frozen tower that keeps nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.faults import training
from tests.faults.harness import make_place
from vlm_sft.cli.main import main
from vlm_sft.distributed.launch import Launch, idle_gpus
from vlm_sft.distributed.zero import release_weights
from vlm_sft.train import run

LAYER, TOWER = "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("passes"))


@pytest.fixture
def calls() -> Iterator[list[tuple[str, bool, bool, bool]]]:
    """Of each call of a layer: its kind, in training, under autocast, whether its output needs a gradient."""
    found: list[tuple[str, bool, bool, bool]] = []

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        kind = type(module).__name__
        if kind in (LAYER, TOWER):
            first = output[0] if isinstance(output, tuple) else output
            weight = next(module.self_attn.q_proj.parameters()).dtype if kind == LAYER else None
            narrow = (weight, first.dtype, torch.is_autocast_enabled("cpu")) == (torch.bfloat16, torch.float32, False)
            found.append((kind, module.training, narrow, first.requires_grad))

    handle = register_module_forward_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_probe_and_training_compute_alike_and_the_frozen_tower_keeps_nothing(
    verb: str, place: Path, tmp_path: Path, calls: list[tuple[str, bool, bool, bool]]
) -> None:
    """A tower whose output needs a gradient keeps the activations of all its blocks for a backward pass."""
    command = [
        verb,
        "--base_model",
        str(place / "model"),
        "--dataset",
        str(place / "data"),
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--max_steps",
        "2",
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--eval_benchmarks",
        "none",
        "--report_to",
        "none",
        "--probe",
        "--feature_cache",
        "off",
        "--bf16",
        "true",
        "--gradient_checkpointing",
        "true",
        "--ignore_forecast",
    ]
    assert main(command) == 0
    trained = [call for call in calls if call[1]]
    assert {kind for kind, *_ in trained} == {LAYER}  # a frozen tower stays in evaluation mode
    assert {kind for kind, *_ in calls} == {LAYER, TOWER}
    assert all(narrow for _, _, narrow, _ in trained), "weights in bfloat16, hidden states in float32"
    assert not any(needs for kind, _, _, needs in calls if kind == TOWER)
    assert any(needs for kind, _, _, needs in trained if kind == LAYER)


def test_the_trained_model_is_gone_before_another_is_evaluated(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that just holds a model in training does not hold a second one."""
    models: list[Any] = []
    build, evaluate = run.build_training, run.evaluate_run

    def noted(*arguments: Any) -> Any:
        made = build(*arguments)
        models.append(weakref.ref(made.loop.model))
        return made

    def checked(*arguments: Any) -> Any:
        gc.collect()
        models.append(models[0]() is None)
        return evaluate(*arguments)

    monkeypatch.setattr(run, "build_training", noted)
    monkeypatch.setattr(run, "evaluate_run", checked)
    words = ["--base_model", str(place / "model"), "--dataset", str(place / "data"), "--max_steps", "2"]
    words += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"), "--report_to", "none"]
    assert main(["train", *words, "--eval_benchmarks", "none", "--ignore_forecast"]) == 0
    assert models[1:] == [True]


def test_a_share_of_partitioned_weights_is_freed() -> None:
    model = torch.nn.Linear(4, 3)
    cast(Any, model.weight).ds_id, cast(Any, model.weight).ds_tensor = 0, torch.ones(6)
    release_weights(model)
    assert not model.weight.numel() and not model.weight.ds_tensor.numel()
    assert model.bias.numel() == 3, "what is not partitioned is not ours to free"


def test_a_process_trains_and_evaluates_the_model_itself(tmp_path: Path) -> None:
    """Not behind nn.DataParallel, which would share each pack out among the GPUs that the process sees."""
    data = training.prepared(training.samples())
    made = training.trainer(data, tmp_path, evaluation=data, eval_strategy="steps", eval_steps=3)
    made.run()
    losses = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert made.optimization.model is made.model and not isinstance(made.model, torch.nn.DataParallel)


def test_it_says_which_gpu_it_uses_and_how_to_use_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"NVIDIA H100 no. {number}")
    alone = Launch(0, 0, 1, False, None, "single")
    line = idle_gpus(alone, ["/usr/bin/vlm-sft", "train", "--output_dir", "a b"])
    assert "number 0 of 8 (NVIDIA H100 no. 0)" in line
    assert line.endswith("torchrun --nproc_per_node=8 -m vlm_sft train --output_dir 'a b'")
    assert idle_gpus(alone, ["src/train_vlm_sft.py"]).endswith("torchrun --nproc_per_node=8 src/train_vlm_sft.py")
    assert idle_gpus(alone, ["/x/vlm_sft/__main__.py", "eval"]).endswith("torchrun --nproc_per_node=8 -m vlm_sft eval")
    assert not idle_gpus(Launch(1, 1, 8, False, None, "ddp"), ["t.py"])
    assert not idle_gpus(Launch(0, 0, 1, True, None, "single"), ["t.py"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not idle_gpus(alone, ["t.py"])
    # Some launchers show each process its own GPU alone.
    assert Launch(3, 3, 4, False, None, "ddp").device == "cuda:0"
