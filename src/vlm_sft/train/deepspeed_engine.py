"""How an optimizer step is taken by DeepSpeed's engine: ZeRO-2, ZeRO-3, or a configuration of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations import HfDeepSpeedConfig

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import NumericalError, RunError
from vlm_sft.data.collate import PackedBatch
from vlm_sft.distributed.launch import Launch
from vlm_sft.distributed.zero import is_partitioned, release_weights
from vlm_sft.model import packed_forward
from vlm_sft.model.families import PackMode
from vlm_sft.model.packed_forward import Objective
from vlm_sft.model.step_gradients import StepGradients, loss_problem
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.health import Health, memory_error
from vlm_sft.train.optimization import SCHEDULER, make_optimizer, make_scheduler, parameter_groups

AUTO = "auto"


def resolve_config(launch: Launch, recipe: Recipe, bf16: bool, hidden_size: int) -> dict[str, Any]:
    """Fill in what DeepSpeed's configuration leaves to the recipe: its "auto" values, and what a step needs.

    One engine step is one optimizer step whatever the number of packs, so batch sizes and accumulation are 1 here.

    Args:
        launch: ranks and configuration.
        recipe: of the run.
        bf16: whether the base is in bfloat16.
        hidden_size: width of the language model; sizes of buckets follow from it, as transformers chooses them.

    Raises:
        RunError: the configuration contradicts the recipe, or has an "auto" that is not known.
    """
    assert launch.deepspeed is not None
    config = copy.deepcopy(launch.deepspeed)
    needed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": launch.world_size,
        "gradient_clipping": recipe.max_grad_norm,
    }
    wanted = needed | {
        "optimizer.params.lr": recipe.learning_rate,
        "optimizer.params.betas": [recipe.adam_beta1, recipe.adam_beta2],
        "optimizer.params.eps": recipe.adam_epsilon,
        "optimizer.params.weight_decay": recipe.weight_decay,
        "bf16.enabled": bf16,
        "fp16.enabled": False,
    }
    free = {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for name, value in needed.items():
        config.setdefault(name, value)
    wrong = []
    for name, value in (wanted | free).items():
        *path, key = name.split(".")
        place = config
        for part in path:
            place = place.get(part, {})
        if place.get(key) == AUTO:
            place[key] = value
        elif name in wanted and place.get(key, value) != value:
            wrong.append(f"{name} is {place[key]} there and {value} in the recipe")
    wrong += [f"{name}: nothing is known for {AUTO}" for name in _auto_values(config)]
    if wrong:
        raise RunError(
            f"--deepspeed: {'; '.join(wrong)}", f'write "{AUTO}" for what the recipe says, a value elsewhere'
        )
    return config


def _auto_values(config: dict[str, Any], path: str = "") -> list[str]:
    """The names of values that are still "auto"."""
    found = [f"{path}{key}" for key, value in config.items() if value == AUTO]
    for key, value in config.items():
        if isinstance(value, dict):
            found += _auto_values(value, f"{path}{key}.")
    return found


def zero_stage(config: dict[str, Any]) -> int:
    """Which stage of ZeRO a configuration asks for; 0 for none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def partition_while_loading(config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Under ZeRO-3: let transformers share weights out over the ranks while it loads them, as long as this lives."""
    return HfDeepSpeedConfig(config) if zero_stage(config) == 3 else None


class DeepSpeedOptimization:
    """DeepSpeed's engine around a model; see `Optimization` for the methods.

    Args:
        model: with its trained parameters.
        recipe, schedule: of the run.
        config: from `resolve_config`.
        loading: what `partition_while_loading` gave; it lives as long as the engine.

    Attributes:
        engine: the engine.
        stage: of ZeRO.
    """

    everywhere = True

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        schedule: Schedule,
        config: dict[str, Any],
        loading: HfDeepSpeedConfig | None = None,
    ) -> None:
        import deepspeed

        self.stage = zero_stage(config)
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext  # the engine holds bfloat16 itself
        self._objective = Objective.of(recipe)
        self._loading = loading
        own: dict[str, Any]
        if "optimizer" in config:
            trained: list[Any] = [one for one in model.parameters() if one.requires_grad]
            if recipe.vision_learning_rate is not None or recipe.projector_learning_rate is not None:
                trained = [group for group in parameter_groups(model, recipe) if group["params"]]
            own = {"model_parameters": trained}
        else:
            own = {"optimizer": _client_optimizer(model, recipe, config)}
            config = config | {"zero_allow_untested_optimizer": True}
        scheduler = partial(make_scheduler, recipe=recipe, schedule=schedule)
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model, config=config, lr_scheduler=scheduler, **own
        )
        self.model = self.engine
        self._rank = torch.distributed.get_rank()
        self._ranks = torch.distributed.get_world_size()

    def begin(
        self, packs: int, step: int, scale: float, mode: PackMode, health: Health
    ) -> StepGradients | PartitionedGradients:
        """As of `Optimization`."""
        if self.stage == 3:
            return PartitionedGradients(self.engine, mode, step, scale, packs, health, self._objective)
        return StepGradients(self.engine.module, mode, step, scale, self.precision, self._objective)

    def agree(self, step: int, gradients: StepGradients | PartitionedGradients, health: Health) -> bool:
        """As of `Optimization`."""
        return health.vote(step, gradients) if isinstance(gradients, StepGradients) else gradients.confirmed()

    def step(self, gradients: StepGradients | PartitionedGradients) -> float | None:
        """As of `Optimization`; under ZeRO-3 the engine has taken it in the last backward pass."""
        if isinstance(gradients, StepGradients):
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.backward(gradients.surrogate(), scale_wrt_gas=False)
            self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def skip(self) -> None:
        """As of `Optimization`."""
        self.scheduler.step()

    def learning_rate(self) -> float:
        """As of `Optimization`."""
        return float(self.scheduler.get_last_lr()[0])

    def weights(self) -> dict[str, torch.Tensor] | None:
        """As of `Optimization`: copies, since the engine's tensors are views of large buffers."""
        module = self.engine.module
        adapter = isinstance(module, PeftModel)
        found: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if adapter and not parameter.requires_grad:
                continue
            with _gathered([parameter]):
                if self._rank == 0:
                    found[name] = parameter.detach().to("cpu", copy=True)
        if not adapter and self._rank == 0:
            kept = module.state_dict().keys()
            found |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in kept}
        return found

    def save(self, folder: Path) -> None:
        """As of `Optimization`: what every rank holds, as the engine writes it."""
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)

    def problem(self, folder: Path) -> str:
        """As of `Optimization`: the state must be there for every rank, which a disk of one node's own has not."""
        count = len(list(folder.rglob("*_optim_states.pt")))
        if not self.stage or count == self._ranks:
            return ""
        return f"{count} of {self._ranks} ranks' states are in it: is --output_dir on a disk that all nodes share?"

    def load(self, folder: Path) -> None:
        """As of `Optimization`."""
        self.load_weights(folder)
        if (folder / SCHEDULER).is_file():  # of a run before the engine held the learning rate
            self.scheduler.load_state_dict(read_json(folder / SCHEDULER))

    def load_weights(self, folder: Path) -> None:
        """As of `Optimization`: with all that the engine has written beside them.

        Raises:
            RunError: the checkpoint has no state of an engine.
        """
        strict = not isinstance(self.engine.module, PeftModel)
        path, _ = self.engine.load_checkpoint(str(folder), load_module_strict=strict)
        if path is None:
            raise RunError(f"{folder} has no state of DeepSpeed", "resume it as it was trained, without --deepspeed")

    def close(self) -> None:
        """As of `Optimization`."""
        self.engine.destroy()
        release_weights(self.model)


