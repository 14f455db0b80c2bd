"""A short training of a tiny model in this process, or on ranks of its own, for tests of faults."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests import tiny_models
from tests.questions import PROMPT, questions
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.loader import StepDataset
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.sample import Sample
from vlm_sft.distributed.launch import Launch, connected, quiet_libraries, read_launch
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import set_attention
from vlm_sft.model.packed_forward import Positions
from vlm_sft.model.sharded import divide_model
from vlm_sft.model.trainable import save_tuned
from vlm_sft.planning.training_run import FaultPolicy
from vlm_sft.recipe.schedule import Schedule, resolve_schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.deepspeed_engine import (
    DeepSpeedOptimization,
    hidden_size_of,
    partition_while_loading,
    resolve_config,
)
from vlm_sft.train.fsdp_optimization import DividedOptimization
from vlm_sft.train.loop import TrainingLoop, TrainingPlan
from vlm_sft.train.optimization import TorchOptimization

ALONE = Launch(rank=0, local_rank=0, world_size=1, cpu=True, deepspeed=None, parallel="single")
RECIPE = Recipe(
    max_steps=6,
    global_batch_size=6,
    learning_rate=1e-3,
    lora_dropout=0.0,
    bf16=False,
    eval_strategy="no",
    save_steps=0,
    logging_steps=1,
    report_to=("none",),
    warmup_ratio=0.0,
    lr_scheduler_type="constant",
)


@dataclass
class Step:
    """What an optimizer step found and left behind."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    state_before: dict[str, torch.Tensor]
    state_after: dict[str, torch.Tensor]


def samples(images: int = 8, each: int = 3) -> list[Sample]:
    return [sample for seed in range(images) for sample in questions(seed, each)]


def prepared(found: list[Sample]) -> PreparedData:
    quiet_libraries()
    _, processor = tiny_models.build("qwen2_5_vl")
    return PreparedData(found, Encoder(processor, PROMPT), "encoding")


def trainer(
    data: PreparedData,
    folder: Path,
    *,
    launch: Launch = ALONE,
    budget: int = 1000,
    policy: FaultPolicy | None = None,
    evaluation: PreparedData | None = None,
    recipe: Recipe = RECIPE,
    **changes: Any,
) -> TrainingLoop:
    """A training of LoRA on a tiny Qwen2.5-VL."""
    recipe = replace(recipe, **changes)
    planner = EpochPlanner(data.lengths, recipe.global_batch_size, budget, launch.world_size, recipe.seed)
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    config = loading = None
    if launch.deepspeed is not None:
        config = resolve_config(launch, recipe, False, hidden_size_of(tiny_models.build("qwen2_5_vl")[0].config))
        loading = partition_while_loading(config)
    adapter = adapted(recipe)
    if launch.fsdp:
        divide_model(adapter, launch.device, torch.float32)
    kind = DividedOptimization if launch.fsdp else TorchOptimization
    optimization: Any = (
        kind(adapter, recipe, schedule, launch, torch.float32)
        if config is None
        else DeepSpeedOptimization(adapter, recipe, schedule, config, loading)
    )
    return loop_of(data, planner, recipe, schedule, adapter, optimization, launch, folder, policy, evaluation)


def adapted(recipe: Recipe) -> Any:
    """A tiny Qwen2.5-VL with its adapter."""
    model, _ = tiny_models.build("qwen2_5_vl")
    set_attention(model, SHARED_SDPA)
    targets = resolve_targets(model, recipe.target_modules)
    dropout = recipe.lora_dropout
    return add_lora(model, targets, r=4, alpha=8, dropout=dropout, seed=recipe.seed, base_name="tiny")


def loop_of(
    data: PreparedData,
    planner: EpochPlanner,
    recipe: Recipe,
    schedule: Schedule,
    model: Any,
    optimization: Any,
    launch: Launch,
    folder: Path,
    policy: FaultPolicy | None = None,
    evaluation: PreparedData | None = None,
    mode: PackMode | None = None,
) -> TrainingLoop:
    """A training loop over data, as `train/setup.py` puts it together."""
    mode = mode or PackMode()
    place = Positions(model) if mode.shares else None
    replace_bad = bool(policy and policy.replace_bad)
    steps = StepDataset(data, planner, launch.rank, replace_bad, place)
    eval_steps = None
    if evaluation is not None:
        eval_steps = StepDataset(
            evaluation, replace(planner, lengths=evaluation.lengths), launch.rank, replace_bad, place
        )
    plan = TrainingPlan(recipe, schedule, steps, eval_steps, mode, int(recipe.dataloader_num_workers))

    def write(place: Path, weights: dict[str, torch.Tensor] | None) -> None:
        save_tuned(model, place, None, weights)
        PROMPT.save(place)

    folder.mkdir(parents=True, exist_ok=True)
    return TrainingLoop(plan, model, optimization, launch, folder, write, faults=policy)


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "anomalies.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights(made: TrainingLoop) -> dict[str, torch.Tensor]:
    """The trained parameters, whole."""
    found = {}
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            if hasattr(parameter, "ds_id"):
                from deepspeed import zero

                with zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().clone()
            else:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                found[name] = whole.detach().clone()
    return found


def watch_steps(made: TrainingLoop) -> tuple[list[dict[str, torch.Tensor]], TrainerCallback]:
    """The parameters after each step, from the start on, filled while the training runs with the callback."""

    class Keep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen.append(weights(made))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(weights(made))

    seen: list[dict[str, torch.Tensor]] = []
    return seen, Keep()


def moved(seen: list[dict[str, torch.Tensor]]) -> list[bool]:
    """For each step whether it changed any bit of the parameters."""
    return [
        any(not torch.equal(one[name], other[name]) for name in one) for one, other in zip(seen, seen[1:], strict=False)
    ]


def spoil_loss(monkeypatch: Any, when: Callable[[int, list[str]], bool], value: float = float("nan")) -> None:
    """Make the token losses of a question not finite; `when(step, sample ids)` chooses the packs."""
    from vlm_sft.model import packed_forward

    sound = packed_forward.token_losses
    current = {"step": 0}
    real = packed_forward.packed

    def packed(batch: Any, mode: Any, step: int) -> Any:
        current["step"] = step
        return real(batch, mode, step)

    def token_losses(model: Any, batch: Any, mode: Any, *smoothing: float) -> torch.Tensor:
        losses = sound(model, batch, mode, *smoothing)
        if when(current["step"], batch.sample_ids):
            first = batch.target_branch == 1
            losses = losses + torch.where(first, value, 0.0)
        return losses

    monkeypatch.setattr(packed_forward, "packed", packed)
    monkeypatch.setattr(packed_forward, "token_losses", token_losses)


def on_ranks(folder: Path, parallel: str) -> None:
    """In a rank's own process: steps 2 and 4 are bad on rank 1; writes what the steps did."""
    launch = read_launch(None, parallel if parallel.startswith("zero") else None, parallel == "fsdp")
    patch = pytest.MonkeyPatch()
    spoil_loss(patch, lambda step, ids: launch.rank == 1 and step in (1, 3))
    with connected(launch):
        made = trainer(prepared(samples()), folder, launch=launch, budget=300)
        seen, keep = watch_steps(made)
        made.run([keep])
    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    value = {"moved": moved(seen), "rates": rates, "losses": losses, "names": len(seen[0])}
    (folder / f"rank{launch.rank}.json").write_text(json.dumps(value))


if __name__ == "__main__":
    on_ranks(Path(sys.argv[1]), sys.argv[2])
