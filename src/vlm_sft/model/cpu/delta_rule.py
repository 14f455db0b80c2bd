"""The gated delta rule as one node of autograd, on CPUs.

A head remembers a matrix S. A token with key k, value v, decay g and learning rate β changes it to exp(g) S + k u, with
u = β (v - exp(g) k S), and reads q S from it (Yang et al. 2024, arXiv:2412.06464). A chunk of C tokens is computed at
once (Yang et al. 2024, arXiv:2406.06484): with G the sum of g since the start of the chunk, and for j ≤ i

    P[i, j] = exp(G[i] - G[j]) q[i] · k[j],    A[i, j] = exp(G[i] - G[j]) β[i] k[i] · k[j] (0 on the diagonal),

    U = (1 + A)⁻¹ β (V - exp(G) K S),    O = exp(G) Q S + P U,    S ← exp(G[C]) S + (exp(G[C] - G) K)ᵀ U.

Autograd would keep and sweep over some forty matrices. Here the query and the key of a token are neighbours, so that
one product serves both, and the gradients of G and β are sums over channels, because they are factors of whole rows.

Shape suffixes: n sequences, T tokens, C of a chunk, H heads of values, K heads of keys, B = n H, D channels of a key, E
of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

_LONGEST_CHUNK = 48  # tokens
_EPSILON = 1e-6  # what the libraries add to the square of a length
_LEAST_RATE = 1e-30  # at padding, where a gradient is divided by the rate


def delta_rule(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor | None,
    sizes: Sequence[int],
    goes_on: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Go through n sequences.

    Args:
        mixed: (n, T, 2 K D + H E), queries, keys and values; queries and keys get length 1 here.
        decay: (n, T, H), logarithms of what is kept of the memory; 0 at padding.
        rate: (n, T, H), learning rates; 0 at padding.
        memory: (n, H, D, E), what is remembered before the first token; None for nothing.
        sizes: K, H and D.
        goes_on: whether the memory behind the last token is wanted.

    Returns:
        The outputs, (n, T, H E), and the memory, (n, H, D, E) or None.
    """
    dtype = torch.promote_types(mixed.dtype, torch.float32)
    given = (mixed.to(dtype), decay.to(dtype), rate.to(dtype), None if memory is None else memory.to(dtype))
    output, behind = _DeltaRule.apply(*given, tuple(sizes), goes_on)
    return output.to(mixed.dtype), behind


class _Chunk(NamedTuple):
    """What the backward pass of a chunk needs of its forward pass.

    Attributes:
        shrink: (n, C, K, 2, 1), 1 / length of each query and key.
        units: (B, C, 2, D), queries and keys of length 1.
        values: (B, C, E).
        rate, total: (B, C, 1), β and G.
        decays: (B, C, C), exp(G[i] - G[j]), 0 for j > i.
        weights: (B, C, 2, C), P, and A without β.
        inverse: (B, C, C), of 1 + A.
        change: (B, C, E), U.
        before, after: (B, D, E), the memory; None for nothing, and where nobody wants it.
    """

    shrink: torch.Tensor
    units: torch.Tensor
    values: torch.Tensor
    rate: torch.Tensor
    total: torch.Tensor
    decays: torch.Tensor
    weights: torch.Tensor
    inverse: torch.Tensor
    change: torch.Tensor
    before: torch.Tensor | None
    after: torch.Tensor | None


