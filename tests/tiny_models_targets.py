"""Tiny random models whose language model does not name its attention q_proj, v_proj and o_proj."""

from __future__ import annotations

from typing import Any

import transformers

from tests import tiny_models_more
from tests.tiny_models_parts import TOWER, text_of


def mistral4() -> tuple[Any, Any]:
    """A Mistral 3 around Mistral 4: latent attention, whose values are narrower than its keys, and experts."""
    _, processor = tiny_models_more.mistral3()
    before = transformers.Mistral3Config(
        text_config=text_of(processor.tokenizer, "mistral4")
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
        vision_config=TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 112, "patch_size": 14},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(before), processor


FAMILIES = {"mistral4": mistral4}
