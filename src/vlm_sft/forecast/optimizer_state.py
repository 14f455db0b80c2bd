"""The state of an optimizer in bytes, by its name in the recipe. Pure functions."""

from __future__ import annotations

from vlm_sft.forecast.flops import Adapter
from vlm_sft.forecast.shapes import ModelShape

SMALLEST_IN_8_BITS = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in float32
SMALLEST_PAGED = 100_000  # numbers; those of smaller tensors stay where the others are
BLOCK = 256  # numbers of 8 bits that share a scale in float32
ADAFACTOR = 0.02 * 4  # its rows and columns, per number of a matrix


def state_bytes(model: ModelShape, adapter: Adapter, optim: str) -> float:
    """Bytes of the state of an optimizer that one process holds alone.

    Args:
        model, adapter: what is trained.
        optim: as in the recipe.
    """
    trained = adapter.parameters(model)
    if optim == "adafactor":
        return trained * ADAFACTOR
    if not is_in_8_bits(model, adapter, optim):
        return trained * 8
    wide = model.text.embedding * adapter.everything  # embeddings keep float32
    return wide * 8 + (trained - wide) * 2 * (1 + 4 / BLOCK)


def is_in_8_bits(model: ModelShape, adapter: Adapter, optim: str) -> bool:
    """Whether the state of most tensors has 8 bits; arguments as for `state_bytes`."""
    return optim.endswith("8bit") and mean_size(model, adapter) >= SMALLEST_IN_8_BITS


def is_paged(model: ModelShape, adapter: Adapter, optim: str) -> bool:
    """Whether the state leaves a GPU where it does not fit; arguments as for `state_bytes`."""
    return optim.startswith("paged") and mean_size(model, adapter) >= SMALLEST_PAGED


def mean_size(model: ModelShape, adapter: Adapter) -> float:
    """Numbers of a trained tensor, on average."""
    return adapter.parameters(model) / max(1, adapter.tensors(model))
