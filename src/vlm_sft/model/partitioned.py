"""Models whose weights the ranks share out, for those that no device holds whole. Imports errors and the loader.

This is DeepSpeed's ZeRO stage 3 without an optimizer, "ZeRO-Inference" (Aminabadi et al. 2022): every rank keeps a part
of each tensor, and a layer's tensors are gathered when it computes and dropped behind it. So every rank has to take
every forward pass.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from vlm_sft.errors import ModelError
from vlm_sft.model.adapt import load_adapter
from vlm_sft.model.load import Base, empty_model, load_model

# What answering needs beside the weights: keys, values and activations of a pack, the allocator's fragments.
_BESIDE_SHARE, _BESIDE_BYTES = 0.1, 4 * 1024**3


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has shared out the weights of a model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shards_weights(wanted: str, base: Base, ranks: int, memory_bytes: int) -> bool:
    """Decide whether the ranks share out the weights while they answer.

    Args:
        wanted: "true", "false" or "auto", which does so where a whole model does not fit.
        base: the model.
        ranks: how many there are.
        memory_bytes: what one of them may use.

    Raises:
        ModelError: it is asked for, and cannot be done.
    """
    if wanted == "auto":
        if ranks < 2 or base.load_in_4bit or find_spec("deepspeed") is None:
            return False
        return (1 + _BESIDE_SHARE) * _weight_bytes(base) + _BESIDE_BYTES > memory_bytes
    if wanted == "false":
        return False
    if ranks < 2:
        raise ModelError(
            "--shard_weights true: there is one rank, and nobody to share with",
            "start several: torchrun --nproc_per_node=N -m vlm_sft …",
        )
    if base.load_in_4bit:
        raise ModelError("--shard_weights true: ZeRO-3 cannot partition 4-bit weights", "leave one of the two out")
    if find_spec("deepspeed") is None:
        raise ModelError("--shard_weights true: DeepSpeed is not installed", "pip install 'vlm-sft[deepspeed]'")
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
        The model, frozen, on the device of this rank.

    Raises:
        ModelError: the weights or the adapter cannot be opened.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    settings = {
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": base.dtype.itemsize == 2},
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "steps_per_print": 1_000_000_000,
    }
    alive = HfDeepSpeedConfig(settings)  # while it lives, transformers shares the weights out as it reads them
    try:
        model = load_model(base).requires_grad_(False)
        if adapter is not None:
            model = load_adapter(model, adapter)
        engine, *_ = deepspeed.initialize(model=model, config=settings)
    finally:
        del alive
        unset_hf_deepspeed_config()
    return engine.module.eval()
