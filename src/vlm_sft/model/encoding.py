"""The encoder of a base model."""

from __future__ import annotations

from vlm_sft.data.encode import Encoder
from vlm_sft.model.hub import model_config
from vlm_sft.model.load import Base


def encoder_of(base: Base) -> Encoder:
    """An encoder with the processor, the prompt and the end tokens of a base."""
    return Encoder(base.processor, base.prompt, base.stop_ids, lambda: model_config(base.path).model_type)
