"""What an evaluation asks: the whole model on this rank's device, or its share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_sft.common.console import say
from vlm_sft.common.record import memory_bytes
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.sample import Sample
from vlm_sft.distributed.collectives import agree
from vlm_sft.distributed.launch import Launch
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.caches import Caches
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.load import Base, load_model
from vlm_sft.model.sharded import load_divided, shards_weights


def open_backend(
    base: Base, adapter: Path | None, launch: Launch, shard_weights: str, caches: Caches, samples: Sequence[Sample]
) -> tuple[SharedPrefixBackend, DataCache]:
    """Load the base, or an adapter on it, frozen, and prepare the images that it will see; all ranks must call it.

    Args:
        base: the base model.
        adapter: folder of a LoRA adapter; None for the base alone.
        launch: the ranks.
        shard_weights: as of `shards_weights`.
        caches: what is kept on disk.
        samples: the questions.

    Raises:
        ModelError: the weights or the adapter cannot be opened, or not be shared out as asked.
    """
    memory = memory_bytes() // (launch.local_size if launch.cpu else 1)
    shared = agree(lambda: shards_weights(shard_weights, base, launch.world_size, memory))
    if shared:
        say(f"the weights are sharded over {launch.world_size} ranks (--shard_weights)")
        model = load_divided(base, adapter, launch.device)
    else:
        # Frozen features are kept of a frozen tower only.
        model = load_model(base, launch.device).requires_grad_(False)
        model = load_adapter(model, adapter) if adapter is not None else model
    cache = caches.evaluation_cache(model, encoder_of(base), samples)
    return SharedPrefixBackend(base, model, images=cache.image_tensors), cache
