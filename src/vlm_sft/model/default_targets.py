"""Which modules get LoRA where the user names none: a family's declared ones, else what its layers show.

The recipe's q_proj, v_proj and o_proj are those of most attention layers. Latent attention, fused projections, linear
attention and short convolutions have other names, and a hybrid has several kinds of layers: each kind gets LoRA.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.model.families import FULL, PLAIN_LAYERS, SLIDING, Family, family_of, layer_kinds
from vlm_sft.model.layout import without_weights

# Of what mixes tokens, in the order in which they are told. Gates, betas and the indexers of sparse attention are
# not among them: they are a few numbers a head, or choose without a gradient.
PROJECTIONS = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("q_proj", "v_proj", "o_proj"),
    *("qkv_proj", "Wqkv", "query_key_value", "qkv", "c_attn"),
    *("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj"),
    *("out_proj", "dense", "wo"),
)
_FEED_FORWARD = {"mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "shared_mlp", "shared_expert", "router"}


def default_targets(config: Any) -> tuple[str, ...]:
    """The names of the modules that get LoRA where the user names none.

    Args:
        config: of the base model; a language model whose layers are not declared to be plain is built without weights.

    Returns:
        The family's own declared names, where they are there; else those of the projections in all kinds of its layers.
    """
    declared, usual = family_of(config).targets, Family().targets
    text = config.get_text_config()
    plain = text.model_type in PLAIN_LAYERS and {FULL, SLIDING}.issuperset(layer_kinds(config))
    if plain and declared == usual and not getattr(text, "kv_lora_rank", None):
        return declared
    try:
        decoder = without_weights(config).get_decoder()
        names = {path.rpartition(".")[2] for path, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
        if declared != usual and names.issuperset(declared):
            return declared
        return mixer_projections(decoder) or declared
    except Exception:  # some models cannot be built without their weights: loading them shows what is wrong
        return declared


def mixer_projections(decoder: torch.nn.Module) -> tuple[str, ...]:
    """The names of the projections in the layers of a language model that mix tokens: attention and what replaces it.

    Args:
        decoder: the language model, with weights or without.

    Returns:
        Those of `PROJECTIONS` that are there; where none is, all linear modules of the attention; () without any.
    """
    lists = [part for part in decoder.modules() if isinstance(part, torch.nn.ModuleList)]
    layers = max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=())
    known: set[str] = set()
    others: set[str] = set()
    for name, part in (child for layer in layers for child in layer.named_children() if child[0] not in _FEED_FORWARD):
        linear = {path.rpartition(".")[2] for path, one in part.named_modules() if isinstance(one, torch.nn.Linear)}
        kind = type(part).__name__
        # The kernels of Mamba multiply by the weight of the output projection themselves, past any LoRA.
        known |= linear.intersection(PROJECTIONS) - ({"out_proj"} if "Mamba" in kind else set())
        if any(sign in f"{name} {kind}".lower() for sign in ("attn", "attention", "mixer")):
            others |= linear - {""}
    return tuple(name for name in PROJECTIONS if name in known) or tuple(sorted(others))
