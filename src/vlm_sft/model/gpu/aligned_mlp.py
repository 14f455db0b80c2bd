"""Gated MLPs whose width the products of a GPU cannot take well.

The fast kernels of a GPU load rows that begin at multiples of 16 bytes. The MLPs of Qwen2.5-VL's tower are 3,420 wide,
no multiple of 8, so in half precision their products fall to kernels of an older generation. A width filled up with
zeros gives the same sums: silu(0) · 0 is 0, and the projection back multiplies it by 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.fuse import gated_parameters
from vlm_sft.model.forward_patch import agree_at_scales, exchange_forward, probe_rows

HALF = (torch.bfloat16, torch.float16)
_UNIT = 64  # values, of which tiles of products are multiples
_TOLERANCE = 0.05


def align_gated(model: torch.nn.Module) -> int:
    """Let frozen gated MLPs of an unaligned width compute with a wider one on GPUs; returns how many were changed."""
    return exchange_forward(model.modules(), _is_unaligned, _forward)


@torch.no_grad()
def _is_unaligned(module: torch.nn.Module) -> bool:
    parameters = gated_parameters(module)
    weight = parameters[0] if parameters else None
    if weight is None or weight.dtype not in HALF or not len(weight) % 8 or is_partitioned(weight):
        return False
    assert parameters is not None
    rows = probe_rows(weight, weight.shape[1])
    return agree_at_scales(lambda values: _gated(values, parameters), module, rows, _TOLERANCE)


def _gated(rows: torch.Tensor, parameters: list[torch.Tensor | None]) -> torch.Tensor:
    """down(silu(gate(x)) · up(x)); `parameters` are weight and bias of gate, up and down."""
    gate, gate_bias, up, up_bias, down, down_bias = parameters
    assert gate is not None and up is not None and down is not None
    return F.linear(F.silu(F.linear(rows, gate, gate_bias)) * F.linear(rows, up, up_bias), down, down_bias)


def _forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Forward of (…, C) hidden states on a GPU, while the module is frozen."""
    parameters = gated_parameters(module)
    if parameters is None or not hidden_states.is_cuda or not all(map(_is_frozen, parameters)):
        return None
    return _gated(hidden_states, widened(module, parameters))


def _is_frozen(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter is whole, on a GPU, in half precision, and not trained; so is one that is not there."""
    if parameter is None:
        return True
    whole = parameter.is_cuda and not is_partitioned(parameter)
    return whole and parameter.dtype in HALF and not parameter.requires_grad


def widened(module: Any, parameters: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The parameters with a width that is a multiple of `_UNIT`.

    The module's own become the first part of the wider ones, so there is one copy of them, and they keep their shapes,
    values and names.

    Args:
        module: where the wider ones are remembered.
        parameters: weight and bias of gate, up and down.
    """
    known = getattr(module, "widened_parameters", None)
    if known is not None and all(
        (one is None) == (wide is None) and (one is None or wide is None or one.data_ptr() == wide.data_ptr())
        for one, wide in zip(parameters, known, strict=True)
    ):
        return known
    made: list[torch.Tensor | None] = []
    for index, one in enumerate(parameters):
        # Weights and biases of gate and up grow in their rows, the weight of down in its columns, its bias not at all.
        axis = None if one is None or index == 5 else 1 if index == 4 else 0
        if one is None or axis is None:
            made.append(one)
            continue
        shape = list(one.shape)
        shape[axis] += -shape[axis] % _UNIT
        wide = one.new_zeros(shape)
        part = wide.narrow(axis, 0, one.shape[axis])
        part.copy_(one.detach())
        one.data = part
        made.append(wide)
    module.widened_parameters = made
    return made
