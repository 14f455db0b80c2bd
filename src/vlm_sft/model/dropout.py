"""LoRA dropout whose masks do not depend on packing, ranks or order. Imports torch only.

An ordinary dropout draws its mask from a random stream, so another split of the same batch over ranks or packs drops
other values, and two runs that should be one optimisation drift apart. Here a value is dropped or kept by a hash of
(seed, step, module, question or image, token, channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_keys: tuple[torch.Tensor, ...] = ()  # of all tokens, and of those rows that a trimmed layer keeps
_step = 0

_PRIME_A, _PRIME_B = 0x2C1B3C6D, 0x297A2D39  # odd 31-bit multipliers: products wrap around in int32


@contextmanager
def dropout_keys(keys: torch.Tensor | None, step: int, rows: torch.Tensor | None = None) -> Iterator[None]:
    """Set what the masks are made from while the block runs (forward and backward of one pack).

    Args:
        keys: (L,) int64, a number a token, from `PackedBatch.keys`; None for ordinary dropout.
        step: number of the optimizer step.
        rows: (S,) int64, the tokens that a trimmed last layer keeps (`model/trim.py`); their keys go with them.
    """
    global _keys, _step
    previous, previous_step = _keys, _step
    _keys = () if keys is None else (keys,) if rows is None else (keys, keys[rows])
    _step = step
    try:
        yield
    finally:
        _keys, _step = previous, previous_step


def _mix(value: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _signed(value: int, bits: int) -> int:
    """The low bits as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def keep_mask(keys: torch.Tensor, channels: int, probability: float, seed: int) -> torch.Tensor:
    """Decide which values are kept.

    Args:
        keys: (L,) int64, one number a token.
        channels: width C of the activations.
        probability: share of values that are dropped.
        seed: a number of the run, the step and the module.

    Returns:
        (L, C) bool, True where a value is kept.
    """
    device = keys.device
    rows = keys * _signed(_mix(seed) | 1, 64)
    rows = (rows ^ (rows >> 32)).to(torch.int32)[:, None]
    columns = torch.arange(channels, device=device, dtype=torch.int64) * _signed(_mix(seed + 1) | 1, 64)
    columns = (columns ^ (columns >> 32)).to(torch.int32)[None, :]
    bits = rows ^ columns
    for prime, shift in ((_PRIME_A, 15), (_PRIME_B, 13)):
        # int32 shifts copy the sign, and the sign decides here, so the bits that are shifted in are cleared.
        bits = bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))
        bits = bits * prime
    return bits >= _signed(int(probability * 2**32) - 2**31, 64)


class KeyedDropout(torch.nn.Module):
    """Dropout with masks from `keep_mask` inside `dropout_keys`, ordinary dropout elsewhere.

    Args:
        probability: share of values that are dropped.
        seed: a number that differs from module to module and run to run.
    """

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self.p = probability
        self.seed = seed

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drop values of a (1, L, C) activation and scale the others by 1 / (1 - probability)."""
        if not self.training or self.p == 0.0:
            return values
        if not _keys:
            return torch.nn.functional.dropout(values, self.p)
        keys = next((keys for keys in _keys if len(keys) == values.shape[-2]), None)
        assert keys is not None, f"{values.shape[-2]} tokens in a layer of a pack of {len(_keys[0])}"
        seed = _mix(self.seed * 1_000_003 + _step)
        keep = keep_mask(keys, values.shape[-1], self.p, seed)
        return values * keep.to(values.dtype).mul_(1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        """Show the probability when the model is printed."""
        return f"p={self.p}"
