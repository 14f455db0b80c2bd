"""Losses of answer tokens without their scores: head and cross entropy in one. Imports model.products.

The cross entropy of a token is logsumexp(W h) - w · h, with w the row of the right token, and its gradient in h is
softmax(W h) W - w. Both are sums over the vocabulary that can be taken block by block with a running maximum, as online
softmax does for attention (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682). So
every row of the projection is read once, and no (S, V) matrix of scores, probabilities or gradients is ever there.

Shape suffixes: S supervised tokens, V vocabulary, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.model.products import is_frozen, multiply

_BLOCK = 2048  # rows of the projection at a time: with their scores they stay in the processor's cache
_ROUNDED_ROWS = 16  # supervised tokens are filled up to a multiple, so that few shapes occur


class _TokenLosses(torch.autograd.Function):
    """Cross entropies of the rows of hidden states, for a projection that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses (S,) of (S, C) hidden states, (V, C) weights and (S,) targets."""
        losses, slopes = _sweep(hidden, weight, targets, with_slopes=ctx.needs_input_grad[0])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the hidden states."""
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None], None, None


def _sweep(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_slopes: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One pass over the vocabulary: losses (S,), and where asked for their gradients (S, C) in the hidden states."""
    count = len(hidden)
    rows = F.pad(hidden, (0, 0, 0, -count % _ROUNDED_ROWS))
    largest = rows.new_full((len(rows), 1), float("-inf"))
    total = torch.zeros_like(largest)
    mean = torch.zeros_like(rows)  # of the projection's rows, weighted by exp(score - largest)
    for block in weight.split(_BLOCK):
        scores = multiply(rows, block)
        previous, largest = largest, torch.maximum(largest, scores.amax(1, keepdim=True))
        scores.sub_(largest).exp_()
        shrink = previous.sub_(largest).exp_()
        total.mul_(shrink).add_(scores.sum(1, keepdim=True))
        if with_slopes:
            mean.mul_(shrink).add_(multiply(scores, block.T))
    right = weight[targets]
    losses = (total.log() + largest)[:count, 0] - torch.linalg.vecdot(hidden, right)
    return losses, mean.div_(total)[:count].sub_(right) if with_slopes else None


def is_covered(head: Any) -> bool:
    """Whether `token_losses` computes a model's head: a plain linear layer on a CPU that is not trained.

    Args:
        head: what `get_output_embeddings` of the model gives.
    """
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    return is_frozen([head.weight], head.weight.dtype)


def token_losses(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each supervised token in nats.

    Args:
        hidden: (S, C), hidden states behind the last norm, in the dtype of the head.
        head: the projection to the vocabulary, one that `is_covered`.
        targets: (S,) int64, the tokens that follow.

    Returns:
        (S,), with gradients of the hidden states.
    """
    return _TokenLosses.apply(hidden, head.weight, targets)
