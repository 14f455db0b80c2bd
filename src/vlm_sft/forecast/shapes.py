"""The sizes of a model from its configuration alone: parameters and linear layers.

Configurations are plain dictionaries as config.json holds them (`PretrainedConfig.to_dict()` gives the same), so a
model can be sized without weights and without torch. tests/unit/test_forecast_counts.py holds every family against the
real classes of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import ModelError

PUBLISHED = Path(__file__).parent / "published" / "models.json"
Config = Mapping[str, Any]
Linears = tuple[tuple[int, int], ...]  # (inputs, outputs) of linear modules


class Linear(NamedTuple):
    """A linear module: its inputs and outputs, and the share of the layers that have it."""

    inputs: int
    outputs: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class StateShape:
    """Layers that carry a state from token to token, where others attend (`model/mixers.py`).

    Attributes:
        share: of the layers.
        inputs: channels of the short convolution.
        heads, keys, values: heads of the recurrent state, and the channels of their keys and values; 0 without one.
    """

    share: float
    inputs: int
    heads: int = 0
    keys: int = 0
    values: int = 0


@dataclass(frozen=True, slots=True)
class TextShape:
    """The language model.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: as in the configuration.
        parameters: of all layers and the last norm; embeddings and head not counted.
        tied: the head is the embedding matrix.
        counted: names and linear modules where they were counted on the model; () for the usual ones of its sizes.
        states: layers that carry a state; None without them.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    tied: bool
    counted: tuple[tuple[str, Linear], ...] = ()
    states: StateShape | None = None

    @property
    def linears(self) -> dict[str, Linear]:
        """The linear modules of a layer, by name."""
        if self.counted:
            return dict(self.counted)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": Linear(self.hidden, queries),
            "k_proj": Linear(self.hidden, keys),
            "v_proj": Linear(self.hidden, keys),
            "o_proj": Linear(queries, self.hidden),
            "gate_proj": Linear(self.hidden, self.intermediate),
            "up_proj": Linear(self.hidden, self.intermediate),
            "down_proj": Linear(self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of the linear modules of one layer; the mean where layers differ."""
        return round(sum(one.inputs * one.outputs * one.share for one in self.linears.values()))

    @property
    def attending(self) -> float:
        """The share of the layers that attend."""
        return 1.0 - self.states.share if self.states else 1.0

    @property
    def embedding(self) -> int:
        """Weights of the embedding matrix, and of the vocabulary projection."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower with what joins it to the language model.

    Attributes:
        layers, hidden: of the tower.
        patch_weights: weights of the products that every patch goes through: its embedding and all blocks.
        token_weights: weights of the products that every visual token goes through, e.g. the merger.
        parameters: of everything.
        patches_per_token: patches behind one visual token.
        window_patches: patches that see each other in a windowed block; 0 without windows.
        full_layers: blocks in which all patches of an image see each other.
        patch_values: numbers that the processor makes of one patch.
        extra_features: further feature vectors for every visual token (the deepstack of Qwen3-VL).
        linears, projector_linears: the linear modules of all blocks, and of what joins them to the language model.
    """

    layers: int
    hidden: int
    patch_weights: int
    token_weights: int
    parameters: int
    patches_per_token: float
    window_patches: int
    full_layers: int
    patch_values: int
    extra_features: int = 0
    linears: Linears = ()
    projector_linears: Linears = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one vision-language model.

    Attributes:
        kind: `model_type` of its configuration.
        text, vision: its parts.
    """

    kind: str
    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """All parameters; tied ones are counted once."""
        embeddings = self.text.embedding * (1 if self.text.tied else 2)
        return self.text.parameters + embeddings + self.vision.parameters

    @property
    def key(self) -> str:
        """A short text that models of equal shape have in common; past runs are looked up by it."""
        text, vision = self.text, self.vision
        return (
            f"{self.kind}-{text.layers}x{text.hidden}x{text.intermediate}-v{text.vocabulary}"
            f"-{vision.layers}x{vision.hidden}"
        )


@dataclass(frozen=True, slots=True)
class _TextStyle:
    """How the layers of a language model differ between families, beyond their linear modules."""

    qkv_bias: bool = False
    qk_norms: bool = False
    norms: int = 2


_LLAMA = _TextStyle()
_TEXT_STYLES = {
    "qwen2_vl": _TextStyle(qkv_bias=True),
    "qwen2_5_vl": _TextStyle(qkv_bias=True),
    "qwen3_vl": _TextStyle(qk_norms=True),
    "gemma3": _TextStyle(qk_norms=True, norms=4),
}


def _text(config: Config, style: _TextStyle, tied: bool) -> TextShape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    layers, intermediate = config["num_hidden_layers"], config["intermediate_size"]
    shape = TextShape(layers, hidden, intermediate, heads, kv_heads, head_dim, config["vocab_size"], 0, tied)
    layer = shape.layer_weights + style.norms * hidden
    if style.qkv_bias:
        layer += (heads + 2 * kv_heads) * head_dim
    if style.qk_norms:
        layer += 2 * head_dim
    return replace(shape, parameters=layers * layer + hidden)


def _qwen_patch(vision: Config) -> int:
    """Numbers in one patch of the Qwen-VL processors."""
    channels = vision.get("in_channels") or vision.get("in_chans") or 3
    return int(channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2)


def _block(width: int, inner: int, split: bool = False, gated: bool = False) -> Linears:
    """The linear modules of one block of a tower.

    Args:
        width, inner: of the block and of its MLP.
        split: queries, keys and values have a module each.
        gated: the MLP has a gate.
    """
    attention = ((width, width),) * 3 if split else ((width, 3 * width),)
    mlp = ((width, inner), (inner, width)) + (((width, inner),) if gated else ())
    return (*attention, (width, width), *mlp)


def _merger(width: int, out: int) -> Linears:
    return (width, width), (width, out)


def _qwen2_vision(vision: Config, text: TextShape) -> VisionShape:
    width, depth, merge = vision["embed_dim"], vision["depth"], vision["spatial_merge_size"] ** 2
    inner = int(width * vision["mlp_ratio"])
    patch = _qwen_patch(vision)
    block = 4 * width * width + 2 * width * inner
    merger = (width * merge) ** 2 + width * merge * vision["hidden_size"]
    biases = depth * (4 * width + inner + width + 4 * width) + 2 * width + width * merge + vision["hidden_size"]
    patches = patch * width + depth * block
    shape = VisionShape(depth, width, patches, merger, patches + merger + biases, merge, 0, depth, patch)
    joint = _merger(width * merge, vision["hidden_size"])
    return replace(shape, linears=depth * _block(width, inner), projector_linears=joint)


def _qwen2_5_vision(vision: Config, text: TextShape) -> VisionShape:
    width, depth, merge = vision["hidden_size"], vision["depth"], vision["spatial_merge_size"] ** 2
    inner, patch = vision["intermediate_size"], _qwen_patch(vision)
    block = 4 * width * width + 3 * width * inner
    merger = (width * merge) ** 2 + width * merge * vision["out_hidden_size"]
    biases = depth * (4 * width + 2 * inner + width + 2 * width) + width + width * merge + vision["out_hidden_size"]
    patches = patch * width + depth * block
    full = len([index for index in vision["fullatt_block_indexes"] if index < depth])
    window = (vision["window_size"] // vision["patch_size"]) ** 2
    shape = VisionShape(depth, width, patches, merger, patches + merger + biases, merge, window, full, patch)
    joint = _merger(width * merge, vision["out_hidden_size"])
    return replace(shape, linears=depth * _block(width, inner, gated=True), projector_linears=joint)


def _qwen3_vision(vision: Config, text: TextShape) -> VisionShape:
    width, depth, merge = vision["hidden_size"], vision["depth"], vision["spatial_merge_size"] ** 2
    inner, out, patch = vision["intermediate_size"], vision["out_hidden_size"], _qwen_patch(vision)
    deep = len(vision["deepstack_visual_indexes"])
    block = 4 * width * width + 2 * width * inner
    merger = (1 + deep) * ((width * merge) ** 2 + width * merge * out)
    biases = depth * (4 * width + inner + width + 4 * width) + width
    biases += (1 + deep) * (width * merge + out) + 2 * width + deep * 2 * width * merge
    patches = patch * width + depth * block
    total = patches + merger + biases + vision["num_position_embeddings"] * width
    shape = VisionShape(depth, width, patches, merger, total, merge, 0, depth, patch, deep)
    joint = (1 + deep) * _merger(width * merge, out)
    return replace(shape, linears=depth * _block(width, inner), projector_linears=joint)


def _transformer_tower(vision: Config) -> tuple[int, int, int]:
    """Weights of products a patch, all parameters, patches of a picture; of a CLIP or SigLIP tower without extras."""
    width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patch = vision.get("num_channels", 3) * vision["patch_size"] ** 2
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    products = patch * width + depth * (4 * width * width + 2 * width * inner)
    others = depth * (4 * width + inner + width + 4 * width) + 2 * width + count * width
    return products, products + others, count


def _siglip(
    vision: Config, patches_per_token: float, token_weights: int, more: int, joint: Linears = ()
) -> VisionShape:
    """A SigLIP tower; `more` are its other parameters outside products, `joint` the modules of the projector."""
    products, total, count = _transformer_tower(vision)
    depth, width = vision["num_hidden_layers"], vision["hidden_size"]
    values = vision.get("num_channels", 3) * vision["patch_size"] ** 2
    total += width + more + token_weights  # the bias of the patch embedding
    # Every tile of a picture is a picture of its own to the tower: a window.
    shape = VisionShape(depth, width, products, token_weights, total, patches_per_token, count, 0, values)
    blocks = depth * _block(width, vision["intermediate_size"], split=True)
    return replace(shape, linears=blocks, projector_linears=joint)


def _idefics3_vision(vision: Config, text: TextShape, scale: int) -> VisionShape:
    width = vision["hidden_size"] * scale**2
    return _siglip(vision, scale**2, width * text.hidden, 0, ((width, text.hidden),))


def _gemma3_vision(vision: Config, text: TextShape, tokens: int) -> VisionShape:
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    # transformers builds its pooling head only where vision_use_head says so; Gemma 3's towers have none.
    return _siglip(vision, count / tokens, vision["hidden_size"] * text.hidden, vision["hidden_size"])


def _paligemma_vision(vision: Config, text: TextShape) -> VisionShape:
    width, out = vision["hidden_size"], vision["projection_dim"]
    return _siglip(vision, 1, width * out, out, ((width, out),))


def _llava_vision(vision: Config, text: TextShape) -> VisionShape:
    products, total, count = _transformer_tower(vision)
    depth, width = vision["num_hidden_layers"], vision["hidden_size"]
    projector = width * text.hidden + text.hidden**2
    # Class token with its position, and the norm before the blocks; the patch embedding has no bias.
    total += 2 * width + 2 * width + projector + 2 * text.hidden
    values = vision.get("num_channels", 3) * vision["patch_size"] ** 2
    shape = VisionShape(depth, width, products, projector, total, 1, count, 0, values)
    blocks = depth * _block(width, vision["intermediate_size"], split=True)
    return replace(shape, linears=blocks, projector_linears=((width, text.hidden), (text.hidden, text.hidden)))


_VISION: dict[str, Callable[[Config, TextShape], VisionShape]] = {
    "qwen2_vl": lambda config, text: _qwen2_vision(config["vision_config"], text),
    "qwen2_5_vl": lambda config, text: _qwen2_5_vision(config["vision_config"], text),
    "qwen3_vl": lambda config, text: _qwen3_vision(config["vision_config"], text),
    "smolvlm": lambda config, text: _idefics3_vision(config["vision_config"], text, config["scale_factor"]),
    "idefics3": lambda config, text: _idefics3_vision(config["vision_config"], text, config["scale_factor"]),
    "llava": lambda config, text: _llava_vision(config["vision_config"], text),
    "gemma3": lambda config, text: _gemma3_vision(config["vision_config"], text, config["mm_tokens_per_image"]),
    "paligemma": lambda config, text: _paligemma_vision(config["vision_config"], text),
}
FAMILIES = tuple(_VISION)


def model_shape(config: Config) -> ModelShape | None:
    """Size a model from its configuration.

    Args:
        config: the content of config.json, with `text_config` and `vision_config`.

    Returns:
        The shape; None for a family that is not in the table, or whose parts lack one of its sizes: LLaVA takes any.
    """
    kind = config["model_type"]
    if kind not in _VISION:
        return None
    tied = bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))
    try:
        text = _text(config["text_config"], _TEXT_STYLES.get(kind, _LLAMA), tied)
        return ModelShape(kind, text, _VISION[kind](config, text))
    except KeyError:
        return None


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model whose configuration is known without the network.

    Attributes:
        name: its name on the Hub.
        shape: its sizes.
        patch, merge: side of a patch in pixels; patches merged in each direction.
        min_pixels, max_pixels: bounds of the image area of its processor, in pixels.
        source: where the configuration was published.
    """

    name: str
    shape: ModelShape
    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    source: str


def published_models() -> dict[str, PublishedModel]:
    """The built-in table, by Hub name."""
    table = read_json(PUBLISHED)
    found = {}
    for name, entry in table["models"].items():
        vision = table["towers"][entry["tower"]] | entry.get("vision", {})
        shape = model_shape(
            {
                "model_type": entry["model_type"],
                "text_config": entry["text"],
                "vision_config": vision,
                "tie_word_embeddings": entry["tied"],
            }
        )
        assert shape is not None, name
        pixels = table["pixels"][entry["model_type"]]
        patch, merge = vision["patch_size"], vision["spatial_merge_size"]
        found[name] = PublishedModel(name, shape, patch, merge, pixels["min"], pixels["max"], entry["source"])
    return found


def find_published(name: str) -> PublishedModel:
    """Look a model up in the built-in table.

    Raises:
        ModelError: it is not there.
    """
    models = published_models()
    if name not in models:
        raise ModelError(
            f"--base_model {name} can neither be opened here nor found in the built-in table",
            f"pass a folder with a config.json, or one of {', '.join(models)}",
        )
    return models[name]
