"""A pack as a padded batch: every question a sequence of its own, behind its own copy of the image's tokens.

So plain transformers computes the questions of a model that cannot share an image. Each row is padded with its last
token; the attention mask hides that, and dropout's keys stay those of the question's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from vlm_sft.data.collate import PackedBatch, moved_to


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """The questions of a pack as B rows of T tokens.

    Attributes:
        tokens: (B, T) int64, places in the pack; padding is a row's last token.
        valid: (B, T) bool, False at padding.
        images: for each row, which image of the pack it is about.
        predict: (S,) int64, where the positions of `PackedBatch.predict` are in the flattened rows.
        length: T.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    images: list[int]
    predict: torch.Tensor
    length: int

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """What the tokens (L,) of a pack are in the rows, (B, T)."""
        return values.index_select(0, self.tokens.flatten()).view_as(self.tokens)


def padded_rows(batch: PackedBatch, left: bool = False) -> PaddedRows:
    """Lay the questions of a pack out as rows.

    Args:
        batch: the pack.
        left: pad in front, for generation, where every row goes on at its end.
    """
    spans = [
        (image, bounds[0], bounds[1], start, stop)
        for image, bounds in enumerate(batch.ends)
        for start, stop in pairwise(bounds[1:])
    ]
    sizes = torch.tensor([end - begin + stop - start for _, begin, end, start, stop in spans])
    length = int(sizes.max())
    prefixes = torch.tensor([[begin, end - begin, start] for _, begin, end, start, _ in spans])
    first, before, asked = (column[:, None] for column in prefixes.unbind(1))
    column = torch.arange(length)[None, :].expand(len(spans), length)
    if left:
        column = column - (length - sizes)[:, None]
    valid = (column >= 0) & (column < sizes[:, None])
    inside = torch.minimum(torch.where(valid, column, length), sizes[:, None] - 1)
    tokens = torch.where(inside < before, first + inside, asked + inside - before)
    device = batch.group.device
    if len(batch.targets):
        row = batch.target_branch - 1
    else:
        row = torch.arange(len(spans), device=device)
    shift = moved_to(device, length - sizes)[row] if left else 0
    predict = row * length + batch.index[batch.predict] + shift
    return PaddedRows(moved_to(device, tokens), moved_to(device, valid), [one[0] for one in spans], predict, length)


@contextmanager
def scoring_rows(head: torch.nn.Module, places: torch.Tensor, shape: Sequence[int]) -> Iterator[None]:
    """Let a model's head, and what the model does behind it, see only the positions that predict an answer.

    Hooked for the call only: a model's own `logits_to_keep` takes the same positions of every row, if it is there.

    Args:
        head: the projection to the vocabulary, wrapped by PEFT or not.
        places: (S,) int64, the positions in the flattened batch; hidden states (B, T, C) become (1, S, C).
        shape: B and T.
    """

    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not inputs or inputs[0].shape[:2] != tuple(shape):
            return None
        return (inputs[0].flatten(0, 1).index_select(0, places)[None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def scored(logits: torch.Tensor, rows: PaddedRows) -> torch.Tensor:
    """The scores (1, S, V) of a model that did not call its head, and so has those of all positions (B, T, V)."""
    if logits.shape[:2] != rows.tokens.shape or len(rows.predict) == rows.tokens.numel():
        return logits.flatten(0, 1)[None]
    return logits.flatten(0, 1).index_select(0, rows.predict)[None]
