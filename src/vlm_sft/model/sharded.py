"""Models whose weights are divided over the ranks (`distributed/fsdp.py`), for those that no device holds whole."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.errors import ModelError
from vlm_sft.distributed.collectives import agree
from vlm_sft.distributed.fsdp import divide, mark
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.layout import empty_model, through_sdpa
from vlm_sft.model.load import Base, read_model, ready
from vlm_sft.model.vision_features import decoder_of, loose_parameters, tower_modules

# What answering needs beside the weights: keys, values and activations of a pack, the allocator's fragments.
_BESIDE_SHARE, _BESIDE_BYTES = 0.1, 4 * 1024**3


def shards_weights(wanted: str, base: Base, ranks: int, memory_bytes: int) -> bool:
    """Decide whether the weights are divided over the ranks while they answer.

    Args:
        wanted: "true", "false" or "auto", which does so where a whole model does not fit.
        base: the model.
        ranks: how many there are.
        memory_bytes: what one of them may use.

    Raises:
        ModelError: it was requested, and cannot be done.
    """
    if wanted == "auto":
        if ranks < 2 or base.load_in_4bit:
            return False
        return (1 + _BESIDE_SHARE) * _weight_bytes(base) + _BESIDE_BYTES > memory_bytes
    if wanted == "false":
        return False
    if ranks < 2:
        raise ModelError(
            "--shard_weights true: there is only one rank to shard over",
            "start several: torchrun --nproc_per_node=N -m vlm_sft …",
        )
    if base.load_in_4bit:
        raise ModelError("--shard_weights true: 4-bit weights cannot be divided", "leave one of the two out")
    return True


def _weight_bytes(base: Base) -> int:
    """Bytes of all weights in the dtype of the computation."""
    return sum(parameter.numel() for parameter in empty_model(base.path).parameters()) * base.dtype.itemsize


def load_to_divide(base: Base) -> Any:
    """Load a model that `divide_model` will divide; all ranks must call it.

    Args:
        base: where it is found.

    Returns:
        The model, with its weights in the memory of rank 0's machine, and without any on other ranks.

    Raises:
        ModelError: the weights cannot be opened.
    """
    read: list[Any] = []
    agree(lambda: read.append(read_model(base)))
    if not read:
        read.append(through_sdpa(partial(empty_model, base.path, dtype=base.dtype), base.path).eval())
    model = read[0]
    mark(model)
    return ready(model, base.function)


def divide_model(model: Any, device: str, dtype: torch.dtype) -> None:
    """Divide the weights of a model over the ranks, on their devices; all ranks must call it.

    A frozen vision tower stays whole on each rank: it is small beside a language model, and so a rank can look at its
    own images by itself.

    Args:
        model: from `load_to_divide`, made ready for what it is to do.
        device: where this rank computes.
        dtype: of the computation.
    """
    tower = [parameter for module in tower_modules(model).values() for parameter in module.parameters()]
    tower += loose_parameters(model).values()
    frozen = not any(parameter.requires_grad for parameter in tower)
    divide(model, _layers(model), tower if frozen else (), torch.device(device), dtype)


def _layers(model: Any) -> list[torch.nn.Module]:
    """The layers of the language model: the longest list in it, by weights."""
    lists = [module for module in decoder_of(model).modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=[]))


def load_divided(base: Base, adapter: Path | None, device: str) -> Any:
    """Load a model that answers with its weights divided over the ranks; all ranks must call it.

    Args:
        base: where it is found.
        adapter: folder of a LoRA adapter on it; None for the base alone.
        device: where this rank computes.

    Returns:
        The model, frozen.

    Raises:
        ModelError: the weights or the adapter cannot be opened.
    """
    model = load_to_divide(base).requires_grad_(False)
    if adapter is not None:
        with warnings.catch_warnings():  # on other ranks than the first there is no place for its weights yet
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            model = load_adapter(model, adapter)
    divide_model(model, device, base.dtype)
    return model.eval()
