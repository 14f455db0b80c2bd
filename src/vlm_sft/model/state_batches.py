"""The prefixes and the questions of a pack as padded batches, for layers that carry a state from token to token.

A recurrent layer computes the prefixes of a pack as one batch; the state behind a prefix is where each of its questions
begins, and the questions are a batch too. Padding stands behind the tokens, so nothing real comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_sft.data.collate import moved_to

# The padding of a batch is at most this share of its places, or so many places: a batch of its own costs as much.
_MOST_PADDING, _FREE_PADDING = 0.25, 32


@dataclass(frozen=True, slots=True)
class StateBatch:
    """Some sequences of a pack, padded to the longest.

    Attributes:
        tokens: (n, T) int64, places in the pack; padding repeats a sequence's last token.
        lengths: (n,) int64, tokens of each sequence.
        valid: (n, T) bool, False at padding; None where there is none.
        parents: (n,) int64, for questions: which of all prefixes, in the order of their batches, each one follows.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    valid: torch.Tensor | None
    parents: torch.Tensor


@dataclass(frozen=True, slots=True)
class StateBatches:
    """A whole pack as batches.

    Attributes:
        prefixes, questions: in the order in which they are computed; one after the other they have P places.
        tokens: (P,) int64, the token of the pack at each place.
        places: (L,) int64, the place of each token of the pack.
        padding: (padded places,) int64.
        order: (questions,) int64, where each question of the pack is among those of the batches.
    """

    prefixes: list[StateBatch]
    questions: list[StateBatch]
    tokens: torch.Tensor
    places: torch.Tensor
    padding: torch.Tensor
    order: torch.Tensor

    def divide(self, stream: torch.Tensor) -> list[torch.Tensor]:
        """A stream (L, …) of the pack for each batch, (n, T, …), prefixes first.

        Its gradient at padding is not looked at: padding changes no output and no state.
        """
        shapes = [batch.tokens.shape for batch in (*self.prefixes, *self.questions)]
        placed = _Moved.apply(stream, self.tokens, self.places, None)
        return [
            part.unflatten(0, shape)
            for part, shape in zip(placed.split(list(map(math.prod, shapes))), shapes, strict=True)
        ]

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """What `divide` divided, from the outputs (n, T, …) of all batches: (L, …)."""
        placed = torch.cat([output.flatten(0, 1) for output in outputs])
        return _Moved.apply(placed, self.places, self.tokens, self.padding)


class _Moved(torch.autograd.Function):
    """Rows of a matrix in another order; their gradients, too, are taken by index, which is faster than adding up."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor, unused: torch.Tensor | None
    ) -> torch.Tensor:
        """Rows `there` of the matrix; `back` are their places among them, `unused` the rows that are not taken."""
        ctx.save_for_backward(back, unused)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient of the rows."""
        back, unused = ctx.saved_tensors
        slopes = gradients[0].index_select(0, back)
        return slopes if unused is None else slopes.index_fill_(0, unused, 0), None, None, None


@dataclass(slots=True)
class Recurrence:
    """What layers with a state follow inside a pack.

    Attributes:
        ends: for each image the start of its prefix, the end of its prefix and the end of each question, in tokens.
        kept: for generation, by layer: the states behind all questions; None where nothing goes on from them.
        fed: (F,) int64, in a step of generation: the questions that its tokens belong to; None in a whole pack.
    """

    ends: list[list[int]]
    kept: dict[torch.nn.Module, Any] | None = None
    fed: torch.Tensor | None = None
    _batches: StateBatches | None = field(default=None, repr=False)

    def batches(self, device: torch.device) -> StateBatches:
        """The prefixes and questions of the pack as padded batches, made once."""
        if self._batches is None:
            self._batches = state_batches(self.ends, device)
        return self._batches


def state_batches(ends: Sequence[Sequence[int]], device: torch.device) -> StateBatches:
    """Sort the sequences of a pack into batches of similar length.

    Args:
        ends: for each image the start of its prefix, the end of its prefix and the end of each question, in tokens.
        device: of the result.
    """
    prefixes = [(bounds[0], bounds[1]) for bounds in ends]
    questions = [
        (start, end, image)
        for image, bounds in enumerate(ends)
        for start, end in zip(bounds[1:], bounds[2:], strict=False)
    ]
    groups = _similar([end - start for start, end in prefixes])
    rank = {image: number for number, image in enumerate(image for group in groups for image in group)}
    asked = _similar([end - start for start, end, _ in questions])
    tables = [([prefixes[image] for image in group], group) for group in groups]
    tables += [([questions[one][:2] for one in group], [rank[questions[one][2]] for one in group]) for group in asked]
    batches = [_batch(spans, parents, device) for spans, parents in tables]
    places = torch.empty(ends[-1][-1], dtype=torch.int64)
    first = 0
    for spans, _ in tables:
        longest = max(end - start for start, end in spans)
        for row, (start, end) in enumerate(spans):
            places[start:end] = torch.arange(end - start) + first + row * longest
        first += longest * len(spans)
    order = torch.empty(len(questions), dtype=torch.int64)
    order[[one for group in asked for one in group]] = torch.arange(len(questions))
    padded = torch.ones(first, dtype=torch.bool)
    padded[places] = False
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    indexes = (moved_to(device, index) for index in (places, padded.nonzero()[:, 0], order))
    return StateBatches(batches[: len(groups)], batches[len(groups) :], tokens, *indexes)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Put sequences of similar length together, the longest ones first."""
    groups: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[groups[-1][0]] if groups else 0
        padding += longest - lengths[index]
        if not groups or padding > max(_FREE_PADDING, _MOST_PADDING * longest * (len(groups[-1]) + 1)):
            groups.append([])
            padding = 0
        groups[-1].append(index)
    return groups


def _batch(spans: Sequence[tuple[int, int]], parents: list[int], device: torch.device) -> StateBatch:
    """The batch of some sequences (start, end) of a pack."""
    starts = torch.tensor([start for start, _ in spans])
    lengths = torch.tensor([end - start for start, end in spans])
    offsets = torch.arange(int(lengths.max()))[None, :]
    tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    valid = offsets < lengths[:, None]
    return StateBatch(
        moved_to(device, tokens),
        moved_to(device, lengths),
        None if bool(valid.all()) else moved_to(device, valid),
        moved_to(device, torch.tensor(parents)),
    )
