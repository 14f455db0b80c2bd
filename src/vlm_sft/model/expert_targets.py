"""Experts as targets of LoRA: their weights are parameters of three dimensions, which PEFT adapts by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

from vlm_sft.common.errors import ModelError
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.protocols import AnyModel


def expert_parameters(model: AnyModel, root: str) -> list[str]:
    """Paths of the fused weights of experts below a path, in the order of the model.

    Args:
        model: the base model.
        root: a path with its last dot.
    """
    found = []
    for path, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        if count is None or not path.startswith(root) or not isinstance(module, torch.nn.Module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 that of the whole parameter
            if len(shape) == 3 and shape[0] == count:
                found.append(f"{path}.{name}")
    return found


def require_adaptable(model: torch.nn.Module, experts: Sequence[str], dropout: float, use_dora: bool) -> None:
    """Make sure that PEFT can adapt the weights of experts as the recipe asks.

    Args:
        model: the base model.
        experts: paths of the weights that are meant.
        dropout, use_dora: of the recipe.

    Raises:
        ModelError: it cannot.
    """
    if not experts:
        return
    named = f"--target_modules: {len(experts)} of the targets are weights of experts, e.g. {experts[0]}"
    if dropout:
        raise ModelError(f"{named}; PEFT adapts them without dropout only", "add --lora_dropout 0, or leave them out")
    if use_dora:
        raise ModelError(f"{named}; PEFT has no DoRA for them", "add --use_dora false, or leave them out")
    if is_partitioned(*(model.get_parameter(path) for path in experts)):
        raise ModelError(
            f"{named}; they are not adapted while they are divided", "use --deepspeed zero2 in place of zero3 or --fsdp"
        )


def adapted_path(path: str, module: LoraLayer) -> str:
    """What a module of PEFT adapts: its own path, or that of the parameter that it wraps.

    Args:
        path: of the module in the base model; wrappers of parameters of one module are nested.
        module: at that path.
    """
    if not isinstance(module, ParamWrapper):
        return path
    return f"{path.partition('.base_layer')[0]}.{module.parameter_name}"
