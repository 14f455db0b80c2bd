"""The default configuration of any family, with everything that makes a model large made small."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 320
# Ids behind the 256 bytes of the tokenizer that goes with these models.
TOKENS = ("<image>", "<pad>", "</s>", "<s>")
IMAGE, PAD, END, BEGIN = range(256, 260)
LAYERS, WIDTH, INNER, HEADS, HEAD = 2, 64, 96, 4, 16
_NUMBERED = re.compile(r"(?:_token|_placeholder|_patch)_(?:id|index)$|_token_index$")
# The first pattern that fits the name of a number decides on it; the number is the most that it may be.
_MOST: tuple[tuple[str, int], ...] = (
    (r"vocab_size$|num_embeddings$|codebook_size$", VOCABULARY),
    (r"^(?:patch|temporal_patch|tubelet|merge|spatial_merge|stride|scale|downsample|window|kernel)", 10**9),
    (r"(?:^|_)(?:image|input|crop)_size$", 42),
    (r"num_key_value_heads$|num_kv_heads$|_kv_heads$|num_key_heads$|n_groups$", 2),
    (r"num_(?:attention_|value_|local_)?heads$|(?:attention|_)heads$|^n_head$|^heads$|num_head$", HEADS),
    (r"qk_rope_head_dim$", 8),
    (r"qk_head_dim$", HEAD + 8),
    (r"(?:^|_)head_dim$|(?:^|_)d_kv$|d_head$|dim_head$|head_size$", HEAD),
    (r"lora_rank$|ssm_state_size$|d_state$", 16),
    (r"(?:^|_)(?:intermediate|ffn|inner|mlp)_?(?:size|dim|hidden)?|_ffn_dim$|^d_ff$|d_inner|intermediate_size", INNER),
    (r"num_experts_per_tok$|moe_topk$|moe_k$|top_k_experts$", 2),
    (r"n_group$|topk_group$", 1),
    (r"experts$", 4),
    (r"(?:^|_)(?:hidden_)?layers$|num_hidden_layers|num_layers$|(?:^|_)depth$|num_blocks$|n_layer$", LAYERS),
    (r"num_query|query_length|num_latents|seq_length|max_source_positions", 16),
    (r"hidden_size(?:_per_layer_input)?$|hidden_dim$|(?:^|_)dim$|d_model$|embed_dim$|n_embd$|_width$|^width$", WIDTH),
    (r"projection_dim$|projector_dim$|output_dim$|encoder_hidden_size$|cross_attention_dim$|embedding_dim$", WIDTH),
)


def tiny_config(kind: Any) -> Any:
    """A small configuration of a family.

    Args:
        kind: its class.

    Raises:
        Exception: whatever the class raises: not every family can be made small by the names of its numbers.
    """
    return kind.from_dict(_shrunk(kind().to_dict()))


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values, with numbers that fit together; lists by layer are cut to `LAYERS`."""
    kinds = values.get("layer_types")
    layers = max(LAYERS, len(dict.fromkeys(kinds))) if isinstance(kinds, list) else LAYERS
    deep = next((values[name] for name in ("num_hidden_layers", "depth", "num_layers") if name in values), None)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config":  # by numbers of layers, of which few are left
            continue
        if isinstance(value, dict) and name.endswith("config"):
            made[name] = _shrunk(value)
        elif isinstance(value, list) and "feature_layer" in name:
            made[name] = [min(layer, layers - 1) for layer in value]
        elif isinstance(value, list) and isinstance(deep, int) and len(value) == deep:
            made[name] = sorted(dict.fromkeys(value), key=str) if name == "layer_types" else value[:layers]
            made[name] = (made[name] * layers)[:layers]
        elif isinstance(value, int) and not isinstance(value, bool):
            made[name] = _number(name, value, layers)
        else:
            made[name] = value
    if "num_key_value_heads" in values and values["num_key_value_heads"] == values.get("num_attention_heads"):
        made["num_key_value_heads"] = made.get("num_attention_heads")
    return _rotary(made)


def _number(name: str, value: int, layers: int) -> int:
    """A number that is small enough."""
    if name.endswith("_id") or _NUMBERED.search(name):
        known = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": BEGIN}
        picture = "image" in name and not re.search("begin|start|end|newline|break|row|col", name)
        return known.get(name, IMAGE if picture or "media" in name else 260 + sum(map(ord, name)) % 50)
    for pattern, most in _MOST:
        if re.search(pattern, name):
            return min(value, layers if most == LAYERS and "layers" in name else most)
    return value


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary sections of M-RoPE whose sum is half of a small head."""
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int((values.get("head_dim") or HEAD) * (rope.get("partial_rotary_factor") or 1.0)) // 2
        first = half - 2 * (half * 3 // 8)
        values["rope_parameters"] = rope | {"mrope_section": [first, half * 3 // 8, half * 3 // 8]}
    return values