def _gathered(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Make parameters whole on all ranks while the block runs."""
    if not is_partitioned(*parameters):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(list(parameters))  # type: ignore[no-any-return]


def _client_optimizer(model: torch.nn.Module, recipe: Recipe, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that the engine wraps; where its state is kept in host memory, the one that computes there."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload == "none" or not config.get("zero_force_ds_cpu_optimizer", True):
        return make_optimizer(model, recipe)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(  # type: ignore[no-any-return]
        parameter_groups(model, recipe),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
    )


class PartitionedGradients:
    """The gradients of one step under ZeRO-3, where every pass needs every rank and the engine holds the sums.

    The ranks vote before the last backward pass, with which the engine takes its step.

    Args:
        engine: DeepSpeed's.
        mode, step, scale: as of `StepGradients`.
        packs: of the step; the same number on every rank.
        health: the ranks' vote.
        objective: what is made small.
    """

    def __init__(
        self, engine: Any, mode: PackMode, step: int, scale: float, packs: int, health: Health, objective: Objective
    ) -> None:
        self.engine, self.mode, self.step, self.scale, self.left = engine, mode, step, scale, packs
        self.health, self.objective = health, objective
        self.sample_ids: list[str] = []
        self._good = True
        self._total = torch.zeros((), device=engine.device)
        self._tokens: list[tuple[PackedBatch, torch.Tensor]] = []

    def add(self, pack: PackedBatch) -> None:
        """Forward and backward of one pack; with the last one the vote and the engine's step.

        Raises:
            DeviceMemoryError: the pack does not fit; the ranks wait for each other in every pass, so it ends the run.
        """
        self.left -= 1
        last = not self.left
        self.engine.set_gradient_accumulation_boundary(last)
        self.sample_ids += pack.sample_ids
        try:
            here = pack.to(self.engine.device)
            with packed_forward.packed(here, self.mode, self.step):
                losses = packed_forward.training_losses(self.engine, here, self.mode, self.objective)
                loss = here.weighted_sum(losses) * self.scale
                self._total += loss.detach().float()
                self._tokens.append((pack, losses.detach()))
                if last:
                    value = float(self._total)
                    bad = loss_problem(self._tokens, value)
                    self._good = self.health.agree(self.step + 1, value, bad, self.sample_ids)
                # The engine's optimizer drops a step whose gradient is not finite: on all ranks, or on none.
                self.engine.backward(loss if self._good else loss * float("nan"), scale_wrt_gas=False)
            if last:
                self.engine.step()
        except torch.OutOfMemoryError as error:
            tokens = pack.tokens if self.mode.shares else pack.padded_tokens
            raise memory_error(self.step + 1, torch.distributed.get_rank(), tokens) from error

    def confirmed(self) -> bool:
        """Whether the engine took the step that the ranks agreed on; a gradient that is not finite is known only now.

        Raises:
            NumericalError: the engine stepped although the ranks had voted against it.
        """
        applied, step = self.engine.was_step_applied(), self.step + 1
        if self._good and not applied:
            event = {"detail": "the gradient is not finite", "sample_ids": self.sample_ids, "source": "gradient"}
            return self.health.agree(step, float(self._total), event, self.sample_ids)
        if not self._good and applied:
            raise NumericalError(f"step {step}: this DeepSpeed stepped on numbers that are not finite", "update it")
        return self._good


def hidden_size_of(config: Any) -> int:
    """Width of the language model of a configuration."""
    text = config.get_text_config()
    return int(getattr(text, "hidden_size", 0) or max(getattr(text, "hidden_sizes", [1024])))
