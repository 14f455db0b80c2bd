"""Tiny random models of the families whose language model has layers with a state."""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_parts import QWEN_TEMPLATE, QWEN_TOKENS, byte_tokenizer, qwen_ids

Built = tuple[Any, Any]


def qwen3_5_text(tokenizer: Any) -> dict[str, Any]:
    """A language model with layers of Gated DeltaNet and of full attention in turn."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
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
    tokenizer = byte_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )


QWEN3_5_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
    "num_position_embeddings": 64,
}


def qwen3_5() -> Built:
    """A Qwen3.5: layers of Gated DeltaNet and of full attention."""
    processor = qwen3_5_processor()
    config = transformers.Qwen3_5Config(
        text_config=qwen3_5_text(processor.tokenizer), vision_config=QWEN3_5_TOWER, **qwen_ids(processor.tokenizer)
    )
    return transformers.Qwen3_5ForConditionalGeneration(config), processor


FAMILIES = {"qwen3_5": qwen3_5}
