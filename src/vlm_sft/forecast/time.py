"""Seconds of the parts of a run from their work and the rates of a device.

A pass takes the sum of three terms: products of matrices at the rate reached for the model's sizes, simple operations
at the memory's bandwidth (a roofline without overlap, Williams et al. 2009), and a launch for every operation, which
is what small models are made of. A GPU computes while the next operations are launched: there the larger of the two
counts. A probe or past runs correct each kind of pass by a factor of its own. The numbers for GPUs are those of
bench/results/gpu_check-nvidia_h100_80gb_hbm3.json, kernel group by kernel group; `bench/forecast_gpu.py` compares.
"""

from __future__ import annotations

from vlm_sft.forecast.flops import (
    Work,
    exact_flops,
    forward_flops,
    state_flops,
    state_values,
    tower_attention_flops,
    tower_backward_flops,
    tower_flops,
    training_flops,
)
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.setting import Setting

PRODUCT_OVERHEAD = 1.25  # on a CPU, of products smaller than the one that is measured: adapters, heads of attention
PRODUCT_OVERHEAD_NARROW = 1.8  # the same in bfloat16, where rounding its input delays a narrow product more
# Of layers with a state, values per channel of the convolution, and per value that the delta rule makes of a token.
CONVOLUTION_PASSES, STATE_PASSES = 33, 13
ATTENTION_OVERHEAD = 2.0  # of scores and their softmax, over all patches of an image
# Reads and writes of simple operations (norms, rotary positions, activation, residuals), in values per token and layer:
# counted in the code of a Qwen2.5-VL layer.
HIDDEN_PASSES, INNER_PASSES = 22, 5
HEAD_PASSES, HEAD_PASSES_GPU = 7, 12  # five of rotary positions on a CPU (`model/cpu/rotary.py`), else ten
UNFUSED_PASSES = 1.85  # on a GPU without liger-kernel: so many times the passes
DROPOUT_PASSES = 34  # of the hash that makes a mask, 4-byte numbers
DROPOUT_PASSES_FUSED = 3  # of the kernel that does so on a GPU (`model/gpu/dropout_kernel.py`)
LORA_PASSES = 4
BACKWARD_PASSES = 1.6  # of those forward
# A module's launch costs about three times that of a bare operation: Python around it.
LAYER_LAUNCHES_FORWARD, LAYER_LAUNCHES_LORA, LAYER_LAUNCHES_BACKWARD = 135, 42, 1.5
IMAGE_LAUNCHES = 24  # of attention, per image and layer
TOWER_LAUNCHES = 200  # per layer and call
TOWER_PASSES, TOWER_PASSES_GPU = 50, 80  # values per patch and layer; on a GPU rotary positions are float32 copies
LOGIT_PASSES = 12  # of the loss, per vocabulary entry and position, 4-byte numbers
# The same where blocks of the MLP and of the vocabulary stay in the processor's cache.
INNER_PASSES_BLOCKWISE, LOGIT_PASSES_BLOCKWISE = 2, 4


def _simple_bytes(setting: Setting, work: Work, dropout: bool) -> float:
    """Bytes that the simple operations of a forward pass read and write."""
    text, adapter = setting.model.text, setting.adapter
    modules = adapter.modules(setting.model)
    inner = INNER_PASSES_BLOCKWISE if setting.blockwise_mlp else INNER_PASSES
    heads = (HEAD_PASSES_GPU if setting.rates.gpu else HEAD_PASSES) * text.heads * text.head_dim * text.attending
    values: float = HIDDEN_PASSES * text.hidden + heads + inner * text.intermediate
    values += LORA_PASSES * sum(one.outputs * one.share for one in modules)
    if setting.rates.gpu and not setting.fused:
        values *= UNFUSED_PASSES
    passes = DROPOUT_PASSES_FUSED * setting.value_bytes if setting.rates.gpu else DROPOUT_PASSES * 4
    masks = passes * sum(one.inputs * one.share for one in modules) if dropout and adapter.dropout else 0
    passes = LOGIT_PASSES if setting.scored else LOGIT_PASSES_BLOCKWISE
    logits = passes * 4 * text.vocabulary * work.supervised
    return text.layers * work.tokens * (values * setting.stream_bytes + masks) + logits


def _launches(setting: Setting, work: Work) -> float:
    """Launches of a forward pass."""
    layers, modules = setting.model.text.layers, setting.adapter.count(setting.model)
    per_pack = layers * (LAYER_LAUNCHES_FORWARD + LAYER_LAUNCHES_LORA * modules)
    return per_pack * work.packs + (0 if setting.flash_heads else layers * IMAGE_LAUNCHES * work.images)


