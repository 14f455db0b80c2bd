"""Peak memory of one device, item by item.

Weights, gradients and optimizer follow from counts of parameters (what ZeRO's stages share out among the ranks:
Rajbhandari et al. 2020, arXiv:1910.02054). Activations are what autograd keeps for the backward pass of one pack,
counted in the code of a layer: with frozen weights a linear module keeps nothing, so norms, the adapter's inputs,
attention and the gated product remain. tests/unit/test_forecast_memory.py compares with what autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_sft.forecast.flops import STATE_CHUNK, Work, state_values
from vlm_sft.forecast.optimizer_state import is_paged, state_bytes
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.shapes import StateShape

NORM_VALUES = 4  # hidden vectors per token and layer: the input of two norms, and their normalised values
NORM_VALUES_HALF = 4  # in half precision the two inputs as float32 copies
NORM_VALUES_FUSED = 2  # the two inputs as they are
ATTENTION_VALUES = 4  # queries, keys, values (repeated for every head) and the output
GATE_VALUES = 3  # gate, activated gate, up
GATE_VALUES_TWO = 2  # gate and up, where MLPs are computed block by block or by one kernel
BACKWARD_VALUES = 3  # vectors of the MLP's width per token that the backward pass of one layer holds at once
# Modules that read the same vectors; without dropout these are kept once. The output projection's stay with attention.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
CONVOLUTION_VALUES = 3  # of layers with a state: its inputs, its outputs, their activation
LOGIT_VALUES = 3  # float32 scores, their probabilities and the gradient
# QLoRA (Dettmers et al. 2023): half a byte a weight, a byte for the scale of 64, 4 bytes for the scale of 256 scales.
FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
TOWER_PATCHES = 8192  # of one call in the pass that computes features
TOWER_VALUES = 12  # hidden vectors per patch at once, forward only
CONTEXT_BYTES = 600 * 1024**2  # of the driver on a GPU, outside the allocator
ZERO_BUCKET = 500_000_000  # gradients that DeepSpeed reduces at once (`reduce_bucket_size` at its default)
ZERO_BUCKETS = 2  # with `overlap_comm` one fills while the other is on its way


def weight_bytes(setting: Setting) -> float:
    """Bytes of the base's weights."""
    model = setting.model
    if not setting.four_bit:
        return model.parameters * setting.value_bytes
    language = model.text.layers * model.text.layer_weights
    return (model.parameters - language) * setting.value_bytes + language * FOUR_BIT_BYTES


def activation_bytes(setting: Setting, work: Work) -> float:
    """Bytes that autograd keeps for the backward pass of one pack, without the logits.

    Args:
        setting: the model on its device.
        work: of the pack.
    """
    text, size = setting.model.text, setting.stream_bytes
    layer = _layer_bytes(setting, work) * work.tokens
    # A CPU's allocator serves the backward pass from what was freed before.
    backward = BACKWARD_VALUES * text.intermediate * work.tokens * size if setting.rates.gpu else 0.0
    if setting.checkpointing:
        return text.layers * work.tokens * text.hidden * size + layer + backward
    if not setting.trimmed:
        return text.layers * layer + backward
    rows = _layer_bytes(setting, work) * work.supervised
    return (text.layers - 1) * layer + _keys_bytes(setting, work) * work.tokens + rows + backward


def _layer_bytes(setting: Setting, work: Work) -> float:
    """Bytes that one layer keeps for one token."""
    text, adapter = setting.model.text, setting.adapter
    gate = GATE_VALUES_TWO if setting.blockwise_mlp or setting.fused else GATE_VALUES
    kept: float = _norm_values(setting) * text.hidden + gate * text.intermediate
    kept += text.attending * _attention_values(setting, work) + _state_values(text.states, work)
    kept += _input_values(setting, tuple(text.linears) if adapter.everything else adapter.targets)
    return (kept + adapter.r * adapter.count(setting.model)) * setting.stream_bytes


def _norm_values(setting: Setting) -> int:
    """Hidden vectors that the norms of one layer keep for one token."""
    if setting.fused:
        return NORM_VALUES_FUSED
    return NORM_VALUES if setting.stream_bytes == 4 else NORM_VALUES_HALF


def _attention_values(setting: Setting, work: Work) -> float:
    """Values that the attention of one layer keeps for one token."""
    text = setting.model.text
    if not setting.flash_heads:
        return ATTENTION_VALUES * text.heads * text.head_dim
    gathered = work.keys / max(1.0, work.tokens)  # every question has a copy of its prefix's keys and values
    return (2 * text.heads + 2 * gathered * setting.flash_heads) * text.head_dim


def _state_values(states: StateShape | None, work: Work) -> float:
    """Values that layers with a state keep for one token, on average over all layers."""
    if states is None:
        return 0.0
    sequence = work.tokens / max(1.0, work.images + work.questions)
    return states.share * (
        CONVOLUTION_VALUES * states.inputs + state_values(states, max(1.0, min(STATE_CHUNK, sequence)))
    )


