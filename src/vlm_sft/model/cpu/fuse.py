"""Modules that are computed in fewer steps with the same values.

RMSNorm as one node of autograd, on CPUs: the modules of transformers compute it in six elementwise steps, each of which
keeps an activation for the backward pass and reads it again there. The closed form of the gradient (Zhang and Sennrich
2019, "Root Mean Square Layer Normalization", section 4) needs the input and one number a row.

Patch embedding as one matrix product: a convolution whose window is the whole input is one, and the libraries'
convolutions are several times slower at it.

A frozen gated MLP, down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv:2002.05202), block by block, on CPUs: it is most of
a language model's arithmetic. Computed for all tokens at once it writes four matrices that are larger than a
processor's cache and reads them again from memory; in blocks of tokens they stay in the cache. The backward pass needs
gate(x) and up(x) only, and every block has one shape, which is what `matmul.multiply` wants.

With weights in bfloat16, what is between its products stays in it, too: it is rounded before the next one anyway, and
takes half the memory until the backward pass. Activations are computed in float32 and rounded.

The vocabulary of a few generated tokens through oneDNN, on CPUs: it reads the weights about once, MKL repacks them in
every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.matmul import (
    EXACT,
    NARROW_BLOCK,
    TOLERANCE,
    TOLERANCE_NARROW,
    gating_operators,
    is_frozen,
    multiply,
    narrow_blocks,
    stream_dtype,
)
from vlm_sft.model.forward_patch import agree_at_scales, exchange_forward, probe_rows
from vlm_sft.model.vision_features import head_of

_FEW_ROWS = 64  # of generated tokens; beyond it both libraries take as long
_ROUNDED_ROWS = 8  # they are filled up to a multiple, so that few shapes occur
_BLOCK = 512  # tokens
_GATED_PARTS = ("gate_proj", "up_proj", "down_proj")


class _RMSNorm(torch.autograd.Function):
    """y = w · x / rms(x) over the last dimension, for a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Normalise (…, C) values."""
        squares = torch.linalg.vecdot(values, values).unsqueeze(-1)
        inverse = squares.div_(values.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(values, weight, inverse)
        return (values * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the values; the weight has none."""
        values, weight, inverse = ctx.saved_tensors
        scaled = gradients[0] * weight
        slope = torch.linalg.vecdot(scaled, values).unsqueeze(-1)
        slope.mul_(inverse).mul_(inverse).div_(-values.shape[-1])
        return scaled.addcmul_(values, slope).mul_(inverse), None, None


def fuse_modules(model: torch.nn.Module) -> int:
    """Change the modules of a model that have a faster form; returns how many were changed."""
    return fuse_norms(model) + fuse_patches(model) + fuse_head(model) + fuse_gated(model)


def fuse_patches(model: torch.nn.Module) -> int:
    """Let convolutions over single patches compute a matrix product; returns how many were changed."""
    return exchange_forward(model.modules(), _is_patch_embedding, _patch_forward)


def _is_patch_embedding(module: torch.nn.Module) -> bool:
    if type(module) is not torch.nn.Conv3d:  # a class of the family's own may compute more
        return False
    plain = module.groups == 1 and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)
    return plain and module.kernel_size == module.stride


def _patch_forward(module: Any, patches: torch.Tensor) -> torch.Tensor | None:
    """Convolve (patches, C, T, H, W) where each patch is as large as the window: a matrix product."""
    if patches.shape[2:] != module.kernel_size:
        return None
    embedded = F.linear(patches.flatten(1), module.weight.flatten(1), module.bias)
    return embedded[:, :, None, None, None]


def fuse_head(model: torch.nn.Module) -> int:
    """Let the projection to the vocabulary of few rows read its weights once; returns how many were changed."""
    try:
        head = head_of(model)
    except Exception:  # no model of transformers, or one without a head
        return 0
    return exchange_forward([head], _is_plain_linear, _head_forward) if isinstance(head, torch.nn.Module) else 0


def _is_plain_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and module.bias is None


def _head_forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Logits of a few rows of (…, C) hidden states on a CPU, without gradients."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    trained = torch.is_grad_enabled() and (module.weight.requires_grad or hidden_states.requires_grad)
    covered = 1 < len(rows) <= _FEW_ROWS and rows.dtype == module.weight.dtype == torch.float32
    if trained or not covered or rows.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    logits = multiply(F.pad(rows, (0, 0, 0, -len(rows) % _ROUNDED_ROWS)), module.weight)[: len(rows)]
    return logits.reshape(*hidden_states.shape[:-1], -1)


def fuse_norms(model: torch.nn.Module) -> int:
    """Let the RMSNorm modules of a model compute in one step, on CPUs, in float32 or float64, while frozen.

    A module counts as RMSNorm when it has a weight and an epsilon and gives the values of the formula, with the weight
    as it is or (Gemma, Qwen3.5) with 1 added to it.

    Returns:
        How many modules were changed.
    """
    return sum(
        exchange_forward(model.modules(), partial(_is_rms_norm, offset), partial(_norm_forward, offset))
        for offset in (0.0, 1.0)
    )


def _epsilon(module: Any) -> float:
    """What is added to the mean of squares."""
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


