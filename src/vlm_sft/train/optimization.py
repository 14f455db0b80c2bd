"""How an optimizer step is taken where every rank holds all weights: optimizer and learning rate of PyTorch.

`deepspeed_engine.py` has the same methods for ZeRO. The loop decides when a step is taken; these decide how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import Adafactor

from vlm_sft.common.artifacts import FULL_WEIGHTS, FULL_WEIGHTS_INDEX, read_json
from vlm_sft.common.errors import RunError
from vlm_sft.common.manifest import naming
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.collectives import broadcast
from vlm_sft.distributed.launch import Launch
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.matmul import mixed_precision
from vlm_sft.model.families import PackMode
from vlm_sft.model.packed_forward import Objective
from vlm_sft.model.parts import part_parameters
from vlm_sft.model.saved_adapter import require_places
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.recipe.schedule import Schedule, rate_factor
from vlm_sft.recipe.schema import BITSANDBYTES, Recipe
from vlm_sft.train.bitsandbytes_adamw import make_bitsandbytes_adamw, page_moments
from vlm_sft.train.checkpoint.serialization import load_state, save_state
from vlm_sft.train.health import Health

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.json"
# Weight decay is for matrices: not for biases and the scales of norms, by their names in every family.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class PackGradients(Protocol):
    """The gradients of one optimizer step while they are computed."""

    def add(self, pack: PackedBatch) -> None:
        """Forward and backward of one pack."""


class Optimization(Protocol):
    """What the loop needs of PyTorch's optimizer or DeepSpeed's engine.

    Attributes:
        model: what a forward pass calls; it may be wrapped.
        optimizer, scheduler: as callbacks of transformers expect them.
        everywhere: whether every rank writes its part of a checkpoint, not rank 0 alone.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    everywhere: bool

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""

    def begin(self, packs: int, step: int, scale: float, mode: PackMode, health: Health) -> PackGradients:
        """Begin the gradients of an optimizer step.

        Args:
            packs: how many there will be on this rank.
            step: optimizer steps done.
            scale: what token losses are multiplied by.
            mode: how packs are computed.
            health: the ranks' vote.
        """

    def agree(self, step: int, gradients: Any, health: Health) -> bool:
        """Whether all ranks may use their gradients; every rank must call it once, after the last pack.

        Args:
            step: the step, 1 for the first.
            gradients: of the step.
            health: the ranks' vote.
        """

    def step(self, gradients: Any) -> float | None:
        """Take the step: gradients are averaged over the ranks and clipped. Returns their norm before clipping."""

    def skip(self) -> None:
        """Take no step, but keep the learning rate in line with the number of steps."""

    def learning_rate(self) -> float:
        """Of the step that comes next."""

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Trained weights gathered from all ranks, on rank 0; None where the model has them. All ranks must call it."""

    def save(self, folder: Path) -> None:
        """Write what a resume needs into a checkpoint."""

    def problem(self, folder: Path) -> str:
        """Why a written checkpoint is not whole; "" when it is."""

    def load(self, folder: Path) -> None:
        """Restore weights, optimizer and learning rate from a checkpoint."""

    def load_weights(self, folder: Path) -> None:
        """Restore the weights of a checkpoint alone."""

    def close(self) -> None:
        """Free what the training took beside the model."""


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups: with weight decay, and without it (biases, scales of norms)."""
    plain = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    decayed: list[torch.nn.Parameter] = []
    other: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (other if name in plain or _NOT_DECAYED.search(name.lower()) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trained parameters by weight decay, and by learning rate where a part of the model has its own.

    The two groups of `decay_groups` come first, without the parameters of such parts: what is shown as the learning
    rate is theirs.
    """
    groups = decay_groups(model, recipe.weight_decay)
    given = {"vision": recipe.vision_learning_rate, "projector": recipe.projector_learning_rate}
    rates = {part: rate for part, rate in given.items() if rate is not None}
    if not rates:
        return groups
    part_of = part_parameters(model)
    own = []
    for part, rate in rates.items():
        for group in groups:
            here = [parameter for parameter in group["params"] if part_of.get(id(parameter)) == part]
            own += [{**group, "params": here, "lr": rate}] if here else []
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if part_of.get(id(parameter)) not in rates]
    return [*groups, *own]


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trained parameters."""
    groups = parameter_groups(model, recipe)
    if recipe.optim == "adafactor":
        return Adafactor(groups, lr=recipe.learning_rate, scale_parameter=False, relative_step=False)
    if recipe.optim in BITSANDBYTES:
        return make_bitsandbytes_adamw(model, groups, recipe)
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True if recipe.optim == "adamw_torch_fused" else None,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, schedule: Schedule) -> LambdaLR:
    """The recipe's course of the learning rate, whose first step is not at 0."""
    factor = partial(
        rate_factor,
        recipe.lr_scheduler_type,
        schedule.warmup_steps,
        schedule.total_steps,
        lowest=recipe.min_lr_ratio,
        decay_ratio=recipe.lr_decay_ratio,
        decay_type=recipe.lr_decay_type,
    )
    return LambdaLR(optimizer, factor)


