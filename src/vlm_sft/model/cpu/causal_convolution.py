"""Short causal convolutions, each channel by itself, as sums of shifted inputs, on CPUs.

The libraries' convolutions take an order of channels and tokens that nothing else has, and are slow for groups of one
channel.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.model.cpu.matmul import is_frozen


class _CausalConvolution(torch.autograd.Function):
    """y[t] = Σ w[j] · x[t - K + 1 + j] over the window K, for weights that are not trained."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, before: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Convolve (n, T, D) inputs behind (n, K - 1, D) earlier ones; `weight` is (K, D)."""
        ctx.save_for_backward(weight)
        width = before.shape[1]
        output = inputs * weight[width]
        for back in range(1, width + 1):
            output[:, back:].addcmul_(inputs[:, :-back], weight[width - back])
            first = output[:, :back]
            first.addcmul_(before[:, width - back :][:, : first.shape[1]], weight[width - back])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of both kinds of inputs."""
        (weight,), (slope,) = ctx.saved_tensors, gradients
        width = len(weight) - 1
        of_inputs = slope * weight[width]
        of_before = slope.new_zeros(len(slope), width, slope.shape[2])
        for back in range(1, width + 1):
            of_inputs[:, :-back].addcmul_(slope[:, back:], weight[width - back])
            first = slope[:, :back]
            of_before[:, width - back :][:, : first.shape[1]].addcmul_(first, weight[width - back])
        return of_inputs, of_before, None


def causal_convolution(layer: torch.nn.Conv1d, inputs: torch.Tensor, before: torch.Tensor) -> torch.Tensor | None:
    """Convolve sequences in one step; None where that is not the same.

    Args:
        layer: with a window of K tokens and a channel to each group.
        inputs: (n, T, D).
        before: (n, K - 1, D), the inputs before the first.

    Returns:
        (n, T, D).
    """
    same = before.dtype == inputs.dtype == layer.weight.dtype and layer.groups == inputs.shape[2] == len(layer.weight)
    if not same or not is_frozen([layer.weight, layer.bias], inputs.dtype):
        return None
    output = _CausalConvolution.apply(inputs, before, layer.weight[:, 0].T.contiguous())
    return output if layer.bias is None else output + layer.bias
