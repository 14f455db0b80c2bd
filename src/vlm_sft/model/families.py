"""What differs between model families when questions share an image, declared in one table.

`model/sharing_check.py` decides for one model from this table, its configuration and, for unknown families, a check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["blockwise", "dense", "separate"]
T = TypeVar("T")
DEFAULT_BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
# Names in the layer_types of transformers' configurations.
FULL, SLIDING = "full_attention", "sliding_attention"
STATEFUL = ("linear_attention", "mamba", "conv")
_ATTENTION = ("q_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """How one family differs from plain causal attention over text and image tokens.

    Attributes:
        reason: why its questions cannot share an image; "" where they can.
        image_blocks: the tokens of an image see each other in both directions (type 1 in the processor's token types).
        one_block: all images of a question are one such block, whatever is between them.
        token_types: the model wants the processor's token types in training, whatever mask it is given.
        masks_by_layer: the model accepts a mask for each type of layer, so sliding windows can be told apart.
        answer_type: token type of an answer, where it differs from that of a prompt.
        package: what has to be installed besides transformers.
        projector: paths, below the inner model, of what turns the tower's output into embeddings.
        targets: names of the modules that get LoRA where the user names none.
    """

    reason: str = ""
    image_blocks: bool = False
    one_block: bool = False
    token_types: bool = False
    masks_by_layer: bool = False
    answer_type: int = 0
    package: str = ""
    projector: tuple[str, ...] = ("multi_modal_projector",)
    targets: tuple[str, ...] = _ATTENTION


# By config.model_type; each one is proven in tests/parity against separate sequences in plain transformers.
FAMILIES = {
    "qwen2_vl": Family(projector=("visual.merger",)),
    "qwen2_5_vl": Family(projector=("visual.merger",)),
    "qwen3_vl": Family(projector=("visual.merger", "visual.deepstack_merger_list")),
    "smolvlm": Family(projector=("connector",)),
    "idefics3": Family(projector=("connector",)),
    "llava": Family(),
    "llava_onevision": Family(),
    "internvl": Family(),
    "mistral3": Family(),
    "qwen3_5": Family(projector=("visual.merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "lfm2_vl": Family(targets=("q_proj", "v_proj", "out_proj")),
    "lfm3_vl": Family(masks_by_layer=True, targets=("q_proj", "v_proj", "o_proj", "out_proj")),
    "exaone4_5": Family(masks_by_layer=True, projector=("visual.merger",)),
    "lighton_ocr": Family(projector=("vision_projection",)),
    "qianfan_ocr": Family(),
    "ovis2": Family(projector=("visual_embeddings_table",)),
    "llava_next": Family(),
    "vipllava": Family(),
    "video_llama_3": Family(projector=("projector",)),
    "idefics2": Family(projector=("connector",)),
    "deepseek_vl": Family(projector=("aligner",)),
    "minicpmv4_6": Family(projector=("merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "paddleocr_vl": Family(projector=("projector",)),
    "granite4_vision": Family(projector=("layerwise_projectors", "spatial_projectors")),
    "granite_docling": Family(projector=("vision_model.connector",)),
    "fast_vlm": Family(package="timm"),
    "perception_lm": Family(package="timm"),
    "molmo2": Family(image_blocks=True, one_block=True, token_types=True),
    "gemma3": Family(image_blocks=True, masks_by_layer=True),
    "paligemma": Family(reason="its image tokens read the question", answer_type=1),
}


# By model_type of the language model: its decoder layer is x + attention(norm(x)), then + mlp(norm(·)), nothing else.
PLAIN_LAYERS = {
    "llama",
    "mistral",
    "qwen2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_vl_text",
    "qwen3_5_text",
}


@dataclass(frozen=True, slots=True)
class PackMode:
    """How the packs of one model are computed.

    Attributes:
        kind: "blockwise": one small attention problem per image, through our attention functions; "dense": one mask
            over the whole pack, for any attention function; "separate": plain transformers, one question a sequence.
        image_blocks, one_block: as in `Family`.
        note: one line for the user where sharing is given up; "" otherwise.
    """

    kind: Kind = "blockwise"
    image_blocks: bool = False
    one_block: bool = False
    note: str = ""

    @property
    def shares(self) -> bool:
        """True when the questions of an image are computed behind one prefix."""
        return self.kind != "separate"


def family_of(config: Any) -> Family:
    """The declared differences of a model's family; those of plain causal attention for an unknown one."""
    return FAMILIES.get(config.model_type, Family())


def layer_kinds(config: Any) -> set[str]:
    """The types of attention layers in the language model, in the words of transformers' `layer_types`."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return set(kinds)
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return {SLIDING if windowed else FULL}


def declared_mode(config: Any, kind: Kind, unshared: str = "") -> PackMode | None:
    """Decide from the table and the configuration alone.

    Args:
        config: the model's configuration.
        kind: what is used where sharing is possible: "blockwise" or "dense".
        unshared: kinds of layers that carry a state and compute no packs, from `recurrent.unshared_states`.

    Returns:
        The mode; None for an unknown family whose layers are plain: it has to be checked.
    """
    family = family_of(config)
    others = layer_kinds(config) - {FULL, *STATEFUL}
    if family.reason:
        return separate_mode(config, family.reason)
    if unshared:
        return separate_mode(config, f"its language model has layers of {unshared}")
    if others and not (family.masks_by_layer and others == {SLIDING}):
        return separate_mode(config, f"its language model has layers of {', '.join(sorted(others))}")
    return PackMode(kind, family.image_blocks, family.one_block) if config.model_type in FAMILIES else None


def separate_mode(config: Any, reason: str) -> PackMode:
    """The fallback, with a line for the user."""
    note = f"{config.model_type}: {reason}, so every question gets its own copy of the image (slower, same result)"
    return PackMode("separate", note=note)


def masks_for(config: Any, build: Callable[[int | None], T]) -> T | dict[str, T | None]:
    """The `attention_mask` argument: one mask, or one for each type of layer where the family takes them so.

    Layers with a state need none: what they see follows from their sequences.

    Args:
        config: the model's configuration.
        build: makes the mask for a sliding window of so many tokens; None for no window.
    """
    if not family_of(config).masks_by_layer:
        return build(None)
    text = config.get_text_config()
    stateful = {kind: None for kind in getattr(text, "layer_types", None) or () if kind in STATEFUL}
    return {FULL: build(None), SLIDING: build(getattr(text, "sliding_window", None)), **stateful}
