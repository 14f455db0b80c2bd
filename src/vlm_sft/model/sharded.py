"""Models whose weights are partitioned over the ranks, for those that no device holds whole.

This is DeepSpeed's ZeRO stage 3 without an optimizer, "ZeRO-Inference" (Aminabadi et al. 2022): every rank keeps a part
of each tensor, and a layer's tensors are gathered when it computes and freed after it. So every rank has to take part
in every forward pass.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.errors import ModelError
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.load import Base, empty_model, load_model

# What answering needs beside the weights: keys, values and activations of a pack, the allocator's fragments.
_BESIDE_SHARE, _BESIDE_BYTES = 0.1, 4 * 1024**3


def shards_weights(wanted: str, base: Base, ranks: int, memory_bytes: int) -> bool:
    """Decide whether the weights are partitioned over the ranks while they answer.

    Args:
        wanted: "true", "false" or "auto", which does so where a whole model does not fit.
        base: the model.
        ranks: how many there are.
        memory_bytes: what one of them may use.

    Raises:
        ModelError: it was requested, and cannot be done.
    """
    if wanted == "auto":
        if ranks < 2 or base.load_in_4bit or find_spec("deepspeed") is None:
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
        raise ModelError("--shard_weights true: ZeRO-3 cannot partition 4-bit weights", "leave one of the two out")
    return True


def _weight_bytes(base: Base) -> int:
    """Bytes of all weights in the dtype of the computation."""
    return sum(parameter.numel() for parameter in empty_model(base.path).parameters()) * base.dtype.itemsize


def load_partitioned(base: Base, adapter: Path | None, ranks: int) -> Any:
    """Load a model so that no rank ever holds it whole; all ranks must call it.

    Args:
        base: where it is found.
        adapter: folder of a LoRA adapter on it; None for the base alone.
        ranks: how many there are; DeepSpeed has joined them already.

    Returns:
        The model, frozen; `gather_on_forward` lets it compute.

    Raises:
        ModelError: the weights or the adapter cannot be opened.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(_settings(base, ranks))  # while it lives, weights are partitioned as they are read
    try:
        model = load_model(base).requires_grad_(False)
        return model if adapter is None else load_adapter(model, adapter)
    finally:
        del alive
        unset_hf_deepspeed_config()


def gather_on_forward(model: torch.nn.Module, base: Base, ranks: int) -> None:
    """Let the layers of a model from `load_partitioned` gather their weights to compute; all ranks must call it."""
    import deepspeed

    deepspeed.initialize(model=model.eval(), config=_settings(base, ranks))


def _settings(base: Base, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": base.dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "steps_per_print": 1_000_000_000,
    }
