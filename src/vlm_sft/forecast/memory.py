"""Peak memory of one device, item by item. Imports counts and time; pure.

Weights, gradients and optimizer follow from counts of parameters (what ZeRO's stages share out among the ranks:
Rajbhandari et al. 2020, arXiv:1910.02054). Activations are what autograd keeps for the backward pass of one pack,
counted in the code of a layer: with frozen weights a linear module keeps nothing, so norms, the adapter's inputs,
attention and the gated product remain. tests/unit/test_forecast_memory.py compares with what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.forecast.counts import Work
from vlm_sft.forecast.time import Setting

NORM_VALUES = 4  # hidden vectors a token and layer: the input of two norms, and their normalised values
NORM_VALUES_HALF = 8  # in bfloat16 both are float32 copies
ATTENTION_VALUES = 4  # queries, keys, values (repeated for every head) and the output
GATE_VALUES = 3  # gate, activated gate, up
GATE_VALUES_BLOCKWISE = 2  # gate and up
LOGIT_VALUES = 3  # float32 scores, their probabilities and the gradient
# QLoRA (Dettmers et al. 2023): half a byte a weight, a byte for the scale of 64, 4 bytes for the scale of 256 scales.
FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
TOWER_PATCHES = 8192  # of one call in the pass that computes features
TOWER_VALUES = 12  # hidden vectors a patch at once, forward only
CONTEXT_BYTES = 600 * 1024**2  # of the driver on a GPU, outside the allocator
ZERO_BUFFER_BYTES = 1_000_000_000  # of DeepSpeed's communication, at its default sizes


@dataclass(frozen=True, slots=True)
class Ranks:
    """How a run is spread out.

    Attributes:
        count: processes.
        parallel: "single", "ddp", "zero2", "zero3" or "deepspeed".
    """

    count: int = 1
    parallel: str = "single"

    @property
    def engine(self) -> bool:
        """Whether DeepSpeed's engine runs it."""
        return self.parallel in ("zero2", "zero3", "deepspeed")

    @property
    def shared_optimizer(self) -> int:
        """Ranks that share gradients and optimizer out among them."""
        return self.count if self.parallel in ("zero2", "zero3") else 1

    @property
    def shared_weights(self) -> int:
        """Ranks that share the weights out among them."""
        return self.count if self.parallel == "zero3" else 1


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
    text, size = setting.model.text, setting.value_bytes
    layer = _layer_bytes(setting) * work.tokens
    if setting.checkpointing:
        return text.layers * work.tokens * text.hidden * size + layer
    if not setting.trimmed:
        return text.layers * layer
    rows = _layer_bytes(setting) * work.supervised
    return (text.layers - 1) * layer + _keys_bytes(setting) * work.tokens + rows


def _layer_bytes(setting: Setting) -> float:
    """Bytes that one layer keeps for one token."""
    text, size, adapter = setting.model.text, setting.value_bytes, setting.adapter
    norms = (NORM_VALUES if size == 4 else NORM_VALUES_HALF) * text.hidden
    modules = adapter.modules(setting.model)
    # The inputs of the adapted modules; dropout makes a copy and a mask for each of them.
    inputs = sum(inputs for inputs, _ in modules) * (2 if adapter.dropout else 1)
    ranks = sum(adapter.r for _ in modules)
    attention = ATTENTION_VALUES * text.heads * text.head_dim
    gate = GATE_VALUES_BLOCKWISE if setting.blockwise_mlp else GATE_VALUES
    kept = norms + attention + gate * text.intermediate
    if adapter.everything:
        kept += 2 * text.hidden + text.heads * text.head_dim + text.intermediate
    return (kept + inputs + ranks) * size


def _keys_bytes(setting: Setting) -> float:
    """Bytes that a trimmed last layer keeps for every token, whether it predicts or not: what keys and values need."""
    text, adapter = setting.model.text, setting.adapter
    norms = (NORM_VALUES if setting.value_bytes == 4 else NORM_VALUES_HALF) / 2 * text.hidden
    adapted = {"q_proj", "k_proj", "v_proj"} & set(adapter.targets)
    modules = [text.linears[name] for name in adapted]
    inputs = sum(inputs for inputs, _ in modules) * (2 if adapter.dropout else 1)
    attention = ATTENTION_VALUES / 2 * text.heads * text.head_dim
    return (norms + inputs + adapter.r * len(modules) + attention) * setting.value_bytes


