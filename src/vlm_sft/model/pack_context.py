"""The pack that is being computed: what attention, the last layer and dropout have to know of it.

They are called from deep inside transformers and PEFT, which pass nothing of ours on, and gradient checkpointing calls
them once more in the backward pass, on a GPU in autograd's own threads, which do not see a ContextVar. So a process has
one plain `PackContext` at a time; `packed_forward.packed` enters it and everything else reads `current_pack()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from vlm_sft.data.collate import moved_to
from vlm_sft.model.decoding import DecodingStep
from vlm_sft.model.families import FULL_REACH, Reach
from vlm_sft.model.padded_rows import PaddedRows
from vlm_sft.model.state_batches import Recurrence


@dataclass(frozen=True, slots=True)
class VarlenIndex:
    """How a pack is read by a variable-length attention kernel.

    Attributes:
        gather: (G,) int64, for each sequence the tokens that are its keys: the prefix, then the sequence itself.
        query_ends, key_ends: (sequences + 1,) int32, cumulative lengths.
        longest_query, longest_key: in tokens.
    """

    gather: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass(slots=True)
class PackLayout:
    """Which tokens of a pack see which.

    Attributes:
        length: L, tokens of the pack.
        branches: for each image (start of the prefix, its end, end of each question …) in tokens.
        blocks: (L,) int64, equal numbers for tokens that see each other in both directions, -1 for all others; None
            where all attention is causal.
        rows: how many positions of each image `parts` will be given; None counts them, for which a GPU is waited for.
        reaches: how far tokens look in each kind of layers.
    """

    length: int
    branches: list[list[int]]
    blocks: torch.Tensor | None = None
    rows: list[int] | None = None
    reaches: tuple[Reach, ...] = (FULL_REACH,)
    _masks: dict[tuple[Reach, torch.dtype], list[torch.Tensor | None]] = field(default_factory=dict)
    _parts: list[torch.Tensor] | None = None
    _varlen: VarlenIndex | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each image (start, end) in tokens."""
        return [(ends[0], ends[-1]) for ends in self.branches]

    def marker(self, reach: Reach, device: torch.device) -> torch.Tensor:
        """What a layer gets instead of a mask: (1, 1, 1, n) bool, whose width n tells the kind of layers.

        A mask, of any size, keeps transformers from building one of its own; the attention functions follow the layout.
        """
        return torch.ones(1, 1, 1, 1 + self.reaches.index(reach), dtype=torch.bool, device=device)

    def reach_of(self, marker: torch.Tensor | None) -> Reach:
        """How far tokens look in a layer that was given this `marker`; None stands for full attention."""
        return FULL_REACH if marker is None else self.reaches[marker.shape[-1] - 1]

    def masks(
        self, device: torch.device, reach: Reach = FULL_REACH, dtype: torch.dtype = torch.bool
    ) -> list[torch.Tensor | None]:
        """For each image (1, 1, N, N), which token may look where; None means plain causal (one question).

        Args:
            device: where the masks are needed.
            reach: how far tokens look.
            dtype: bool, True where a token may look; or a number format for what is added to the scores: 0 there, -inf
                elsewhere. SDPA makes these from bool in every layer, and keeps them for the backward pass.
        """
        if (reach, dtype) not in self._masks:
            masks = [self._mask(ends, device, reach) for ends in self.branches]
            self._masks[reach, dtype] = masks if dtype == torch.bool else [_added(mask, dtype) for mask in masks]
        return self._masks[reach, dtype]

    def parts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Split ascending positions by image: for each one its rows, counted from the start of the image, int64."""
        if self._parts is None:
            firsts = torch.tensor([start for start, _ in self.spans])
            counts = self.rows
            if counts is None:
                image = torch.searchsorted(firsts, rows.cpu(), right=True) - 1
                counts = torch.bincount(image, minlength=len(firsts)).tolist()
            starts = torch.cat([first.expand(count) for first, count in zip(firsts, counts, strict=True)])
            self._parts = list((rows - moved_to(rows.device, starts)).split(counts))
        return self._parts

    def _mask(self, ends: list[int], device: torch.device, reach: Reach) -> torch.Tensor | None:
        """The mask of one image."""
        blocks = self.blocks[ends[0] : ends[-1]] if self.blocks is not None and reach.blocks else None
        if len(ends) <= 3 and blocks is None and reach.is_plain(ends[-1] - ends[0]):
            return None
        sizes = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        branch = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
        index = torch.cat([torch.arange(sizes[0]), *(sizes[0] + torch.arange(size) for size in sizes[1:])])
        return branch_mask(moved_to(device, branch), moved_to(device, index), reach, blocks)[None, None]

    def varlen(self, device: torch.device) -> VarlenIndex:
        """The same layout for a variable-length kernel."""
        if self._varlen is None:
            keys, queries, lengths = [], [0], [0]
            for ends in self.branches:
                for start, end in zip(ends, ends[1:], strict=False):
                    if start != ends[0]:
                        keys.append(torch.arange(ends[0], ends[1]))
                    keys.append(torch.arange(start, end))
                    queries.append(queries[-1] + end - start)
                    lengths.append(lengths[-1] + end - start + (ends[1] - ends[0] if start != ends[0] else 0))
            self._varlen = VarlenIndex(
                moved_to(device, torch.cat(keys)),
                moved_to(device, torch.tensor(queries, dtype=torch.int32)),
                moved_to(device, torch.tensor(lengths, dtype=torch.int32)),
                max(b - a for a, b in zip(queries, queries[1:], strict=False)),
                max(b - a for a, b in zip(lengths, lengths[1:], strict=False)),
            )
        return self._varlen


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What a mask adds to scores in a number format."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def branch_mask(
    branch: torch.Tensor, index: torch.Tensor, reach: Reach = FULL_REACH, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """Which token of one image may look at which.

    Args:
        branch: (N,) int64, 0 in the prefix, else the number of the question.
        index: (N,) int64, index of the token in the sequence that its question alone would be.
        reach: how far tokens look.
        blocks: as in `PackLayout`, (N,); not looked at where `reach` has no blocks.

    Returns:
        (N, N) bool, rows are queries: True for the prefix and the own branch, up to the token itself and within its
        block, and not farther back than the reach.
    """
    order = torch.arange(len(branch), device=branch.device)
    own = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    mask = own & (order[None, :] <= order[:, None])
    if blocks is not None and reach.blocks:
        mask = mask | ((blocks[None, :] == blocks[:, None]) & (blocks[:, None] >= 0))
    return within(mask, reach, index, index)


def within(mask: torch.Tensor, reach: Reach, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Take what is too far back out of a mask.

    Args:
        mask: (Q, K) bool.
        reach: how far tokens look.
        queries, keys: (Q,) and (K,) int64, indexes in the sequence that a question alone would be.
    """
    if reach.window is not None:
        mask = mask & (keys[None, :] > queries[:, None] - reach.window)
    if reach.chunk is not None:
        mask = mask & (keys[None, :] // reach.chunk == queries[:, None] // reach.chunk)
    return mask


@dataclass(frozen=True)
class PackContext:
    """What holds during the forward and the backward pass of one pack.

    Attributes:
        tokens: L, tokens of the pack; sequences of another length are computed as outside of packs.
        layout: what attention follows; None where a mask says it all.
        rows: (S,) int64, ascending positions that are needed behind the last layer; None for all.
        keys: (L,) int64, the number of each token that its dropout masks are made from, from `PackedBatch.keys`; None
            for ordinary dropout.
        step: number of the optimizer step, for dropout.
        recurrence: what layers with a state follow; None where they compute whatever they are given as one sequence.
        index: (L,) int64, index of each token in the sequence that its question alone would be; None where the tokens
            are one sequence.
        padded: the questions as a batch of separate sequences, which plain transformers computes; `rows` and `keys` are
            those of the flattened batch then. None where they share their image.
        ends: as of `PackedBatch`; empty where no pack is computed.
        decoding: what the tokens of a generation step see, where attention follows that and no mask; else None.
    """

    tokens: int = 0
    layout: PackLayout | None = None
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    step: int = 0
    recurrence: Recurrence | None = None
    index: torch.Tensor | None = None
    padded: PaddedRows | None = None
    ends: Sequence[Sequence[int]] = ()
    decoding: DecodingStep | None = None

    def lengths(self, device: torch.device) -> torch.Tensor:
        """For each token the tokens up to the end of its own part: of its prefix, or of prefix and question.

        That is a number of the question or image alone, whatever else is in the pack.

        Args:
            device: where they are needed.

        Returns:
            (L,) int64; of padded questions, those of the flattened batch.
        """
        parts = []
        for bounds in self.ends:
            prefix = bounds[1] - bounds[0]
            parts.append(torch.full((prefix,), prefix))
            parts += [torch.full((end - start,), prefix + end - start) for start, end in pairwise(bounds[1:])]
        found = moved_to(device, torch.cat(parts))
        return found if self.padded is None else self.padded.take(found).flatten()

    @cached_property
    def _row_keys(self) -> torch.Tensor | None:
        """(S,) int64, the keys of the rows that a trimmed last layer keeps."""
        return None if self.keys is None or self.rows is None else self.keys[self.rows]

    def keys_for(self, tokens: int) -> torch.Tensor | None:
        """The keys of all tokens, or of the rows that a trimmed last layer keeps; None for ordinary dropout.

        Args:
            tokens: how many tokens the activations have: L or S.
        """
        if self.keys is None:
            return None
        if len(self.keys) == tokens:
            return self.keys
        rows = self._row_keys
        assert rows is not None and len(rows) == tokens, f"{tokens} tokens in a layer of a pack of {len(self.keys)}"
        return rows


_OUTSIDE = PackContext()
_current = _OUTSIDE


def current_pack() -> PackContext:
    """The pack that this process is computing; an empty one outside of packs."""
    return _current


@contextmanager
def computing(pack: PackContext) -> Iterator[None]:
    """Make a pack the current one while the block runs, which must hold its backward pass too."""
    global _current
    previous, _current = _current, pack
    try:
        yield
    finally:
        _current = previous
