"""LoRA dropout whose masks do not depend on packing, ranks or order.

An ordinary dropout draws its mask from a random stream, so another split of the same batch over ranks or packs drops
other values, and two runs that should be one optimisation drift apart. Here a value is dropped or kept by a hash of
(seed, step, module, question or image, token, channel).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from vlm_sft.model.forward_patch import PLAIN_REASON, is_plain, reason_of
from vlm_sft.model.pack_context import current_pack

# Odd 31-bit multipliers, whose products wrap around in int32, and shifts.
_ROUNDS = ((0x2C1B3C6D, 15), (0x297A2D39, 13))
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHECKED_TOKENS, _CHECKED_CHANNELS = 37, 1100  # no multiples of a kernel's blocks


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


def _factors(seed: int) -> tuple[int, int]:
    """The 64-bit multipliers of keys and of channels."""
    return _signed(_mix(seed) | 1, 64), _signed(_mix(seed + 1) | 1, 64)


def _threshold(probability: float) -> int:
    """The signed 32-bit number below which a hash means that the value is dropped."""
    return int(probability * 2**32) - 2**31


def _bits(keys: torch.Tensor, channels: int, seed: int) -> torch.Tensor:
    """(L, C) int32, a hash of every token's key and channel."""
    of_keys, of_channels = _factors(seed)
    rows = keys * of_keys
    rows = (rows ^ (rows >> 32)).to(torch.int32)[:, None]
    columns = torch.arange(channels, device=keys.device, dtype=torch.int64) * of_channels
    columns = (columns ^ (columns >> 32)).to(torch.int32)[None, :]
    bits = rows ^ columns
    for prime, shift in _ROUNDS:
        # int32 shifts copy the sign, and the sign decides here, so the bits that are shifted in are cleared.
        bits = bits ^ ((bits >> shift) & ((1 << (32 - shift)) - 1))
        bits = bits * prime
    return bits


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
    return _bits(keys, channels, seed) >= _threshold(probability)


def uniform_noise(keys: torch.Tensor, channels: int, seed: int) -> torch.Tensor:
    """Numbers between -1 and 1 from the same hash, (L, C) float32; arguments as for `keep_mask`."""
    return _bits(keys, channels, seed).float() / 2**31


def step_seed(seed: int, step: int) -> int:
    """The seed of one module in one step.

    Args:
        seed: of the module.
        step: optimizer steps done.
    """
    return _mix(seed * 1_000_003 + step)


def stepwise_dropout(values: torch.Tensor, keys: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """Drop values in PyTorch's own operators, on every device.

    Args:
        values: (…, L, C).
        keys, probability, seed: as in `keep_mask`.

    Returns:
        The same shape and dtype; kept values are multiplied by 1 / (1 - probability).
    """
    keep = keep_mask(keys, values.shape[-1], probability, seed)
    # In half precision a scale that is rounded before would move the mean.
    return (values * (1.0 / (1.0 - probability))).mul_(keep.to(values.dtype))


class _FusedDropout(torch.autograd.Function):
    """`stepwise_dropout` in one kernel that keeps nothing but the keys for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, keys: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
        """Drop values of (…, L, C)."""
        from vlm_sft.model.gpu.dropout_kernel import drop

        ctx.save_for_backward(keys)
        ctx.settings = (_factors(seed), _threshold(probability), 1.0 / (1.0 - probability), _ROUNDS)
        return drop(values, keys, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient of the values: dropped where they were."""
        from vlm_sft.model.gpu.dropout_kernel import drop

        (keys,) = ctx.saved_tensors
        return drop(gradients[0], keys, *ctx.settings), None, None, None


def fused_dropout(values: torch.Tensor, keys: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """`stepwise_dropout` in one kernel: the same values bit by bit; float32, float16 or bfloat16 on a GPU.

    Args:
        values, keys, probability, seed: as in `stepwise_dropout`.
    """
    return _FusedDropout.apply(values, keys, probability, seed)


def fused_problem(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device; None where it gives the values of the formula on the CPU."""
    if device.type != "cuda":
        return "no GPU"
    return PLAIN_REASON if is_plain() else _kernel_problem_once(device)


@cache
def _kernel_problem_once(device: torch.device) -> str | None:
    """The same for a GPU, found out once a process."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        return kernel_problem(device)
    except Exception as error:  # a compiler and a driver may raise anything
        return f"Triton's kernel does not run here ({reason_of(error)})"


@torch.no_grad()
def kernel_problem(device: torch.device) -> str | None:
    """Compare the kernel with the formula on the CPU, bit by bit; says what differs, None if nothing does.

    The backward pass is the same kernel, on the gradient. Nothing is kept for one here: the first pack may be inside a
    checkpointed layer, whose recomputation would miss it.
    """
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (_CHECKED_TOKENS,), generator=generator)
    exact = torch.randn(1, _CHECKED_TOKENS, _CHECKED_CHANNELS, generator=generator)
    for dtype in KERNEL_DTYPES:
        for probability in (0.05, 0.5):
            values = exact.to(dtype)
            found = fused_dropout(values.to(device), keys.to(device), probability, 3).cpu()
            if not torch.equal(found, stepwise_dropout(values, keys, probability, 3)):
                return f"Triton's kernel gives other values than the formula here, in {str(dtype)[6:]}"
    return None


class KeyedDropout(torch.nn.Module):
    """Dropout with masks from `keep_mask` inside a pack with keys, ordinary dropout elsewhere.

    Args:
        probability: share of values that are dropped.
        seed: a number that differs from module to module and run to run.
    """

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__()
        self.p = probability
        self.seed = seed

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drop values of a (1, L, C) or (B, T, C) activation and scale the others by 1 / (1 - probability)."""
        if not self.training or self.p == 0.0:
            return values
        pack = current_pack()
        rows = values.flatten(0, -2)
        keys = pack.keys_for(len(rows))
        if keys is None:
            return torch.nn.functional.dropout(values, self.p)
        fits = values.is_cuda and values.dtype in KERNEL_DTYPES and fused_problem(values.device) is None
        dropout = fused_dropout if fits else stepwise_dropout
        return dropout(rows, keys, self.p, step_seed(self.seed, pack.step)).view_as(values)

    def extra_repr(self) -> str:
        """Show the probability when the model is printed."""
        return f"p={self.p}"
