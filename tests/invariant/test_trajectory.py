"""One recipe gives one adapter: token budgets, sharing, recomputation and a resume change nothing but rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_models
from tests.faults.training import loop_of
from tests.questions import PROMPT, questions
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.distributed.launch import Launch, quiet_libraries
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import set_attention
from vlm_sft.model.trainable import checkpoint_layers
from vlm_sft.recipe.schedule import resolve_schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.optimization import TorchOptimization

RECIPE = Recipe(
    num_train_epochs=2,
    global_batch_size=8,
    learning_rate=1e-3,
    lora_dropout=0.05,
    bf16=False,
    eval_strategy="no",
    save_steps=3,
    logging_steps=1,
    report_to=("none",),
    dataloader_num_workers=0,
    warmup_ratio=0.0,
)
LAUNCH = Launch(rank=0, local_rank=0, world_size=1, cpu=True, deepspeed=None, parallel="single")
IMAGES, PER_IMAGE = 9, 4  # 36 questions: five steps an epoch, the last one with four questions
STEPS = 10

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data() -> PreparedData:
    quiet_libraries()
    _, processor = tiny_models.build("qwen2_5_vl")
    samples = [sample for seed in range(IMAGES) for sample in questions(seed, PER_IMAGE)]
    return PreparedData(samples, Encoder(processor, PROMPT), "encoding")


def train(
    data: PreparedData, folder: Path, budget: int = 1000, mode: PackMode | None = None, **how: Any
) -> tuple[Weights, list[float]]:
    """Train on one process; returns the adapter and the loss of every step."""
    model, _ = tiny_models.build("qwen2_5_vl")
    mode = mode or PackMode()
    set_attention(model, SHARED_SDPA if mode.kind == "blockwise" else "sdpa")
    recipe = replace(RECIPE, lora_dropout=how.pop("dropout", RECIPE.lora_dropout))
    targets = resolve_targets(model, recipe.target_modules)
    adapter = add_lora(model, targets, r=4, alpha=8, dropout=recipe.lora_dropout, seed=recipe.seed, base_name="tiny")
    if how.pop("checkpointing", False):
        checkpoint_layers(adapter)
    resume = how.pop("resume", None)
    planner = EpochPlanner(data.lengths, 8, budget, 1, recipe.seed, **how)
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    assert schedule.total_steps == STEPS
    optimization = TorchOptimization(adapter, recipe, schedule, LAUNCH, torch.float32)
    loop = loop_of(data, planner, recipe, schedule, adapter, optimization, LAUNCH, folder, mode=mode)
    loop.run(checkpoint=resume)
    losses = [row["loss"] for row in loop.state.log_history if "loss" in row]
    return {name: p.detach().clone() for name, p in adapter.named_parameters() if p.requires_grad}, losses


@pytest.fixture(scope="module")
def reference(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, list[float], Path]:
    folder = tmp_path_factory.mktemp("reference")
    return *train(data, folder), folder


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= 1e-6, worst


def test_the_training_moves_the_adapter(reference: tuple[Weights, list[float], Path]) -> None:
    weights, losses, folder = reference
    assert len(losses) == STEPS
    assert all(tensor.abs().max() > 1e-3 for name, tensor in weights.items() if "lora_B" in name)
    saved = load_file(folder / f"checkpoint-{STEPS - 1}" / "adapter_model.safetensors")
    assert len(saved) == len(weights)


@pytest.mark.parametrize(
    "how",
    [
        {"budget": 200},
        {"budget": 1_000_000},
        {"share_images": False},
        {"share_images": False, "budget": 200},
        {"max_questions_per_pack": 1},
        {"packing": False},
        {"checkpointing": True},
        {"mode": PackMode("dense")},
        {"mode": PackMode("separate"), "rows": "padded"},
        {"mode": PackMode("separate"), "rows": "padded", "budget": 300, "share_images": False},
        {"mode": PackMode("separate"), "rows": "equal"},
        {"mode": PackMode("separate"), "rows": "padded", "packing": False},
    ],
    ids=lambda how: " ".join(f"{name}={getattr(value, 'kind', value)}" for name, value in how.items()),
)
def test_the_same_adapter(
    how: dict[str, Any], data: PreparedData, reference: tuple[Weights, list[float], Path], tmp_path: Path
) -> None:
    weights, losses = train(data, tmp_path, **how)
    assert losses == pytest.approx(reference[1], abs=2e-6)
    assert_same(weights, reference[0])


def test_a_resume_within_an_epoch(
    data: PreparedData, reference: tuple[Weights, list[float], Path], tmp_path: Path
) -> None:
    checkpoint = reference[2] / "checkpoint-3"
    for how in ({}, {"mode": PackMode("separate"), "rows": "padded"}):
        weights, losses = train(data, tmp_path / str(len(how)), budget=300, resume=checkpoint, **how)
        assert_same(weights, reference[0])
        assert losses[-(STEPS - 3) :] == pytest.approx(reference[1][3:], abs=2e-6)


def test_dropout_is_really_on(data: PreparedData, reference: tuple[Weights, list[float], Path], tmp_path: Path) -> None:
    weights, _ = train(data, tmp_path, dropout=0.0)
    assert max(float((weights[name] - reference[0][name]).abs().max()) for name in weights) > 1e-4
