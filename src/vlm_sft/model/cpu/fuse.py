"""Modules that are computed in fewer steps with the same values.

RMSNorm as one node of autograd, on CPUs: the modules of transformers compute it in six elementwise steps, each of which
keeps an activation for the backward pass and reads it again there. The closed form of the gradient (Zhang and Sennrich
2019, "Root Mean Square Layer Normalization", section 4) needs the input and one number a row.

Patch embedding as one matrix product: a convolution whose window is the whole input is one, and the libraries'
convolutions are several times slower at it.

The vocabulary of a few generated tokens through oneDNN, on CPUs: it reads the weights about once, MKL repacks them in
every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.gated_mlp import fuse_gated
from vlm_sft.model.cpu.matmul import EXACT, TOLERANCE, multiply
from vlm_sft.model.forward_patch import agree_at_scales, exchange_forward, probe_rows
from vlm_sft.model.gpu.aligned_mlp import align_gated
from vlm_sft.model.vision_features import head_of

_FEW_ROWS = 64  # of generated tokens; beyond it both libraries take as long
_ROUNDED_ROWS = 8  # they are filled up to a multiple, so that few shapes occur


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
    return fuse_norms(model) + fuse_patches(model) + fuse_head(model) + fuse_gated(model) + align_gated(model)


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
