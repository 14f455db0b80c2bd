"""Losses of answer tokens without their scores, or with little beside them.

The cross entropy of a token is logsumexp(W h) - w · h, with w the row of the right token, and its gradient in h is
softmax(W h) W - w. Both are sums over the vocabulary that can be taken block by block with a running maximum, as online
softmax does for attention (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682). So
every row of the projection is read once, and no (S, V) matrix of scores, probabilities or gradients ever exists.

That needs a projection that is frozen, whole and plain. For others the model computes the scores itself, once, as
ZeRO-3 requires, and losses and gradients are taken from them a few rows at a time.

Shape suffixes: S supervised tokens, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.matmul import EXACT, is_frozen, multiply, stream_dtype
from vlm_sft.model.forward_patch import is_plain

_BLOCK = 2048  # rows of the projection at a time, at least: with their scores they stay in the processor's cache
_BLOCK_WEIGHTS = 2**20  # narrow rows are taken until they have so many weights: larger products are faster
_GPU_BLOCK = 8192  # the same on a GPU, which wants large products
_PART = 2**26  # scores that are held in float32 at a time
_ROUNDED_ROWS = 16  # supervised tokens are filled up to a multiple, so that few shapes occur


class _TokenLosses(torch.autograd.Function):
    """Cross entropies of the rows of hidden states, for a projection that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses (S,) of (S, C) hidden states, (V, C) weights and (S,) targets."""
        ctx.dtype = hidden.dtype
        losses, slopes = _sweep(hidden.to(weight.dtype), weight, targets, with_slopes=ctx.needs_input_grad[0])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the hidden states."""
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None]).to(ctx.dtype), None, None


class _ScoreLosses(torch.autograd.Function):
    """Cross entropies of the rows of scores, a few rows at a time, so that no float32 copy of all of them exists."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Losses (S,) of (S, V) scores and (S,) targets."""
        ctx.save_for_backward(scores, targets)
        ctx.smoothing = smoothing
        return torch.cat([_plain_losses(*part, smoothing) for part in _parts(scores, targets)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the scores, in their number format."""
        scores, targets = ctx.saved_tensors
        slopes = torch.empty_like(scores)
        for (part, some), (slope, gradient) in zip(_parts(scores, targets), _parts(slopes, gradients[0]), strict=True):
            with torch.enable_grad():
                wide = _wide(part.detach()).requires_grad_()
                losses = _plain_losses(wide, some, ctx.smoothing)
            slope.copy_(torch.autograd.grad(losses, wide, gradient)[0])
        return slopes, None, None


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Values in float32; in float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def _plain_losses(scores: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.cross_entropy(_wide(scores), targets, reduction="none", label_smoothing=smoothing)


def _above_mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score of the right token above the mean score of all, (S,): (w - mean of W) · h, with no scores of the others."""
    mean = weight.mean(0, dtype=_wide(weight[:1]).dtype)
    return torch.linalg.vecdot(_wide(hidden), weight[targets] - mean)


def _parts(scores: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few rows of the scores at a time, with their targets."""
    rows = max(1, _PART // scores.shape[1])
    return zip(scores.split(rows), targets.split(rows), strict=True)


def _sweep(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_slopes: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One pass over the vocabulary: losses (S,), and on request their gradients (S, C) in the hidden states.

    Products are taken in the number format of the weights, everything else in float32 or better. A score of the right
    token that was not rounded as the others are would make a loss of nearly 0 negative, so in half precision it is
    taken from among them.
    """
    count = len(hidden)
    rows = F.pad(hidden, (0, 0, 0, -count % _ROUNDED_ROWS))
    rounded = weight.dtype not in EXACT
    largest = _wide(rows.new_full((len(rows), 1), float("-inf")))
    total = torch.zeros_like(largest)
    score = torch.zeros_like(largest[:count])
    mean = torch.zeros_like(_wide(rows))  # of the projection's rows, weighted by exp(score - largest)
    size = max(_BLOCK, _BLOCK_WEIGHTS // weight.shape[1]) if weight.device.type == "cpu" else _GPU_BLOCK
    for index, block in enumerate(weight.split(size)):
        scores = _wide(multiply(rows, block))
        if rounded:
            place = targets[:, None] - index * size
            found = scores[:count].gather(1, place.clamp(0, len(block) - 1))
            score = torch.where((place >= 0) & (place < len(block)), found, score)
        previous, largest = largest, torch.maximum(largest, scores.amax(1, keepdim=True))
        scores.sub_(largest).exp_()
        shrink = previous.sub_(largest).exp_()
        total.mul_(shrink).add_(scores.sum(1, keepdim=True))
        if with_slopes:
            mean.mul_(shrink).add_(multiply(scores.to(rows.dtype), block.T))
    right = weight[targets]
    scored = score[:, 0] if rounded else torch.linalg.vecdot(hidden, right)
    losses = (total.log() + largest)[:count, 0] - scored
    return losses, mean.div_(total)[:count].sub_(right) if with_slopes else None


def is_covered(head: Any) -> bool:
    """Whether `token_losses` computes a model's head: a plain linear layer that is whole and not trained.

    Args:
        head: what `vision_features.head_of` the model gives.
    """
    if type(head) is not torch.nn.Linear or head.bias is not None or is_plain():
        return False
    weight = head.weight
    if weight.device.type == "cpu":
        return is_frozen([weight], stream_dtype(weight))
    return weight.is_floating_point() and not weight.requires_grad and not is_partitioned(weight)


def token_losses(
    hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of each supervised token in nats.

    The loss of a token whose label is smoothed by e is (1 - e) times its own and e times the mean of all tokens'. That
    is its own plus e times what its score is above the mean score, which is one product with the projection's mean row.

    Args:
        hidden: (S, C), hidden states behind the last norm.
        head: the projection to the vocabulary, one that `is_covered`.
        targets: (S,) int64, the tokens that follow.
        smoothing: probability that is spread evenly over the vocabulary.

    Returns:
        (S,), float32 or better, with gradients of the hidden states.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        losses = _TokenLosses.apply(hidden, head.weight, targets)
        return losses + smoothing * _above_mean(hidden, head.weight, targets) if smoothing else losses


def score_losses(scores: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy of each supervised token in nats, from its scores.

    Args:
        scores: (S, V), in any number format.
        targets: (S,) int64, the right tokens.
        smoothing: as of `token_losses`.

    Returns:
        (S,), float32 or better, with gradients of the scores.
    """
    if is_plain():
        return _plain_losses(scores, targets, smoothing)
    return _ScoreLosses.apply(scores, targets, smoothing)
