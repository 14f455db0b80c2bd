"""Positions of the tokens of a pack, computed by whoever collates it.

A family of M-RoPE finds them with some sixty small operations per image, several of which wait for a GPU. They follow
from the tokens and the sizes of the images alone, so data workers compute them on CPUs, beside the training.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vlm_sft.data.collate import PackedBatch
from vlm_sft.model.families import family_of
from vlm_sft.model.forward_patch import bare_copy
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.vision_features import inner_model


class Positions:
    """Computes the rotary positions of a pack's tokens: those of each question alone behind its image.

    It has the model's settings and none of its weights, so it may go to another process.

    Args:
        model: the model, wrapped or not.
    """

    def __init__(self, model: AnyModel) -> None:
        inner = inner_model(model)
        self._bare: Any = None
        if hasattr(inner, "get_rope_index"):
            self._bare = bare_copy(inner)
            self._axes = family_of(inner.config).position_axes

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Positions of a pack.

        Args:
            batch: the pack.

        Returns:
            (3, 1, L) int64 where the model has `get_rope_index` (M-RoPE of the Qwen-VL family; HunyuanOCR has four
            axes): the prefix gets its rows, and a question starts at the prefix's largest position + 1, the same on
            all rows. Else (1, L).
        """
        if self._bare is None:
            return batch.index[None]
        rows = batch.offset.repeat(self._axes, 1)
        starts = torch.zeros(len(batch.ends), dtype=torch.long, device=rows.device)
        accepted = inspect.signature(self._bare.get_rope_index).parameters
        for image, (start, end, *_) in enumerate(batch.ends):
            if not batch.tensors[image]:  # text alone counts up, on all rows alike
                starts[image] = end - start
                continue
            arguments = {name: value for name, value in batch.tensors[image].items() if name in accepted}
            if "mm_token_type_ids" in accepted:
                arguments["mm_token_type_ids"] = batch.prefix_types[None, start:end]
            ids = batch.input_ids[:, start:end]
            if "attention_mask" in accepted:  # Qwen3-Omni does not do without
                arguments["attention_mask"] = torch.ones_like(ids)
            prefix, _ = self._bare.get_rope_index(input_ids=ids, **arguments)
            rows[:, start:end] = prefix[-self._axes :, 0]
            starts[image] = prefix.max() + 1
        rows = torch.where(batch.branch[None] == 0, rows, rows + starts[batch.group][None])
        return rows[:, None]