def _products(rates: Rates, flops: float, exact: float = 0.0) -> float:
    """Seconds of products of matrices; `exact` of the operations are in float32 in any case."""
    if rates.float32_flops is not None:
        narrow = PRODUCT_OVERHEAD_NARROW * (flops - exact) / rates.flops
        return narrow + PRODUCT_OVERHEAD * exact / rates.float32_flops
    return (1.0 if rates.gpu else PRODUCT_OVERHEAD) * flops / rates.flops


def _state_seconds(setting: Setting, work: Work) -> float:
    """Seconds of what goes from token to token in layers with a state, forward: convolution and delta rule."""
    text, rates = setting.model.text, setting.rates
    if text.states is None:
        return 0.0
    passes = CONVOLUTION_PASSES * text.states.inputs + STATE_PASSES * state_values(text.states)
    tokens = text.layers * text.states.share * work.tokens
    simple = 4 * passes * tokens / rates.bandwidth
    return simple + PRODUCT_OVERHEAD * state_flops(text.states) * tokens / (rates.float32_flops or rates.flops)


def _pass_seconds(rates: Rates, computing: float, launches: float) -> float:
    """Seconds of passes from their seconds of computing and their number of launches."""
    starting = launches * rates.launch
    return max(computing, starting) if rates.gpu else computing + starting


def forward_seconds(setting: Setting, work: Work) -> float:
    """Seconds of forward passes without gradients: the evaluation loss, and the prompt of a generation."""
    rates = setting.rates
    exact = exact_flops(setting.model, work, setting.adapter)
    products = _products(rates, forward_flops(setting.model, work, setting.adapter), exact)
    products += _state_seconds(setting, work)
    simple = _simple_bytes(setting, work, False) / rates.bandwidth
    return _pass_seconds(rates, products + simple, _launches(setting, work))


def training_seconds(setting: Setting, work: Work) -> float:
    """Seconds of forward and backward passes."""
    rates = setting.rates
    again = 2 if setting.checkpointing else 1
    exact = exact_flops(setting.model, work, setting.adapter, again + 2)
    products = _products(
        rates, training_flops(setting.model, work, setting.adapter, setting.checkpointing), exact
    ) + _state_seconds(setting, work) * (again + BACKWARD_PASSES)
    simple = _simple_bytes(setting, work, True) * (again + BACKWARD_PASSES) / rates.bandwidth
    launches = _launches(setting, work) * (again + LAYER_LAUNCHES_BACKWARD)
    return _pass_seconds(rates, products + simple, launches)


def tower_seconds(setting: Setting, work: Work, training: bool = False) -> float:
    """Seconds of the vision tower on the images of some packs, one call per pack; backward only where it is trained."""
    rates, vision = setting.rates, setting.model.vision
    attention = tower_attention_flops(setting.model, work.visual, work.visual_squares)
    products = tower_flops(setting.model, work.visual, work.visual_squares) - attention
    products = _products(rates, products) + ATTENTION_OVERHEAD * attention / rates.flops
    if training:
        backward = tower_backward_flops(setting.model, work.visual, work.visual_squares, setting.adapter)
        products += _products(rates, backward)
    patches = work.visual * vision.patches_per_token
    passes = TOWER_PASSES_GPU if rates.gpu else TOWER_PASSES
    simple = patches * vision.layers * passes * vision.hidden * setting.stream_bytes / rates.bandwidth
    launches = vision.layers * (TOWER_LAUNCHES * work.packs + IMAGE_LAUNCHES * work.images)
    return _pass_seconds(rates, products + simple, launches)


def image_seconds(setting: Setting, work: Work, kept: bool, training: bool = False) -> float:
    """Seconds of the images of some packs: the tower's; where its output is kept, those of a trained projector."""
    if not kept:
        return tower_seconds(setting, work, training)
    if setting.adapter.frozen_tower:
        return 0.0
    products = 2 * setting.model.vision.token_weights * work.visual
    if training:
        products += tower_backward_flops(setting.model, work.visual, work.visual_squares, setting.adapter)
    return _products(setting.rates, products)


def answering_seconds(setting: Setting, work: Work, tokens: float) -> float:
    """Seconds of answering by generation.

    Args:
        setting: the model on its device.
        work: the prompts.
        tokens: steps of generation, summed over the packs.
    """
    text, rates = setting.model.text, setting.rates
    weights = (text.layers * text.layer_weights + text.embedding) * setting.value_bytes
    questions = work.questions / max(1.0, work.packs)
    step = Work(
        packs=1,
        tokens=questions,
        squares=questions * work.tokens / max(1.0, work.packs),
        supervised=questions,
        questions=questions,
        images=1,
    )
    return forward_seconds(setting, work) + tokens * (forward_seconds(setting, step) + weights / rates.bandwidth)


def optimizer_seconds(setting: Setting, steps: float, parameters: float, tensors: int) -> float:
    """Seconds of gradient clipping and AdamW, which read and write every trained number several times."""
    passes = 12 * 4 * parameters / setting.rates.bandwidth
    return steps * (passes + 6 * tensors * setting.rates.launch)