def _input_values(setting: Setting, names: Sequence[str]) -> float:
    """Values that the inputs of some trained modules of one layer take for one token."""
    linears, adapter = setting.model.text.linears, setting.adapter
    inputs = [linears[name].inputs * linears[name].share for name in names if name in linears]
    if not setting.rates.gpu and not adapter.everything:
        return sum(inputs) * (2 if adapter.dropout else 1)  # dropout makes a copy, and a mask on a CPU
    if adapter.dropout and not adapter.everything:
        return sum(inputs)
    return sum(linears[group[0]].inputs for group in SHARED_INPUTS if set(group) & set(names) and group[0] in linears)


def _keys_bytes(setting: Setting, work: Work) -> float:
    """Bytes that a trimmed last layer keeps for every token, whether it predicts or not: what keys and values need."""
    text, adapter = setting.model.text, setting.adapter
    adapted = [name for name in ("q_proj", "k_proj", "v_proj") if name in adapter.targets or adapter.everything]
    kept = _norm_values(setting) / 2 * text.hidden + _input_values(setting, adapted)
    kept += adapter.r * len(adapted) + _attention_values(setting, work) / 2
    return kept * setting.stream_bytes


def logit_bytes(setting: Setting, supervised: float) -> float:
    """Bytes of the scores of supervised positions with their gradient; without scores, of their hidden states' one."""
    if not setting.scored:
        return setting.model.text.hidden * supervised * setting.stream_bytes
    return setting.model.text.vocabulary * supervised * (setting.stream_bytes + 4 * LOGIT_VALUES)


def image_bytes(setting: Setting, work: Work, features: bool) -> float:
    """Bytes of the images of one pack: their features, or pixels with what the tower computes of them."""
    vision, text = setting.model.vision, setting.model.text
    kept = work.visual * text.hidden * setting.stream_bytes
    if features:
        size = feature_bytes(setting, work.visual)
        return size if setting.adapter.frozen_tower else kept + 3 * size  # the projector's norm and inner values, too
    pixels = work.visual * vision.patches_per_token * vision.patch_values * 4
    if setting.adapter.frozen_tower and setting.rates.gpu:
        return pixels + kept  # what the tower needs is free again when the language model begins
    return pixels + kept + _tower_values(setting, work)


def _tower_values(setting: Setting, work: Work) -> float:
    """Bytes that the tower needs at once for the images of one pack; of a trained one for its backward pass too."""
    vision = setting.model.vision
    hidden = work.visual * vision.patches_per_token * vision.hidden * setting.stream_bytes
    if not setting.adapter.trained_tower:
        return TOWER_VALUES * hidden
    # Checkpointing keeps the input of each block, and what one block needs.
    return (vision.layers + TOWER_VALUES) * hidden if setting.checkpointing else TOWER_VALUES * vision.layers * hidden


def feature_bytes(setting: Setting, visual: float) -> float:
    """Bytes of what is kept of some visual tokens: their vision features, or what goes into a trained projector."""
    vision = setting.model.vision
    frozen = setting.adapter.frozen_tower
    values = setting.model.text.hidden if frozen else vision.patches_per_token * vision.hidden
    return visual * (1 + vision.extra_features) * values * setting.stream_bytes


def cache_bytes(setting: Setting, tokens: float) -> float:
    """Bytes of the keys and values of a generation over some tokens."""
    text = setting.model.text
    return 2 * text.layers * text.kv_heads * text.head_dim * tokens * setting.stream_bytes


def peak_items(
    setting: Setting,
    largest: Work,
    answering_tokens: float,
    features: bool,
    process_bytes: float = 0.0,
    rounds: int = 1,
) -> dict[str, float]:
    """What a run holds at its peak, in bytes on one device.

    Args:
        setting: the model on its device.
        largest: the largest sizes of any pack.
        answering_tokens: tokens of the largest pack that is answered, answers included; 0 for none.
        features: whether packs hold kept vision features; else pixels.
        process_bytes: of the process before the model is loaded (on a CPU); 0 on a GPU.
        rounds: packs that a rank computes in one step.
    """
    items = {"process": process_bytes} | _state_items(setting)
    if setting.four_bit:  # the largest matrix of a layer, unpacked while it is used
        items["unpacked weights"] = setting.model.text.hidden * setting.model.text.intermediate * setting.value_bytes
    training = {
        "gradients": _gradient_bytes(setting, rounds),
        "activations": activation_bytes(setting, largest),
        "logits": logit_bytes(setting, largest.supervised),
        "images": image_bytes(setting, largest, features),
    }
    exchange = _exchange_items(setting)
    answering = {"answering": cache_bytes(setting, answering_tokens) + _forward_bytes(setting, answering_tokens)}
    tower = {"vision features": _tower_bytes(setting)} if features else {"images": _tower_values(setting, largest)}
    phases = (training, exchange, answering, tower)
    return items | max(phases, key=lambda phase: sum(phase.values()))