class _DeltaRule(torch.autograd.Function):
    """What `delta_rule` computes, in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        decay: torch.Tensor,
        rate: torch.Tensor,
        memory: torch.Tensor | None,
        sizes: tuple[int, int, int],
        goes_on: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Chunk after chunk."""
        state = None if memory is None else memory.flatten(0, 1)
        outputs: list[torch.Tensor] = []
        kept: list[torch.Tensor | None] = []
        for span in _spans(mixed.shape[1]):
            wanted = goes_on or span.stop < mixed.shape[1]
            output, chunk = _forward(mixed[:, span], decay[:, span], rate[:, span], state, sizes, wanted)
            outputs.append(output.unflatten(0, (len(mixed), -1)).transpose(1, 2))
            kept += chunk
            state = chunk.after
        ctx.save_for_backward(*kept)
        ctx.sizes, ctx.channels = sizes, mixed.shape[2]
        ctx.set_materialize_grads(False)
        return torch.cat(outputs, 1).flatten(2), None if state is None else state.unflatten(0, (len(mixed), -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Chunk after chunk, from the last to the first."""
        given, of_memory = gradients
        kept, width = ctx.saved_tensors, len(_Chunk._fields)
        chunks = [_Chunk(*kept[place : place + width]) for place in range(0, len(kept), width)]
        count, tokens, heads = len(chunks[0].shrink), sum(chunk.shrink.shape[1] for chunk in chunks), ctx.sizes[1]
        of_mixed = chunks[0].units.new_empty(count, tokens, ctx.channels)
        of_decay, of_rate = of_mixed.new_empty(2, count, tokens, heads)
        of_state = None if of_memory is None else of_memory.flatten(0, 1)
        if given is None:
            given = of_mixed.new_zeros(count, tokens, heads * chunks[0].values.shape[2])
        for span, chunk in zip(reversed(list(_spans(tokens))), reversed(chunks), strict=True):
            slopes = _by_head(given[:, span].unflatten(2, (heads, -1)))
            of_state = _backward(
                chunk, slopes, of_state, of_mixed[:, span], of_decay[:, span], of_rate[:, span], ctx.sizes
            )
        of_memory = None if of_state is None else of_state.unflatten(0, (count, heads))
        return of_mixed, of_decay, of_rate, of_memory, None, None


def _spans(tokens: int) -> Iterator[slice]:
    """Cut a number of tokens into chunks of nearly one size."""
    size = -(-tokens // -(-tokens // _LONGEST_CHUNK))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _parts(mixed: torch.Tensor, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of (n, C, 2 K D + H E): pairs of query and key (n, C, K, 2, D), and values (n, C, H, E)."""
    key_heads, heads, channels = sizes
    pairs, values = mixed.tensor_split([2 * key_heads * channels], dim=2)
    return pairs.unflatten(2, (2, key_heads, channels)).transpose(2, 3), values.unflatten(2, (heads, -1))


def _by_head(values: torch.Tensor) -> torch.Tensor:
    """(n, C, H, …) as contiguous (B, C, …)."""
    return values.transpose(1, 2).flatten(0, 1)


def _written(units: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(B, C, D), keys as the memory behind a chunk still has them."""
    return units[:, :, 1] * (total[:, -1:] - total).exp_()


def _forward(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    before: torch.Tensor | None,
    sizes: tuple[int, int, int],
    wanted: bool,
) -> tuple[torch.Tensor, _Chunk]:
    """The outputs (B, C, E) of a chunk, from its part of what `delta_rule` is given; `wanted` is the memory behind."""
    pairs, values = _parts(mixed, sizes)
    shrink = torch.linalg.vecdot(pairs, pairs).add_(_EPSILON).rsqrt_()[..., None]
    (count, size, key_heads, *pair), scale = pairs.shape, sizes[2] ** -0.5
    units = pairs.new_empty(count, key_heads, sizes[1] // key_heads, size, *pair)
    torch.mul(pairs.transpose(1, 2)[:, :, None].expand_as(units), shrink.transpose(1, 2)[:, :, None], out=units)
    units = units.flatten(0, 2)
    values, rate, total = _by_head(values), _by_head(rate[..., None]), _by_head(decay[..., None]).cumsum(1)
    upper = torch.full((size, size), float("-inf"), dtype=total.dtype).triu_(1)
    decays = (total - total.mT).add_(upper).exp_()
    weights = (units.flatten(1, 2) @ units[:, :, 1].mT).unflatten(1, (size, 2)).mul_(decays[:, :, None])
    one = torch.eye(size, dtype=total.dtype)
    inverse = torch.linalg.solve_triangular(weights[:, :, 1] * rate, one, upper=False, unitriangular=True)
    if before is None:
        change = inverse @ (values * rate)
        output = (weights[:, :, 0] @ change).mul_(scale)
    else:
        read = (units.flatten(1, 2) @ before).unflatten(1, (size, 2)).mul_(total.exp()[..., None])
        change = inverse @ (values - read[:, :, 1]).mul_(rate)
        output = torch.baddbmm(read[:, :, 0], weights[:, :, 0], change, beta=scale, alpha=scale)
    after = None
    if wanted:
        new = _written(units, total).mT
        after = new @ change if before is None else (before * total[:, -1:].exp()).baddbmm_(new, change)
    return output, _Chunk(shrink, units, values, rate, total, decays, weights, inverse, change, before, after)


def _backward(
    chunk: _Chunk,
    of_output: torch.Tensor,
    of_after: torch.Tensor | None,
    of_mixed: torch.Tensor,
    of_decay: torch.Tensor,
    of_rate: torch.Tensor,
    sizes: tuple[int, int, int],
) -> torch.Tensor | None:
    """Fill in the gradients of a chunk's part of what `delta_rule` is given; returns that of the memory before it."""
    shrink, units, values, rate, total, decays, weights, inverse, change, before, after = chunk
    both, keys = units.flatten(1, 2), units[:, :, 1]
    slopes = units.new_empty(*units.shape[:3], values.shape[2])  # (B, C, 2, E): of O, and of -(V - exp(G) K S)
    torch.mul(of_output, sizes[2] ** -0.5, out=slopes[:, :, 0])
    of_change = weights[:, :, 0].mT @ slopes[:, :, 0]
    if of_after is not None:
        of_change.baddbmm_(_written(units, total), of_after)
    torch.mul(inverse.mT @ of_change, -rate, out=slopes[:, :, 1])
    of_weights = (slopes.flatten(1, 2) @ change.mT).unflatten(1, (-1, 2)).mul_(decays[:, :, None])
    of_weights[:, :, 1].diagonal(dim1=1, dim2=2).zero_()
    of_rows = of_weights.flatten(1, 2) @ keys  # (B, 2 C, D): of queries, and of keys as rows of A and readers of S
    of_columns = of_weights.flatten(1, 2).mT @ both  # (B, C, D): of keys as columns of P and A, and as written
    of_before = None
    if before is not None:
        read = (slopes * total.exp()[..., None]).flatten(1, 2)
        of_rows.baddbmm_(read, before.mT)
        of_before = both.mT @ read
    if of_after is not None:
        of_columns += (change @ of_after.mT).mul_((total[:, -1:] - total).exp_())
        if of_before is not None:
            of_before.addcmul_(of_after, total[:, -1:].exp())
    of_units = of_rows.unflatten(1, (-1, 2))
    rows, columns = torch.linalg.vecdot(units, of_units), torch.linalg.vecdot(keys, of_columns)
    of_total = rows.sum(2) - columns
    if of_after is not None:
        assert after is not None, "a gradient comes back only from a memory that was given"
        of_total[:, -1] += torch.linalg.vecdot(after.flatten(1), of_after.flatten(1))
    by_token = lambda one: one.unflatten(0, (len(shrink), -1)).transpose(1, 2)  # noqa: E731
    of_decay.copy_(by_token(of_total.flip(1).cumsum(1).flip(1)))
    of_beta = rows[:, :, 1] - torch.linalg.vecdot(values, slopes[:, :, 1])
    of_rate.copy_(by_token(of_beta / rate[:, :, 0].clamp_min(_LEAST_RATE)))
    of_units[:, :, 1] += of_columns
    rows[:, :, 1] += columns
    of_pairs, of_values = _parts(of_mixed, sizes)
    of_units.addcmul_(units, rows[..., None], value=-1)
    if sizes[1] > sizes[0]:
        of_units = of_units.unflatten(0, (-1, sizes[1] // sizes[0])).sum(1)
    torch.mul(by_token(of_units), shrink, out=of_pairs)
    torch.neg(by_token(slopes[:, :, 1]), out=of_values)
    return of_before
