"""What differs between model families when questions share an image, declared in one table.

`model/sharing_check.py` decides for one model from this table, its configuration and, for unknown families, a check.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from vlm_sft.data.engine_options import Rows

Kind = Literal["blockwise", "dense", "separate"]
DEFAULT_BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
# Names in the layer_types of transformers' configurations.
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
STATEFUL = ("linear_attention", "mamba", "conv")
TOKENWISE = ("moe", "mlp")  # layers of a feed-forward part alone: no token sees another there
WINDOW, CHUNK = "sliding_window", "attention_chunk_size"  # settings of the language model
ROUTER_SWITCH = "output_router_logits"  # a setting, and an argument of models that compute a router loss
_ATTENTION = ("q_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """How one family differs from plain causal attention over text and image tokens.

    Attributes:
        reason: why its questions cannot share an image; "" where they can.
        image_blocks: the tokens of an image see each other in both directions (type 1 in the processor's token types),
            in layers of these kinds.
        blocks_where: setting of the language model, and its value, without which there are no such blocks.
        one_block: all images of a question are one such block, whatever is between them.
        token_types: the model wants the processor's token types in training, whatever mask it is given.
        answer_type: token type of an answer, where it differs from that of a prompt.
        package: what has to be installed besides transformers.
        picture_tokens: settings that name the tokens which the family's experts for pictures compute, as the argument
            `moe_mm_token_type_ids`; () where experts are for all tokens.
        projector: paths, below the inner model, of what turns the tower's output into embeddings.
        targets: names of the modules that get LoRA where the user names none.
        position_axes: rows of its rotary positions, where it finds them by `get_rope_index` (M-RoPE).
    """

    reason: str = ""
    image_blocks: tuple[str, ...] = ()
    blocks_where: tuple[str, Any] | None = None
    one_block: bool = False
    token_types: bool = False
    answer_type: int = 0
    package: str = ""
    picture_tokens: tuple[str, ...] = ()
    projector: tuple[str, ...] = ("multi_modal_projector",)
    targets: tuple[str, ...] = _ATTENTION
    position_axes: int = 3


# By config.model_type; each one is proven in tests/parity against separate sequences in plain transformers.
FAMILIES = {
    "qwen2_vl": Family(projector=("visual.merger",)),
    "qwen2_5_vl": Family(projector=("visual.merger",)),
    "qwen3_vl": Family(projector=("visual.merger", "visual.deepstack_merger_list")),
    "qwen3_vl_moe": Family(projector=("visual.merger", "visual.deepstack_merger_list")),
    "smolvlm": Family(projector=("connector",)),
    "idefics3": Family(projector=("connector",)),
    "llava": Family(),
    "llava_onevision": Family(),
    "internvl": Family(),
    "mistral3": Family(),
    "qwen3_5": Family(projector=("visual.merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "qwen3_5_moe": Family(projector=("visual.merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "lfm2_vl": Family(targets=("q_proj", "v_proj", "in_proj", "out_proj")),
    "molmo2": Family(image_blocks=(FULL,), one_block=True, token_types=True),
    "gemma3": Family(image_blocks=(FULL, SLIDING)),
    "gemma3n": Family(package="timm", projector=("embed_vision",)),
    "gemma4": Family(
        image_blocks=(SLIDING,), blocks_where=("use_bidirectional_attention", "vision"), projector=("embed_vision",)
    ),
    "llama4": Family(),
    "cohere2_vision": Family(),
    "aya_vision": Family(),
    "glm4v": Family(projector=("visual.merger",)),
    "glm46v": Family(projector=("visual.merger",)),
    "glm_ocr": Family(projector=("visual.merger",)),
    "lfm3_vl": Family(targets=(*_ATTENTION, "in_proj", "out_proj")),
    "exaone4_5": Family(projector=("visual.merger",)),
    "lighton_ocr": Family(projector=("vision_projection",)),
    "qianfan_ocr": Family(),
    "ovis2": Family(projector=("visual_embeddings_table",)),
    "llava_next": Family(),
    "vipllava": Family(),
    "video_llama_3": Family(projector=("projector",)),
    "idefics2": Family(projector=("connector",)),
    "hunyuan_vl": Family(projector=("vision_tower.patch_merger",), position_axes=4),
    "deepseek_vl": Family(projector=("aligner",)),
    "minicpmv4_6": Family(projector=("merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "paddleocr_vl": Family(projector=("projector",)),
    "granite4_vision": Family(projector=("layerwise_projectors", "spatial_projectors")),
    "granite_docling": Family(projector=("vision_model.connector",)),
    "fast_vlm": Family(package="timm"),
    "perception_lm": Family(package="timm"),
    "ernie4_5_vl_moe": Family(
        picture_tokens=("image_token_id", "image_start_token_id", "image_end_token_id"), projector=("resampler_model",)
    ),
    "kimi_k25": Family(
        projector=("mm_projector",), targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ),
    "deepseek_ocr2": Family(),
    "nemotron_h_omni": Family(targets=(*_ATTENTION, "in_proj")),
    "llava_next_video": Family(),
    "video_llava": Family(),
    "janus": Family(projector=("aligner",)),
    "deepseek_vl_hybrid": Family(projector=("aligner",)),
    "aria": Family(),
    "glm4v_moe": Family(projector=("visual.merger",)),
    "glmga": Family(projector=("visual.merger",)),
    "qwen2_5_omni_thinker": Family(projector=("visual.merger",)),
    "qwen3_omni_moe_thinker": Family(projector=("visual.merger", "visual.merger_list")),
    "cosmos3_edge": Family(projector=("projector",)),
    "cosmos3_omni": Family(projector=("visual.merger", "visual.deepstack_merger_list")),
    "hyperclovax_vision_v2": Family(projector=("projector",)),
    "step3p7": Family(),
    "minicpmv4_7": Family(projector=("merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "minicpm_ocr": Family(projector=("merger",), targets=(*_ATTENTION, "in_proj_qkv", "in_proj_z", "out_proj")),
    "paligemma": Family(reason="its image tokens read the question", answer_type=1),
}


# By model_type of the language model: those that the families above are proven with. InternVL and LLaVA take any.
PROVEN_TEXTS = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gemma3n_text", "gemma4_text"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"),
    *(
        "cohere2",
        "glm4v_text",
        "glm_ocr_text",
        "llama4_text",
        "lfm2",
        "lfm3",
        "exaone4",
        "molmo2_text",
        "hunyuan_vl_text",
    ),
    *("deepseek_v3", "deepseek_ocr2_text", "ernie4_5_vl_moe_text", "paddleocr_vl_text", "nemotron_h"),
    *("granite4_vision_text", "granite_docling_text", "aria_text", "glm4v_moe_text", "qwen2_5_omni_text"),
    *("qwen3_omni_moe_text", "cosmos3_edge_text", "hyperclovax", "step3p5"),
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
    "qwen3_vl_moe_text",
    "qwen3_5_moe_text",
    "deepseek_v3",
    "deepseek_ocr2_text",
}


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back the tokens of one kind of layers look, counted in the sequence that a question alone would be.

    Attributes:
        layers: the kind, as in `layer_types`.
        window: tokens of a sliding window, the looking one included; None for no window.
        chunk: tokens of a chunk, before whose first one none of its tokens looks; None for no chunks.
        blocks: whether image blocks, where the family has them, hold in these layers.
    """

    layers: str = FULL
    window: int | None = None
    chunk: int | None = None
    blocks: bool = True

    def is_plain(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is too short for the window or the chunks to matter."""
        return all(limit is None or tokens <= limit for limit in (self.window, self.chunk))


FULL_REACH = Reach()


@dataclass(frozen=True, slots=True)
class PackMode:
    """How the packs of one model are computed.

    Attributes:
        kind: "blockwise": one small attention problem per image, through our attention functions; "dense": one mask
            over the whole pack, for any attention function; "separate": plain transformers, one question a sequence.
        rows: how the sequences of "separate" run together.
        image_blocks: whether the tokens of an image see each other in both directions.
        one_block: as in `Family`.
        reaches: one for each kind of attention layers.
        note: one line for the user where sharing is given up; "" otherwise.
    """

    kind: Kind = "blockwise"
    image_blocks: bool = False
    one_block: bool = False
    reaches: tuple[Reach, ...] = (FULL_REACH,)
    note: str = ""
    rows: Rows = "padded"

    @property
    def separate_rows(self) -> Rows | None:
        """How separate sequences run together; None where questions share their image."""
        return None if self.shares else self.rows

    @property
    def shares(self) -> bool:
        """True when the questions of an image are computed behind one prefix."""
        return self.kind != "separate"


def is_proven(config: Any) -> bool:
    """Whether tests prove a model's family, with this kind of language model; others are checked when they are used."""
    return config.model_type in FAMILIES and config.get_text_config().model_type in PROVEN_TEXTS


def family_of(config: Any) -> Family:
    """The declared differences of a model's family; those of plain causal attention for an unknown one."""
    return FAMILIES.get(config.model_type, Family())


def layer_values(text: Any, name: str) -> list[Any]:
    """A setting of a language model, for each layer where it is one of the layers; a list of one elsewhere.

    Args:
        text: the configuration of the language model.
        name: of the setting. A layer that lacks it has None.
    """
    # transformers' configurations raise where a setting that differs between layers is read from the whole.
    of_layers = name in (getattr(text, "per_layer_attributes", None) or ())
    values = [getattr(part, name, None) for part in (text.per_layer_config if of_layers else [text])]
    return list(values[0]) if isinstance(values[0], list | tuple) else values


def layer_kinds(config: Any) -> list[str]:
    """The kinds of layers in the language model, in the words of transformers' `layer_types`; full attention first."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return sorted(set(kinds), key=lambda kind: (kind != FULL, kind))
    if any(layer_values(text, WINDOW)) and getattr(text, "use_sliding_window", True):
        return [SLIDING]
    return [CHUNKED if any(layer_values(text, CHUNK)) else FULL]


def other_layers(config: Any) -> list[str]:
    """The kinds of layers in a language model that are not known here: sparse attention with an index, and so on."""
    return [name for name in layer_kinds(config) if name not in (FULL, SLIDING, CHUNKED, *STATEFUL, *TOKENWISE)]


def declared_mode(config: Any, kind: Kind, unshared: str = "") -> PackMode | None:
    """Decide from the table and the configuration alone.

    Args:
        config: the model's configuration.
        kind: what is used where sharing is possible: "blockwise" or "dense".
        unshared: kinds of layers that carry a state and compute no packs, from `recurrent.unshared_states`.

    Returns:
        The mode; None for a model that is not proven and whose layers have names that are known: it has to be checked.
    """
    family, others = family_of(config), other_layers(config)
    if family.reason:
        return separate_mode(config, family.reason)
    if unshared:
        return separate_mode(config, f"its language model has layers of {unshared}")
    if others:
        return separate_mode(config, f"its language model has layers of {', '.join(others)}")
    text = config.get_text_config()
    if not getattr(text, "is_causal", True):
        return separate_mode(config, "all of its tokens see each other in both directions")
    if {WINDOW, CHUNK} & set(getattr(text, "per_layer_attributes", None) or ()):
        return separate_mode(config, "its layers have windows of different lengths")
    return sharing_mode(config, kind) if is_proven(config) else None


def sharing_mode(config: Any, kind: Kind) -> PackMode:
    """How packs of shared images are computed, whether the family is known or not.

    Args:
        config: the model's configuration.
        kind: "blockwise" or "dense".
    """
    family, text = family_of(config), config.get_text_config()
    reaches = tuple(
        Reach(
            name,
            window=getattr(text, WINDOW, None) if name == SLIDING else None,
            chunk=getattr(text, CHUNK, None) if name == CHUNKED else None,
            blocks=name in (family.image_blocks or (name,)),
        )
        for name in layer_kinds(config)
        if name not in (*STATEFUL, *TOKENWISE)
    )
    named, value = family.blocks_where or ("", None)
    blocks = bool(family.image_blocks) and (not named or getattr(text, named, None) == value)
    return PackMode(kind, blocks, family.one_block, reaches)


def separate_mode(config: Any, reason: str) -> PackMode:
    """The fallback, with a line for the user."""
    note = f"{config.model_type}: {reason}, so every question gets its own copy of the image (slower, same result)"
    return PackMode("separate", note=note)


def router_coefficient(base: Any) -> float:
    """What the router loss of a model is multiplied by; 0 where its class computes none or its configuration asks not.

    Args:
        base: the Hugging Face model.
    """
    text = base.config.get_text_config()
    if not (switched_off(base) and getattr(text, ROUTER_SWITCH, False)):
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0)


def switched_off(base: Any) -> dict[str, bool]:
    """The argument that keeps a model from computing a router loss itself, which knows nothing of packs."""
    return {ROUTER_SWITCH: False} if ROUTER_SWITCH in inspect.signature(base.forward).parameters else {}


def cache_argument(base: Any) -> str:
    """The argument of a model's forward that takes the key/value cache; transformers 5.24 began to rename it."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
