"""Attention over packs of shared image prefixes, as attention functions of transformers.

Shape suffixes: B batch, H heads, K key/value heads, L tokens of the pack, N tokens of one image with its questions,
D head width.

Every token sees its own prefix and its own question up to itself, so the attention of a pack falls apart into one
small problem per image. The function registered here computes those, and no L x L mask exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_sft.data.collate import moved_to

SHARED_SDPA = "vlm_sft_sdpa"
SHARED_WINDOWS = "vlm_sft_flash_windows"  # the name has to contain "flash", see `shared_windows`


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
    """The layout of the pack that is being computed.

    Attributes:
        length: L, tokens of the pack.
        branches: for each image (start of the prefix, its end, end of each question …) in tokens.
        blocks: (L,) int64, equal numbers for tokens that see each other in both directions, -1 for all others; None
            where all attention is causal.
        rows: how many positions of each image `parts` will be given; None counts them, for which a GPU is waited for.
    """

    length: int
    branches: list[list[int]]
    blocks: torch.Tensor | None = None
    rows: list[int] | None = None
    _masks: dict[int | None, list[torch.Tensor | None]] = field(default_factory=dict)
    _parts: list[torch.Tensor] | None = None
    _varlen: VarlenIndex | None = None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each image (start, end) in tokens."""
        return [(ends[0], ends[-1]) for ends in self.branches]

    def masks(self, device: torch.device, window: int | None = None) -> list[torch.Tensor | None]:
        """For each image (1, 1, N, N) bool, True where a token may look; None means plain causal (one question).

        Args:
            device: where the masks are needed.
            window: tokens that a layer with a sliding window looks back, itself included; None for no window.
        """
        if window not in self._masks:
            self._masks[window] = [self._mask(ends, device, window) for ends in self.branches]
        return self._masks[window]

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

    def _mask(self, ends: list[int], device: torch.device, window: int | None) -> torch.Tensor | None:
        """The mask of one image."""
        if window is not None and ends[-1] - ends[0] <= window:
            window = None
        if len(ends) <= 3 and self.blocks is None and window is None:
            return None
        sizes = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        branch = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
        index = torch.cat([torch.arange(sizes[0]), *(sizes[0] + torch.arange(size) for size in sizes[1:])])
        blocks = None if self.blocks is None else self.blocks[ends[0] : ends[-1]]
        return branch_mask(moved_to(device, branch), moved_to(device, index), window, blocks)[None, None]

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


_active: PackLayout | None = None
_rows: torch.Tensor | None = None


@contextmanager
def pack_layout(layout: PackLayout | None) -> Iterator[None]:
    """Make `layout` the one that the attention function follows while the block runs.

    The block must hold the backward pass too when activations are recomputed there (gradient checkpointing).
    """
    global _active
    previous, _active = _active, layout
    try:
        yield
    finally:
        _active = previous


@contextmanager
def attending_rows(rows: torch.Tensor) -> Iterator[None]:
    """Let the attention functions compute only the rows (S,) of a pack while the block runs; the others are zero."""
    global _rows
    previous, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = previous