def logit_bytes(setting: Setting, supervised: float) -> float:
    """Bytes of the scores of supervised positions with their gradient; without scores, of their hidden states' one."""
    if not setting.scored:
        return setting.model.text.hidden * supervised * setting.value_bytes
    return setting.model.text.vocabulary * supervised * (setting.value_bytes + 4 * LOGIT_VALUES)


def image_bytes(setting: Setting, work: Work, features: bool) -> float:
    """Bytes of the images of one pack: their features, or pixels with what the tower computes of them."""
    vision, text = setting.model.vision, setting.model.text
    if features:
        return feature_bytes(setting, work.visual)
    patches = work.visual * vision.patches_per_token
    tower = TOWER_VALUES * vision.hidden * setting.value_bytes
    if not setting.adapter.frozen_tower:
        tower *= vision.layers
    return patches * (vision.patch_values * 4 + tower) + work.visual * text.hidden * setting.value_bytes


def feature_bytes(setting: Setting, visual: float) -> float:
    """Bytes of kept vision features, for so many visual tokens."""
    return visual * (1 + setting.model.vision.extra_features) * setting.model.text.hidden * setting.value_bytes


def cache_bytes(setting: Setting, tokens: float) -> float:
    """Bytes of keys and values of a generation over so many tokens."""
    text = setting.model.text
    return 2 * text.layers * text.kv_heads * text.head_dim * tokens * setting.value_bytes


def peak_items(
    setting: Setting, ranks: Ranks, largest: Work, answering_tokens: float, features: bool, process_bytes: float
) -> dict[str, float]:
    """What the largest moment of a run consists of, in bytes on one device.

    Args:
        setting: the model on its device.
        ranks: how the run is spread out.
        largest: the largest sizes of any pack.
        answering_tokens: tokens of the largest pack that is answered, answers included; 0 for none.
        features: whether kept vision features enter, or pixels.
        process_bytes: of the process before the model is loaded (on a CPU); 0 on a GPU.
    """
    trained = setting.adapter.parameters(setting.model)
    size = 2 if ranks.engine and setting.value_bytes == 2 else 4
    master = 4 if size == 2 else 0
    frozen = weight_bytes(setting) - trained * setting.value_bytes * setting.adapter.everything
    items = {
        "process": process_bytes,
        "weights": frozen / ranks.shared_weights,
        "trained weights": trained * size / ranks.shared_weights,
        "gradients": trained * size / ranks.shared_optimizer,
        "optimizer": trained * (8 + master) / ranks.shared_optimizer,
    }
    if setting.four_bit:  # the largest matrix of a layer, unpacked while it is used
        items["unpacked weights"] = setting.model.text.hidden * setting.model.text.intermediate * setting.value_bytes
    if ranks.engine and setting.rates.gpu:
        items["communication"] = min(ZERO_BUFFER_BYTES, 4.0 * trained)
        if ranks.shared_weights > 1:  # the layer that is gathered, and the next one
            items["communication"] += 2 * setting.model.text.layer_weights * setting.value_bytes
            items["communication"] += setting.model.text.embedding * setting.value_bytes
    training = {
        "activations": activation_bytes(setting, largest),
        "logits": logit_bytes(setting, largest.supervised),
        "images": image_bytes(setting, largest, features),
    }
    answering = {"answering": cache_bytes(setting, answering_tokens) + _forward_bytes(setting, answering_tokens)}
    tower = {"vision features": _tower_bytes(setting)} if features else {}
    phases = (training, answering, tower)
    return items | max(phases, key=lambda phase: sum(phase.values()))


def _forward_bytes(setting: Setting, tokens: float) -> float:
    """Bytes that a forward pass without gradients needs at once."""
    text = setting.model.text
    return tokens * (4 * text.hidden + 3 * text.intermediate) * setting.value_bytes


def _tower_bytes(setting: Setting) -> float:
    vision = setting.model.vision
    return TOWER_PATCHES * (vision.patch_values * 4 + TOWER_VALUES * vision.hidden * setting.value_bytes)