@torch.no_grad()
def _is_rms_norm(offset: float, module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False
    if not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")) or is_partitioned(weight):
        return False
    if weight.device.type != "cpu" or weight.dtype not in EXACT:
        return False
    return agree_at_scales(
        lambda values: _RMSNorm.apply(values, weight + offset, _epsilon(module)),
        module,
        probe_rows(weight, len(weight)),
        TOLERANCE,
    )


def _norm_forward(offset: float, module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Normalise (…, C) values in one step where that is the same and faster."""
    weight = module.weight
    exact = hidden_states.dtype == weight.dtype and hidden_states.dtype in EXACT
    trained = torch.is_grad_enabled() and weight.requires_grad
    if not exact or trained or hidden_states.device.type != "cpu":
        return None
    return _RMSNorm.apply(hidden_states, weight + offset if offset else weight, _epsilon(module))


class _GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)) of (T, C) rows, for weights that are not trained."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
        """Compute rows; `parameters` are weight and bias of gate, up and down."""
        gate, gate_bias, up, up_bias, down, down_bias = parameters
        assert gate is not None and up is not None and down is not None
        kept: list[torch.Tensor] = []
        outputs = []
        for block in rows.split(_BLOCK):
            whole = len(block) == _BLOCK
            gates, ups = multiply(block, gate, gate_bias, whole), multiply(block, up, up_bias, whole)
            outputs.append(multiply(F.silu(gates).mul_(ups), down, down_bias, whole))
            if ctx.needs_input_grad[0]:
                kept += [gates, ups]
        ctx.save_for_backward(gate, up, down, *kept)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the rows."""
        gate, up, down, *kept = ctx.saved_tensors
        slopes = []
        for index, block in enumerate(gradients[0].split(_BLOCK)):
            whole = len(block) == _BLOCK
            gates, ups = kept[2 * index : 2 * index + 2]
            products = multiply(block, down.T, None, whole)
            of_ups = F.silu(gates).mul_(products)
            of_gates = torch.ops.aten.silu_backward(products.mul_(ups), gates)
            slopes.append(multiply(of_gates, gate.T, None, whole).add_(multiply(of_ups, up.T, None, whole)))
        return torch.cat(slopes), *[None] * 6


class _NarrowGatedMLP(torch.autograd.Function):
    """The same of float32 rows, for weights in bfloat16; biases were in it, too, before they were widened."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
        """As of `_GatedMLP`."""
        gate, gate_bias, up, up_bias, down, down_bias = (
            None if one is None else one.to(torch.bfloat16) for one in parameters
        )
        assert gate is not None and up is not None and down is not None
        operators = None if ctx.needs_input_grad[0] else gating_operators()
        kept: list[torch.Tensor] = []
        output = rows.new_empty(len(rows), len(down))
        for block, part in zip(narrow_blocks(rows), output.split(NARROW_BLOCK), strict=True):
            if operators is not None:
                with_activation, with_factor = operators
                gated = with_activation(block, gate, gate_bias, "swish", [], "")
                inner = with_factor(block, gated, up, up_bias, "mul")
            else:
                gates, ups = F.linear(block, gate, gate_bias), F.linear(block, up, up_bias)
                inner = F.silu(gates).mul_(ups)
                kept += [gates, ups]
            part.copy_(F.linear(inner, down, down_bias)[: len(part)])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gate, up, down, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the rows."""
        gate, up, down, *kept = ctx.saved_tensors
        slopes = gradients[0].new_empty(len(gradients[0]), gate.shape[1])
        parts = zip(narrow_blocks(gradients[0]), slopes.split(NARROW_BLOCK), kept[::2], kept[1::2], strict=True)
        for block, part, gates, ups in parts:
            products = torch.mm(block, down)
            of_ups = F.silu(gates).mul_(products)
            of_gates = torch.ops.aten.silu_backward(products.mul_(ups), gates)
            part.copy_(torch.mm(of_gates, gate)[: len(part)]).add_(torch.mm(of_ups, up)[: len(part)])
        return slopes, *[None] * 6


def gated_rows(rows: torch.Tensor, parameters: list[torch.Tensor | None]) -> torch.Tensor:
    """A frozen gated MLP of (T, C) rows.

    Args:
        rows: (T, C), in float32 or float64.
        parameters: weight and bias of gate, up and down; weights may be in bfloat16 beside float32 rows.
    """
    weights = parameters[::2]
    narrow = rows.dtype == torch.float32 and all(one is not None and one.dtype == torch.bfloat16 for one in weights)
    return (_NarrowGatedMLP if narrow else _GatedMLP).apply(rows, *parameters)


def fuse_gated(model: torch.nn.Module) -> int:
    """Let the gated MLPs of a model compute block by block; returns how many were changed.

    A module counts as one when it has the three projections, nothing else that is trained, and gives the values of the
    formula with SiLU.
    """
    return exchange_forward(model.modules(), _is_gated, _gated_forward)


def gated_parameters(module: Any) -> list[torch.Tensor | None] | None:
    """Weight and bias of gate, up and down; None where one of them is not a plain linear layer (any more)."""
    linears = [getattr(module, name, None) for name in _GATED_PARTS]
    if any(type(linear) is not torch.nn.Linear for linear in linears):
        return None
    return [parameter for linear in linears for parameter in (linear.weight, linear.bias)]  # type: ignore[union-attr]


@torch.no_grad()
def _is_gated(module: torch.nn.Module) -> bool:
    parameters = gated_parameters(module)
    if parameters is None or len(list(module.parameters())) != sum(one is not None for one in parameters):
        return False
    weight = parameters[0]
    assert weight is not None
    dtype = stream_dtype(weight)
    if weight.device.type != "cpu" or dtype not in EXACT or is_partitioned(weight):
        return False
    rows = probe_rows(weight, weight.shape[1]).to(dtype)
    tolerance = TOLERANCE if weight.dtype == dtype else TOLERANCE_NARROW
    return agree_at_scales(lambda values: gated_rows(values, parameters), module, rows, tolerance)


def _gated_forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Forward of (…, C) hidden states, while the module is frozen."""
    parameters = gated_parameters(module)
    if parameters is None or not is_frozen(parameters, hidden_states.dtype):
        return None
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return gated_rows(rows, parameters).reshape(*hidden_states.shape[:-1], -1)
