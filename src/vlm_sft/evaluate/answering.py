"""The model that an evaluation asks, whole on this rank's device, or this rank's share. Imports model, launch, record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_sft.console import say
from vlm_sft.launch import Launch, agree, join_deepspeed
from vlm_sft.model.adapt import load_adapter
from vlm_sft.model.load import Base, load_model, to_gpu
from vlm_sft.model.partitioned import load_partitioned, shards_weights
from vlm_sft.record import memory_bytes


def load_answering(base: Base, adapter: Path | None, launch: Launch, shard_weights: str) -> Any:
    """Load the base, or an adapter on it, frozen; all ranks must call it.

    Args:
        base: the base model.
        adapter: folder of a LoRA adapter; None for the base alone.
        launch: the ranks.
        shard_weights: as of `shards_weights`.

    Raises:
        ModelError: the weights or the adapter cannot be opened, or not be shared out as asked.
    """
    memory = memory_bytes() // (launch.local_size if launch.cpu else 1)
    if agree(lambda: shards_weights(shard_weights, base, launch.world_size, memory)):
        say(f"the weights are shared out over {launch.world_size} ranks while they answer (--shard_weights)")
        join_deepspeed(launch)
        return load_partitioned(base, adapter, launch.world_size)
    model = load_model(base).requires_grad_(False)  # frozen features are kept of a frozen tower only
    if not launch.cpu:
        to_gpu(model, base, launch.gpu)
    return load_adapter(model, adapter) if adapter is not None else model
