"""RMSNorm behind which each channel has a gate, as one node of autograd, on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.model.cpu.matmul import is_frozen


class _GatedNorm(torch.autograd.Function):
    """y = w · x / rms(x) · silu(z) over the last dimension, for a weight that is not trained."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """Normalise and gate (R, C) values."""
        inverse = torch.linalg.vecdot(values, values).div_(values.shape[1]).add_(epsilon).rsqrt_()
        normed = values * inverse[:, None]
        ctx.save_for_backward(normed, inverse, gate, weight)
        return F.silu(gate).mul_(normed).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """Gradients of the values and of the gate."""
        normed, inverse, gate, weight = ctx.saved_tensors
        weighted = gradients[0] * weight
        of_gate = torch.ops.aten.silu_backward(weighted * normed, gate)
        of_normed = weighted.mul_(F.silu(gate))
        along = torch.linalg.vecdot(of_normed, normed).div_(-normed.shape[1])
        return of_normed.addcmul_(normed, along[:, None]).mul_(inverse[:, None]), of_gate, None, None


def gated_norm(module: Any, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor | None:
    """What a gated norm gives for (R, C) values and gates; None where it is not computed in one step.

    Args:
        module: a norm with the epsilon that is called `variance_epsilon`, and SiLU of the gate.
        values, gate: (R, C).
    """
    if not values.dtype == gate.dtype == module.weight.dtype or not is_frozen([module.weight], values.dtype):
        return None
    return _GatedNorm.apply(values, gate, module.weight, module.variance_epsilon)
