"""Tiny random models of the families whose language model is a mixture of experts."""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_parts import qwen_ids
from tests.tiny_models_recurrent import QWEN3_5_TOWER, qwen3_5_processor, qwen3_5_text

Built = tuple[Any, Any]

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def qwen3_vl_moe() -> Built:
    """A Qwen3-VL-MoE: a dense layer between layers of experts, features of an early vision block added."""
    processor = qwen3_5_processor()
    text = EXPERTS | {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=QWEN3_5_TOWER | {"depth": 3, "deepstack_visual_indexes": [1]},
        **qwen_ids(processor.tokenizer),
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config), processor


def qwen3_5_moe() -> Built:
    """A Qwen3.5-MoE: layers of Gated DeltaNet and of full attention, each with experts and one that is shared."""
    processor = qwen3_5_processor()
    text = qwen3_5_text(processor.tokenizer) | EXPERTS | {"shared_expert_intermediate_size": 32}
    del text["intermediate_size"]
    config = transformers.Qwen3_5MoeConfig(
        text_config=text, vision_config=QWEN3_5_TOWER, **qwen_ids(processor.tokenizer)
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config), processor


FAMILIES = {"qwen3_vl_moe": qwen3_vl_moe, "qwen3_5_moe": qwen3_5_moe}
