"""The setting of a run as the forecast counts it: the sizes of its base, its adapter, kernels, device and ranks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from vlm_sft.common.record import device_name
from vlm_sft.forecast.calibration import history_key
from vlm_sft.forecast.flops import adapter_of
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.setting import RankLayout, Setting
from vlm_sft.forecast.shapes import ModelShape, TextShape, VisionShape, model_shape
from vlm_sft.model.gpu import liger
from vlm_sft.model.gpu.flash import gathered_heads
from vlm_sft.model.layout import without_weights
from vlm_sft.model.load import Base
from vlm_sft.planning.training_run import TrainingRun


def shape_of(base: Base) -> ModelShape:
    """The sizes of a base model: from its configuration, or counted where the family is unknown."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    return model_shape(config.to_dict()) or _counted_shape(config)


def _counted_shape(config: Any) -> ModelShape:
    """The sizes of a model of an unknown family, counted on its modules without weights."""
    model = without_weights(config)
    text = config.get_text_config()
    decoder = model.get_decoder()
    embedding = model.get_input_embeddings().weight.numel()
    inside = {id(parameter) for parameter in decoder.parameters()}
    language = sum(parameter.numel() for parameter in decoder.parameters()) - embedding
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    heads = text.num_attention_heads
    outside = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and not name.startswith("lm_head")
    ]
    vision = getattr(config, "vision_config", None)
    width = int(getattr(vision, "hidden_size", 0) or 1)
    layers = int(getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0) or 1)
    products = sum(parameter.numel() for _, parameter in outside if parameter.dim() > 1)
    size = getattr(vision, "patch_size", 14)
    patch = int(size[0] if isinstance(size, list | tuple) else size)
    return ModelShape(
        config.model_type,
        TextShape(
            text.num_hidden_layers,
            text.hidden_size,
            getattr(text, "intermediate_size", 0) or text.moe_intermediate_size,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.vocab_size,
            language,
            tied,
        ),
        VisionShape(
            layers, width, products, 0, sum(parameter.numel() for _, parameter in outside), 4, 0, layers, 3 * patch**2
        ),
    )


def setting_of(run: TrainingRun, shape: ModelShape, value_bytes: int, rates: Rates, flash: bool) -> Setting:
    """What time, memory and disk of a run depend on besides the amount of work.

    Args:
        run: its recipe, and how its passes are cut where that is decided.
        shape: the base.
        value_bytes: of one number of the computation.
        rates: of one device.
        flash: whether FlashAttention computes the attention.
    """
    return Setting(
        shape,
        adapter_of(run.recipe, shape),
        value_bytes,
        run.checkpointing,
        rates,
        four_bit=run.recipe.load_in_4bit,
        fused=rates.gpu and liger.missing() is None,
        flash_heads=gathered_heads(shape.text.heads, shape.text.kv_heads) if flash else 0,
        ranks=RankLayout(run.launch.world_size, run.launch.parallel),
    )


def past_runs_key(shape: ModelShape, setting: Setting) -> dict[str, Any]:
    """What a past run on this machine must have in common with a run to be like it."""
    changes = {
        "value_bytes": setting.value_bytes,
        "checkpointing": setting.checkpointing,
        "world_size": setting.ranks.count,
        "parallel": setting.ranks.parallel,
        "dropout": setting.adapter.dropout,
        "targets": [setting.adapter.r, *setting.adapter.targets],
        "train": [setting.adapter.vision, setting.adapter.projector, setting.adapter.everything],
    }
    return history_key(device_name(), torch.get_num_threads(), shape.key, changes)
