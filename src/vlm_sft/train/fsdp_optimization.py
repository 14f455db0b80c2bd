"""How an optimizer step is taken where FSDP divides weights, gradients and optimizer over the ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vlm_sft.common.artifacts import ADAPTER_WEIGHTS, read_json
from vlm_sft.common.errors import RecipeError, RunError
from vlm_sft.common.manifest import naming
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.collectives import agree
from vlm_sft.distributed.fsdp import like, number, overwrite, own_part, whole_on_first
from vlm_sft.distributed.launch import Launch
from vlm_sft.model import packed_forward
from vlm_sft.model.families import PackMode
from vlm_sft.model.packed_forward import Objective
from vlm_sft.model.step_gradients import loss_problem
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.checkpoint.serialization import load_state, save_state
from vlm_sft.train.health import Health, memory_error
from vlm_sft.train.optimization import SCHEDULER, TorchOptimization, weight_files

_SHARDS = "optimizer-*-of-*.safetensors"


def require_dividable(recipe: Recipe, launch: Launch) -> None:
    """Check, before anything is loaded, that FSDP can divide what a recipe asks for.

    Raises:
        RecipeError: it cannot.
    """
    if not launch.fsdp:
        return
    if recipe.load_in_4bit:
        raise RecipeError("--load_in_4bit true: FSDP does not divide 4-bit weights here", "leave --fsdp out")
    if not recipe.optim.startswith("adamw_torch"):
        raise RecipeError(
            f"optim {recipe.optim}: its state cannot be divided by rows, as --fsdp does",
            "use optim adamw_torch_fused with it, or leave --fsdp out",
        )


class DividedOptimization(TorchOptimization):
    """The optimizer of every rank over its rows of each trained tensor; see `Optimization` for the methods."""

    everywhere = True

    def __init__(
        self, model: torch.nn.Module, recipe: Recipe, schedule: Schedule, launch: Launch, dtype: torch.dtype
    ) -> None:
        super().__init__(model, recipe, schedule, launch, dtype)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._rank = launch.rank

    def begin(  # type: ignore[override]
        self, packs: int, step: int, scale: float, mode: PackMode, health: Health
    ) -> DividedGradients:
        """As of `Optimization`."""
        self.optimizer.zero_grad()
        return DividedGradients(self.model, mode, step, scale, packs, self.precision, self._objective)

    def agree(self, step: int, gradients: DividedGradients, health: Health) -> bool:  # type: ignore[override]
        """As of `Optimization`: a gradient is looked at when it is known that no loss spoiled it."""
        loss = float(gradients.loss)
        bad = loss_problem(gradients.tokens, loss)
        if not health.agree(step, loss, bad, gradients.sample_ids):
            return False
        if math.isfinite(number(gradients.norm(self._trained))):
            return True
        event = {"detail": "the gradient is not finite", "sample_ids": gradients.sample_ids, "source": "gradient"}
        return health.agree(step, loss, event, gradients.sample_ids)

    def step(self, gradients: DividedGradients) -> float:  # type: ignore[override]
        """As of `Optimization`."""
        norm = gradients.norm(self._trained)
        clip_grads_with_norm_(self._trained, self._max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return number(norm)

    def weights(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """As of `Optimization`."""
        adapter = isinstance(self.model, PeftModel)
        found: dict[str, torch.Tensor | None] = {}
        gathered: dict[int, torch.Tensor | None] = {}  # tied weights are written once
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad or not adapter:
                if id(parameter) not in gathered:
                    gathered[id(parameter)] = whole_on_first(parameter)
                found[name] = gathered[id(parameter)]
        if not adapter:
            kept = self.model.state_dict().keys()
            found |= {name: buffer.cpu() for name, buffer in self.model.named_buffers() if name in kept}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def save(self, folder: Path) -> None:
        """As of `Optimization`: every rank writes its part of the optimizer's state."""
        state = self.optimizer.state_dict()
        own = {
            number: {name: own_part(value) if isinstance(value, torch.Tensor) else value for name, value in one.items()}
            for number, one in state["state"].items()
        }
        ranks = torch.distributed.get_world_size()
        save_state(folder / f"optimizer-{self._rank}-of-{ranks}.safetensors", {**state, "state": own})
        if self._rank == 0:
            with naming(folder / SCHEDULER):
                (folder / SCHEDULER).write_text(json.dumps(self.scheduler.state_dict()), encoding="utf-8")

    def problem(self, folder: Path) -> str:
        """As of `Optimization`: the state must be there for every rank, which a disk of one node's own has not."""
        count, ranks = len(list(folder.glob(_SHARDS))), torch.distributed.get_world_size()
        if count == ranks:
            return ""
        return f"{count} of {ranks} ranks' states are in it: is --output_dir on a disk that all nodes share?"

    def load(self, folder: Path) -> None:
        """As of `Optimization`."""
        self.load_weights(folder)
        ranks = torch.distributed.get_world_size()
        state = load_state(folder / f"optimizer-{self._rank}-of-{ranks}.safetensors")
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        for index, one in state["state"].items():
            place = parameters[index]
            for name, value in one.items():
                if isinstance(value, torch.Tensor) and value.dim():  # not the number of the step
                    one[name] = like(value, place)
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(read_json(folder / SCHEDULER))

    def load_weights(self, folder: Path) -> None:
        """As of `Optimization`: rank 0 reads them and hands them out.

        Raises:
            RunError: the checkpoint has not all weights of the model.
        """
        places = self._places()
        files = agree(lambda: _files_of(folder, places.keys(), isinstance(self.model, PeftModel)))
        for file, names in files.items():
            if self._rank:
                for name in names:
                    overwrite(places[name], None)
                continue
            with safe_open(file, framework="pt") as stream:
                for name in names:
                    overwrite(places[name], stream.get_tensor(name))

    def _places(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the model, by its name there."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        if isinstance(self.model, PeftModel):
            trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
            return dict(get_peft_model_state_dict(self.model, state_dict=trained, save_embedding_layers=False))
        kept = self.model.state_dict().keys()
        return own | {name: buffer for name, buffer in self.model.named_buffers() if name in kept}


def _files_of(folder: Path, wanted: Any, adapter: bool) -> dict[str, list[str]]:
    """The files of a checkpoint's weights with the names in them; tied weights are written under one of their names.

    Raises:
        RunError: they hold a name that the model does not have.
    """
    found: dict[str, list[str]] = {}
    for file in [folder / ADAPTER_WEIGHTS] if adapter else weight_files(folder):
        with safe_open(file, framework="pt") as stream:
            found[str(file)] = sorted(stream.keys())
        if unknown := sorted(set(found[str(file)]) - set(wanted)):
            raise RunError(f"{file}: the model has no {', '.join(unknown[:3])}", "resume another checkpoint")
    return found


class DividedGradients:
    """The gradients of one step under FSDP, where every pass needs every rank.

    An adapter's are added up whole on each rank and exchanged once, with the last pack. Those of a whole model would
    not fit: they are exchanged with every pack, and a rank adds up its rows.

    Args:
        model, mode, step, scale, precision, objective: as of `StepGradients`.
        packs: of the step; the same number on every rank.
    """

    def __init__(
        self,
        model: Any,
        mode: PackMode,
        step: int,
        scale: float,
        packs: int,
        precision: Callable[[], AbstractContextManager[Any]],
        objective: Objective,
    ) -> None:
        self.model, self.mode, self.step, self.scale, self.left = model, mode, step, scale, packs
        self.precision, self.objective = precision, objective
        self.device = own_part(next(model.parameters())).device
        self.loss = torch.zeros((), device=self.device)
        self.sample_ids: list[str] = []
        self.tokens: list[tuple[PackedBatch, torch.Tensor]] = []
        self._each = not isinstance(model, PeftModel)
        self._norm: torch.Tensor | None = None

    def add(self, pack: PackedBatch) -> None:
        """Forward and backward of one pack.

        Raises:
            DeviceMemoryError: the pack does not fit; the ranks wait for each other in every pass, so it ends the run.
        """
        self.left -= 1
        self.model.set_requires_gradient_sync(self._each or not self.left)
        self.sample_ids += pack.sample_ids
        try:
            here = pack.to(self.device)
            with packed_forward.packed(here, self.mode, self.step):
                with self.precision():
                    losses = packed_forward.training_losses(self.model, here, self.mode, self.objective)
                    loss = here.weighted_sum(losses) * self.scale
                loss.backward()
        except torch.OutOfMemoryError as error:
            tokens = pack.tokens if self.mode.shares else pack.padded_tokens
            raise memory_error(self.step + 1, torch.distributed.get_rank(), tokens) from error
        self.loss += loss.detach().float()
        self.tokens.append((pack, losses.detach()))

    def norm(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """() norm of the gradients of all ranks, before clipping; all ranks must call it."""
        if self._norm is None:
            self._norm = get_total_norm([one.grad for one in parameters if one.grad is not None])
        return self._norm