def branch_mask(
    branch: torch.Tensor, index: torch.Tensor, window: int | None = None, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """Which token of one image may look at which.

    Args:
        branch: (N,) int64, 0 in the prefix, else the number of the question.
        index: (N,) int64, index of the token in the sequence that its question alone would be.
        window: tokens of a sliding window; None for no window.
        blocks: as in `PackLayout`, (N,).

    Returns:
        (N, N) bool, rows are queries: True for the prefix and the own branch, up to the token itself and within its
        block, and not farther back than the window.
    """
    order = torch.arange(len(branch), device=branch.device)
    own = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    mask = own & (order[None, :] <= order[:, None])
    if blocks is not None:
        mask = mask | ((blocks[None, :] == blocks[:, None]) & (blocks[:, None] >= 0))
    if window is not None:
        mask = mask & (index[None, :] > index[:, None] - window)
    return mask


def shared_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, image by image inside a pack; elsewhere what transformers' `sdpa` does.

    Args:
        module: the attention layer.
        query: (B, H, L, D); key, value: (B, K, L, D).
        attention_mask: used outside packs only.
        dropout: attention dropout probability.
        scaling: factor on the products; 1 / sqrt(D) when None.
        **kwargs: passed to transformers outside packs; `sliding_window` is followed inside them too.

    Returns:
        (B, L, H, D) and None, as transformers expects.
    """
    layout = _active
    is_pack = layout is not None and getattr(module, "is_causal", True) and query.shape[2] == layout.length
    if layout is None or not is_pack or key.shape[2] != layout.length:
        if attention_mask is not None and query.shape[2] < key.shape[2] and query.shape[1] > key.shape[1]:
            return _continued(query, key, value, attention_mask, dropout, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    repeats = query.shape[1] // key.shape[1]
    masks = layout.masks(query.device, kwargs.get("sliding_window"))
    # split, not slices: the gradients of slices would each be a tensor of the whole pack, and their sum quadratic.
    sizes = [end - start for start, end in layout.spans]
    keys, values = (repeat_kv(tensor, repeats).split(sizes, dim=2) for tensor in (key, value))
    queries: Sequence[torch.Tensor] = query.split(sizes, dim=2)
    if _rows is not None:
        parts = layout.parts(_rows)
        queries = [part.index_select(2, rows) for part, rows in zip(queries, parts, strict=True)]
        masks = [_mask_rows(mask, rows, size) for mask, rows, size in zip(masks, parts, sizes, strict=True)]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling)
        for q, k, v, mask in zip(queries, keys, values, masks, strict=True)
    ]
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    if _rows is not None:
        return output.new_zeros(1, layout.length, *output.shape[2:]).index_copy(1, _rows, output), None
    return output.contiguous(), None


def _continued(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: float, scale: float | None
) -> torch.Tensor:
    """Attention of a few tokens to a long cache that several heads share: the heads of a key are rows of one product.

    Repeating the keys instead, as transformers does under a mask, would copy the whole cache in every step.

    Args:
        query: (B, H, Q, D).
        key, value: (B, K, L, D), head h of the queries belonging to h // (H / K).
        mask: (B or 1, 1, Q, L).
        dropout, scale: as in `shared_sdpa`.

    Returns:
        (B, Q, H, D).
    """
    batch, heads, length, width = query.shape
    repeats = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], repeats * length, width)
    output = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask.repeat(1, 1, repeats, 1), dropout_p=dropout, scale=scale
    )
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous()


def _mask_rows(mask: torch.Tensor | None, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Some rows of the mask of an image of `size` tokens, (1, 1, rows, size) bool; None stands for plain causal."""
    if mask is None:
        return (torch.arange(size, device=rows.device)[None, :] <= rows[:, None])[None, None]
    return mask.index_select(2, rows)


def shared_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within windows or images of a vision tower, all of one length in one call.

    transformers' `sdpa` calls the kernel once a window; towers hand the ends of the windows over only to functions
    whose name contains "flash". The values are the same.

    Args:
        module: the attention layer.
        query, key, value: (1, H, L, D).
        attention_mask: not used.
        dropout: attention dropout probability.
        scaling: factor on the products; 1 / sqrt(D) when None.
        cu_seq_lens_q: (windows + 1,) cumulative lengths.
        **kwargs: not used.

    Returns:
        (1, L, H, D) and None.
    """
    assert cu_seq_lens_q is not None, "a tower of this kind tells the ends of its windows"
    sizes = _window_sizes(cu_seq_lens_q)
    states = [tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    outputs: list[torch.Tensor | None] = [None] * len(sizes)
    for size in sorted(set(sizes)):
        places = [index for index, other in enumerate(sizes) if other == size]
        q, k, v = (torch.stack([windows[index] for index in places]).transpose(1, 2) for windows in states)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2)
        for index, window in zip(places, found, strict=True):
            outputs[index] = window
    return torch.cat([window for window in outputs if window is not None])[None], None


def _window_sizes(ends: torch.Tensor) -> list[int]:
    """Lengths between cumulative ones. All layers of a tower are given one tensor, so a GPU is waited for once."""
    sizes = getattr(ends, "_window_sizes", None)
    if sizes is None:
        sizes = ends._window_sizes = ends.diff().tolist()  # type: ignore[attr-defined]
    return sizes


def causal_pack(query: torch.Tensor, key: torch.Tensor) -> PackLayout | None:
    """The layout in force, for attention (B, H, L, D) over a whole pack in which no token sees a later one; else None.

    The few rows of a trimmed layer are not a whole pack.
    """
    layout = _active
    if layout is None or layout.blocks is not None or _rows is not None:
        return None
    return layout if query.shape[2] == key.shape[2] == layout.length else None


def register(functions: dict[str, Callable[..., tuple[torch.Tensor, None]]]) -> None:
    """Make attention functions known to transformers by their names."""
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


register({SHARED_SDPA: shared_sdpa, SHARED_WINDOWS: shared_windows})