class TorchOptimization:
    """One optimizer on every rank, over gradients that are averaged over the ranks.

    Args:
        model: with its trained parameters, on its device.
        recipe, schedule: of the run.
        launch: ranks and device.
        dtype: number format of the base; bfloat16 is computed under autocast.
    """

    everywhere = False

    def __init__(
        self, model: torch.nn.Module, recipe: Recipe, schedule: Schedule, launch: Launch, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, recipe)
        self.scheduler = make_scheduler(self.optimizer, recipe, schedule)
        self.precision: Callable[[], AbstractContextManager[Any]] = partial(mixed_precision, launch.device, dtype)
        self._objective = Objective.of(recipe)
        self._paged = recipe.optim.startswith("paged")
        self._max_norm = recipe.max_grad_norm or float("inf")
        self._world_size = launch.world_size
        for parameter in model.parameters():
            if parameter.requires_grad and not is_partitioned(parameter):
                broadcast(parameter.data)  # the same everywhere at the start, whatever a rank drew or read

    def begin(self, packs: int, step: int, scale: float, mode: PackMode, health: Health) -> StepGradients:
        """As of `Optimization`."""
        return StepGradients(self.model, mode, step, scale, self.precision, self._objective)

    def agree(self, step: int, gradients: StepGradients, health: Health) -> bool:
        """As of `Optimization`."""
        return health.vote(step, gradients)

    def step(self, gradients: StepGradients) -> float:
        """As of `Optimization`."""
        if self._world_size > 1:
            gradients.average(self._world_size)
        gradients.assign()
        norm = torch.nn.utils.clip_grad_norm_(gradients.parameters, self._max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return float(norm)

    def skip(self) -> None:
        """As of `Optimization`."""
        self.scheduler.step()

    def learning_rate(self) -> float:
        """As of `Optimization`."""
        return float(self.scheduler.get_last_lr()[0])

    def weights(self) -> None:
        """As of `Optimization`."""

    def save(self, folder: Path) -> None:
        """As of `Optimization`."""
        save_state(folder / OPTIMIZER, self.optimizer.state_dict())
        with naming(folder / SCHEDULER):
            (folder / SCHEDULER).write_text(json.dumps(self.scheduler.state_dict()), encoding="utf-8")

    def problem(self, folder: Path) -> str:
        """As of `Optimization`."""
        return ""

    def load(self, folder: Path) -> None:
        """As of `Optimization`."""
        self.load_weights(folder)
        self.optimizer.load_state_dict(load_state(folder / OPTIMIZER))
        if self._paged:
            page_moments(self.optimizer)
        self.scheduler.load_state_dict(read_json(folder / SCHEDULER))

    def load_weights(self, folder: Path) -> None:
        """As of `Optimization`."""
        read_weights(self.model, folder)

    def close(self) -> None:
        """As of `Optimization`."""
        self.optimizer.zero_grad()


def read_weights(model: Any, folder: Path) -> None:
    """Read the weights of a checkpoint into a model in training.

    Args:
        model: with the adapter, or whole.
        folder: the checkpoint; it must have been verified.

    Raises:
        ModelError: the checkpoint holds adapter weights that the model has no place for.
        RunError: the weights of a whole model are not all there.
    """
    if isinstance(model, PeftModel):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        assert all(parameter.requires_grad for parameter in trained), "an adapter in training stays trainable"
        require_places(folder, model)
        return
    # Weights that share their memory are written once.
    absent = {name for name, _ in model.named_parameters()}
    for file in weight_files(folder):
        weights = load_file(file)
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        absent -= weights.keys()
        if unknown:
            raise RunError(f"{file}: the model has no {', '.join(unknown[:3])}", "resume another checkpoint")
    if absent:
        raise RunError(f"{folder}: it has no {', '.join(sorted(absent)[:3])}", "resume another checkpoint")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a whole model."""
    index = folder / FULL_WEIGHTS_INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [FULL_WEIGHTS]
    return [folder / name for name in names]
