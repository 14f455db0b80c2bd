"""The setting of a run as the forecast counts it: the sizes of its base, its adapter, kernels, device and ranks."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from vlm_sft.common.errors import ModelError
from vlm_sft.common.record import device_name
from vlm_sft.forecast.calibration import history_key
from vlm_sft.forecast.flops import adapter_of
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.setting import RankLayout, Setting
from vlm_sft.forecast.shapes import Linear, Linears, ModelShape, StateShape, TextShape, VisionShape, model_shape
from vlm_sft.model.families import layer_values
from vlm_sft.model.forward_patch import reason_of
from vlm_sft.model.gpu import liger
from vlm_sft.model.gpu.flash import gathered_heads
from vlm_sft.model.hub import model_config
from vlm_sft.model.layout import without_weights
from vlm_sft.model.load import Base
from vlm_sft.model.parts import PROJECTOR_LORA, VISION_LORA, part_linears
from vlm_sft.model.recurrent import mixer_of
from vlm_sft.model.vision_features import decoder_of, head_of
from vlm_sft.planning.training_run import TrainingRun


def shape_of(base: Base) -> ModelShape:
    """The sizes of a base model: from its configuration, or counted where the family is unknown."""
    config = model_config(base.path)
    return model_shape(config.to_dict()) or _counted_shape(config)


def _counted_shape(config: Any) -> ModelShape:
    """The sizes of a model of an unknown family, counted on its modules without weights.

    Raises:
        ModelError: it cannot be built from its configuration.
    """
    try:
        model = without_weights(config)
    except Exception as error:  # what a broken configuration raises in transformers can be anything
        raise ModelError(
            f"no model can be built from the configuration of this {config.model_type}: {reason_of(error)}",
            "check config.json of --base_model, or use another base",
        ) from error
    text = config.get_text_config()
    decoder = decoder_of(model)
    embedding = model.get_input_embeddings().weight.numel()
    inside = {id(parameter) for parameter in decoder.parameters()}
    language = sum(parameter.numel() for parameter in decoder.parameters()) - embedding
    head = head_of(model)
    tied = head is None or head.weight is model.get_input_embeddings().weight
    inside |= set() if head is None else {id(parameter) for parameter in head.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    vision = getattr(config, "vision_config", None)
    products = sum(parameter.numel() for parameter in outside if parameter.dim() > 1)
    depth = _typical(vision, "num_hidden_layers") or _typical(vision, "depth") or 1
    tower = VisionShape(
        depth,
        _typical(vision, "hidden_size") or 1,
        products,
        0,
        sum(parameter.numel() for parameter in outside),
        4,
        0,
        depth,
        3 * (_typical(vision, "patch_size") or 14) ** 2,
        linears=_counted_linears(model, VISION_LORA),
        projector_linears=_counted_linears(model, PROJECTOR_LORA),
    )
    return ModelShape(config.model_type, _counted_text(text, decoder, language, tied), tower)


def _counted_linears(model: Any, part: str) -> Linears:
    """(inputs, outputs) of the modules of one part that can have LoRA; () where the part is not found."""
    try:
        modules = [model.get_submodule(path) for path in part_linears(model, part)]
    except ModelError:  # it is told when such a part is to be trained
        return ()
    return tuple((module.in_features, module.out_features) for module in modules)


def _counted_text(text: Any, decoder: Any, parameters: int, tied: bool) -> TextShape:
    """The sizes of a language model of an unknown family; a size that differs between its layers is their mean.

    Args:
        text: its configuration.
        decoder: its modules, without weights.
        parameters, tied: as in `TextShape`.
    """
    layers = _typical(text, "num_hidden_layers") or 1
    hidden, heads = _typical(text, "hidden_size") or 1, _typical(text, "num_attention_heads") or 1
    return TextShape(
        layers,
        hidden,
        # Experts alone, or nothing but what mixes tokens: a width that most families have.
        _typical(text, "intermediate_size") or _typical(text, "moe_intermediate_size") or 4 * hidden,
        heads,
        _typical(text, "num_key_value_heads") or heads,
        _typical(text, "head_dim") or max(1, hidden // heads),
        _typical(text, "vocab_size") or 1,
        parameters,
        tied,
        _counted_modules(decoder, layers, hidden, _typical(text, "num_experts_per_tok")),
        _counted_states(decoder, layers),
    )


def _counted_modules(
    decoder: Any, layers: int, hidden: int, active_experts: int | None
) -> tuple[tuple[str, Linear], ...]:
    """The linear modules of a decoder by the last part of their names; of experts what one token goes through."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            found.setdefault(path.rpartition(".")[2], []).append((module.in_features, module.out_features))
    for path, weight in decoder.named_parameters():
        if weight.dim() == 3 and min(weight.shape) > 1:  # of all experts of a layer
            through = weight[0].numel() * (active_experts or len(weight))
            found.setdefault(path.rpartition(".")[2], []).append((hidden, through // hidden))
    sizes = (
        (name, [round(fmean(side)) for side in zip(*all_, strict=True)], len(all_)) for name, all_ in found.items()
    )
    return tuple((name, Linear(inputs, outputs, count / layers)) for name, (inputs, outputs), count in sizes)


def _counted_states(decoder: Any, layers: int) -> StateShape | None:
    """The layers of a decoder that carry a state; None where it has none of a known kind."""
    found = [(mixer, module) for module in decoder.modules() if (mixer := mixer_of(module)) is not None]
    if not found:
        return None
    mixer, module = found[0]
    state = getattr(module, "A_log", None)
    return StateShape(
        len(found) / layers,
        mixer.convolution(module).out_channels,
        0 if state is None else state.numel(),
        getattr(module, "head_k_dim", getattr(module, "ssm_state_size", 0)),
        getattr(module, "head_v_dim", getattr(module, "head_dim", 0)),
    )


def _typical(config: Any, name: str) -> int | None:
    """The mean of a size over the layers of a tower or language model; None where its configuration has none."""
    values = [int(value) for value in layer_values(config, name) if value]
    return round(sum(values) / len(values)) if values else None


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
        optim=run.recipe.optim,
    )


def past_runs_key(shape: ModelShape, setting: Setting) -> dict[str, Any]:
    """What a past run on this machine must have in common with a run to be like it."""
    ranks = setting.adapter.vision_r, setting.adapter.projector_r
    seeing = ranks if any(ranks) else ()
    changes = {
        "value_bytes": setting.value_bytes,
        "checkpointing": setting.checkpointing,
        "world_size": setting.ranks.count,
        "parallel": setting.ranks.parallel,
        "dropout": setting.adapter.dropout,
        "targets": [setting.adapter.r, *setting.adapter.targets],
        "train": [setting.adapter.vision, setting.adapter.projector, setting.adapter.everything, *seeing],
    }
    return history_key(device_name(), torch.get_num_threads(), shape.key, changes)
