"""The best and the second best token of rows of scores."""

from __future__ import annotations

import torch

_BLOCK = 128  # tokens


def best_two(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the best token of each row, the first one of several, and what the best of all others scores.

    On CPUs the search for the place of a maximum takes many times longer than the maximum itself. So blocks of tokens
    are compared by their maxima, and only the best block is searched.

    Args:
        scores: (R, V), in any number format; V at least 2.

    Returns:
        The best tokens (R,) int64, their scores (R,), and the second best scores (R,).
    """
    tokens = scores.shape[1]
    size = min(_BLOCK, tokens)
    whole = tokens - tokens % size
    heights = scores[:, :whole].unflatten(1, (-1, size)).amax(2)
    if whole < tokens:
        heights = torch.cat([heights, scores[:, whole:].amax(1, keepdim=True)], 1)
    block = heights.argmax(1, keepdim=True)
    start = (block * size).clamp(max=tokens - size)  # the last block is filled up with tokens before it
    inside = scores.gather(1, start + torch.arange(size, device=scores.device))
    best, place = inside.max(1, keepdim=True)
    lowest = float("-inf")
    others = torch.cat([heights.scatter(1, block, lowest), inside.scatter(1, place, lowest)], 1)
    return (start + place)[:, 0], best[:, 0], others.amax(1)