def _state_items(setting: Setting) -> dict[str, float]:
    """Weights and optimizer, which are held all the time.

    DeepSpeed holds what is trained in bfloat16 and its partition of it in float32 besides, with Adam's two moments
    (12 bytes a weight, shared out by stages 2 and 3). Without it what is trained is float32 (4 bytes, and what
    `optimizer_state.py` says), and autocast keeps the half-precision copy of a weight from its first use until the pass
    ends (2 bytes).
    """
    ranks, trained = setting.ranks, setting.adapter.parameters(setting.model)
    size = _trained_bytes(setting)
    master = 4 if size == 2 else 0
    # What is paged is not the device's: it makes room there.
    paged = setting.rates.gpu and is_paged(setting.model, setting.adapter, setting.optim)
    alone = 0.0 if paged else state_bytes(setting.model, setting.adapter, setting.optim)
    frozen = weight_bytes(setting) - trained * setting.value_bytes * setting.adapter.everything
    whole = setting.model.vision.parameters * setting.value_bytes * _tower_is_whole(setting)
    items = {
        "weights": whole + (frozen - whole) / ranks.shared_weights,
        "trained weights": trained * size / ranks.shared_weights,
        "optimizer": trained * (8 + master) / ranks.shared_optimizer
        if ranks.engine
        else alone / ranks.shared_optimizer,
    }
    if setting.rates.gpu and setting.value_bytes < size and ranks.shared_weights == 1:
        items["copies of trained weights"] = trained * setting.value_bytes
    if setting.rates.gpu and ranks.shared_weights > 1:  # the layer that is gathered, and the next one
        gathered = 2 * setting.model.text.layer_weights + _gathered_together(setting)
        items["gathered weights"] = gathered * setting.value_bytes
    return items


def _tower_is_whole(setting: Setting) -> bool:
    """Whether every rank holds a vision tower whose language model is divided: under FSDP, a frozen one."""
    return setting.ranks.parallel == "fsdp" and setting.adapter.frozen_tower


def _gathered_together(setting: Setting) -> float:
    """Weights that are gathered at once beside a layer's: the vocabulary's; under FSDP all that is in no layer."""
    model = setting.model
    if setting.ranks.parallel != "fsdp":
        return model.text.embedding
    tower = 0 if _tower_is_whole(setting) else model.vision.parameters
    return model.text.embedding * (1 if model.text.tied else 2) + tower


def _trained_bytes(setting: Setting) -> int:
    """Bytes of one trained weight, and of its gradient."""
    return 2 if setting.ranks.engine and setting.value_bytes == 2 else 4


def _gradient_bytes(setting: Setting, rounds: int) -> float:
    """Bytes of gradients while packs are computed.

    The sum over the packs of a step is whole on every rank (`model/step_gradients.py`), under ZeRO-2 too, and so are
    those of the pack that is being added. Under ZeRO-3 the engine runs backward itself and keeps the rank's partition.
    Under FSDP the sum of an adapter is whole; of a whole model it is the rank's part, beside the largest group of
    weights whose gradients are on their way, in the computation's format and in float32.
    """
    trained = setting.adapter.parameters(setting.model) * _trained_bytes(setting)
    if setting.ranks.parallel == "fsdp":
        if not setting.adapter.everything:
            return trained
        group = max(_gathered_together(setting), setting.model.text.layer_weights)
        return trained / setting.ranks.shared_weights + group * (setting.value_bytes + 4)
    if setting.ranks.shared_weights > 1:
        return trained / setting.ranks.shared_weights
    return trained * (2 if rounds > 1 else 1)


def _exchange_items(setting: Setting) -> dict[str, float]:
    """What is held while DeepSpeed reduces the gradients of a step and updates its partition; {} without DeepSpeed.

    The whole gradients go through contiguous buckets into this rank's partition, which the optimizer then widens to
    float32 (DeepSpeed's stage_1_and_2.py: `ipg_buckets`, `averaged_gradients`, `single_grad_partition`).
    """
    ranks = setting.ranks
    if not ranks.engine:
        return {}
    trained = setting.adapter.parameters(setting.model)
    size = _trained_bytes(setting)
    items = {"gradient partitions": trained * (size + (4 if size == 2 else 0)) / ranks.shared_optimizer}
    if ranks.shared_weights == 1:
        items["gradients"] = trained * size
    if setting.rates.gpu:
        bucket = setting.model.text.hidden**2 if ranks.shared_weights > 1 else ZERO_BUCKET  # "auto" under ZeRO-3
        items["gradient buckets"] = ZERO_BUCKETS * bucket * size
    return items


def _forward_bytes(setting: Setting, tokens: float) -> float:
    """Bytes that a forward pass without gradients needs at once."""
    text = setting.model.text
    return tokens * (4 * text.hidden + 3 * text.intermediate) * setting.stream_bytes


def _tower_bytes(setting: Setting) -> float:
    vision = setting.model.vision
    return TOWER_PATCHES * (vision.patch_values * 4 + TOWER_VALUES * vision.hidden * setting.stream_bytes)
