"""The prefixes and the questions of a pack as padded batches, for layers that carry a state from token to token.

A recurrent layer computes the prefixes of a pack as one batch; the state behind a prefix is where each of its questions
begins, and the questions are a batch too. Padding stands behind the tokens, so nothing real comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_sft.data.collate import moved_to

# A sequence joins a batch when it has at least this share of the tokens of the longest one, which it is padded to.
_LEAST_SHARE = 0.75


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

    def take(self, stream: torch.Tensor) -> torch.Tensor:
        """What the tokens of a stream (L, …) are in this batch, (n, T, …)."""
        return stream.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)


@dataclass(frozen=True, slots=True)
class StateBatches:
    """A whole pack as batches.

    Attributes:
        prefixes, questions: in the order in which they are computed.
        places: (L,) int64, where each token of the pack is in the flattened outputs of all batches, in that order.
        order: (questions,) int64, where each question of the pack is among those of the batches.
    """

    prefixes: list[StateBatch]
    questions: list[StateBatch]
    places: torch.Tensor
    order: torch.Tensor


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
    return StateBatches(
        batches[: len(groups)], batches[len(groups) :], moved_to(device, places), moved_to(device, order)
    )


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Put sequences of similar length together, the longest ones first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not groups or lengths[index] < _LEAST_SHARE * lengths[groups[-1][0]]:
            groups.append([])
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
