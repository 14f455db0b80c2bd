"""Tiny random models of the families whose language model has layers with a state."""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_parts import (
    LLAVA_TOWER,
    QWEN_TEMPLATE,
    QWEN_TOWER,
    TEXT,
    Built,
    llava_processor,
    llava_tokenizer,
    qwen_ids,
    qwen_tokenizer,
    text_of,
)


def qwen3_5_text(tokenizer: Any) -> dict[str, Any]:
    """A language model with layers of Gated DeltaNet and of full attention in turn."""
    return TEXT | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "max_position_embeddings": 4096,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": False,
    }


def qwen3_5_processor() -> Any:
    """The processor of Qwen3.5: that of Qwen3-VL."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )


QWEN3_5_TOWER = QWEN_TOWER | {"patch_size": 16, "num_position_embeddings": 64}


def qwen3_5() -> Built:
    """A Qwen3.5: layers of Gated DeltaNet and of full attention."""
    processor = qwen3_5_processor()
    config = transformers.Qwen3_5Config(
        text_config=qwen3_5_text(processor.tokenizer), vision_config=QWEN3_5_TOWER, **qwen_ids(processor.tokenizer)
    )
    return transformers.Qwen3_5ForConditionalGeneration(config), processor


def mamba2() -> Built:
    """A LLaVA whose language model is a Granite 4 hybrid: layers of Mamba-2 and of full attention in turn."""
    tokenizer = llava_tokenizer()
    processor = llava_processor(tokenizer)
    text = text_of(tokenizer, "granitemoehybrid") | {
        "num_hidden_layers": 4,
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 32,
        "position_embedding_type": "rope",
    }
    config = transformers.LlavaConfig(
        text_config=text, vision_config=LLAVA_TOWER, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    return transformers.LlavaForConditionalGeneration(config), processor


FAMILIES = {"qwen3_5": qwen3_5}
