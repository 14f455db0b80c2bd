"""Keyed dropout as one kernel for GPUs.

In PyTorch's own operators the formula of `model/dropout.py` is 13 kernels that write matrices of integers. Here a value
is read, its bit is computed in registers, and it is written again; the backward pass computes the bits anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE_ROWS, _TILE_COLUMNS = 4, 1024  # of one program: the hash of a column serves all rows of the tile
# Triton compiles a kernel anew for numbers that are multiples of 16; these change with every pack, step and module.
_VARYING = ("row_factor", "column_factor", "threshold", "scale", "tokens", "rows")


@triton.jit(do_not_specialize=_VARYING)
def _drop(  # type: ignore[no-untyped-def]  # Triton reads annotations, and takes only its own
    values,
    keys,
    output,
    row_factor,
    column_factor,
    threshold,
    scale,
    tokens,
    rows,
    channels,
    prime_a: tl.constexpr,
    shift_a: tl.constexpr,
    prime_b: tl.constexpr,
    shift_b: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """One tile of (rows, channels) values; row r has key r modulo tokens. `keep_mask` in unsigned integers."""
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    row_hash = tl.load(keys + row % tokens, mask=row < rows, other=0) * row_factor
    column_hash = column.to(tl.int64) * column_factor
    row_bits = (row_hash ^ (row_hash >> 32)).to(tl.uint32)
    column_bits = (column_hash ^ (column_hash >> 32)).to(tl.uint32)
    bits = row_bits[:, None] ^ column_bits[None, :]
    bits = (bits ^ (bits >> shift_a)) * prime_a
    bits = (bits ^ (bits >> shift_b)) * prime_b
    kept = tl.where(bits.to(tl.int32, bitcast=True) >= threshold, 1.0, 0.0)
    place = row[:, None].to(tl.int64) * channels + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < channels)
    # A product, not a choice: a value that is not finite shows in the loss even where it is dropped.
    scaled = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(output + place, (scaled * kept).to(output.dtype.element_ty), mask=inside)


def drop(
    values: torch.Tensor,
    keys: torch.Tensor,
    factors: tuple[int, int],
    threshold: int,
    scale: float,
    rounds: tuple[tuple[int, int], tuple[int, int]],
) -> torch.Tensor:
    """Drop values and scale the others.

    Args:
        values: (…, L, C), of one of `DTYPES`.
        keys: (L,) int64.
        factors: 64-bit multipliers of keys and of channels, signed.
        threshold: hashes below it, as signed 32-bit numbers, are dropped.
        scale: what kept values are multiplied by.
        rounds: multiplier and shift of the two rounds of mixing.

    Returns:
        The same shape and dtype.
    """
    values = values.contiguous()
    output = torch.empty_like(values)
    channels = values.shape[-1]
    rows = values.numel() // channels
    grid = (triton.cdiv(rows, _TILE_ROWS), triton.cdiv(channels, _TILE_COLUMNS))
    (prime_a, shift_a), (prime_b, shift_b) = rounds
    with torch.cuda.device_of(values):
        _drop[grid](
            values,
            keys,
            output,
            *factors,
            threshold,
            scale,
            len(keys),
            rows,
            channels,
            prime_a,
            shift_a,
            prime_b,
            shift_b,
            _TILE_ROWS,
            _TILE_COLUMNS,
        )
    return output
