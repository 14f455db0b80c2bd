"""Tiny random models of the families whose language model is a mixture of experts."""

from __future__ import annotations

import transformers

from tests.tiny_models_parts import TEXT, TOWER, Built, byte_tokenizer, qwen_ids, token_ids
from tests.tiny_models_recurrent import QWEN3_5_TOWER, qwen3_5_processor, qwen3_5_text

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def qwen3_vl_moe() -> Built:
    """A Qwen3-VL-MoE: a dense layer between layers of experts, features of an early vision block added."""
    processor = qwen3_5_processor()
    text = (
        EXPERTS
        | TEXT
        | {
            "vocab_size": len(processor.tokenizer),
            "num_hidden_layers": 3,
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
    )
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


ERNIE_TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
ERNIE_TEMPLATE = (
    "<|begin_of_sentence|>{% for m in messages %}{{ 'User: ' if m.role == 'user' else '\nAssistant: ' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% if m.role == 'assistant' %}<|end_of_sentence|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\nAssistant: ' }}{% endif %}"
)


def ernie4_5_vl_moe() -> Built:
    """An ERNIE 4.5 VL: a dense layer, then layers with experts for text, others for pictures, and shared ones."""
    tokenizer = byte_tokenizer(
        [*ERNIE_TOKENS.values(), "<|begin_of_sentence|>", "<|end_of_sentence|>", "<unk>"],
        eos_token="<|end_of_sentence|>",
        pad_token="<unk>",
        model_specific_special_tokens=ERNIE_TOKENS,
    )
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor = transformers.Ernie4_5_VLMoeProcessor(
        image_processor=transformers.Ernie4_5_VLMoeImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Ernie4_5_VLMoeVideoProcessor(size=size, draw_on_frames=False),
        chat_template=ERNIE_TEMPLATE,
    )
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=TEXT
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "moe_intermediate_size": [24, 16],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2},
        tie_word_embeddings=False,
        **token_ids(tokenizer, **{f"{name}_id": token for name, token in ERNIE_TOKENS.items()}),
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config), processor


KIMI_TOKENS = [
    "[BOS]",
    "[PAD]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    "<|kimi_k25_video_placeholder|>",
]
KIMI_TEMPLATE = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% for c in m.content %}"
    "{% if c.type == 'image' %}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)


def kimi_k25() -> Built:
    """A Kimi K2.5: a DeepSeek-V3 (multi-head latent attention, a dense layer, groups of experts) behind a MoonViT."""
    tokenizer = byte_tokenizer(KIMI_TOKENS, eos_token="<|im_end|>", pad_token="[PAD]")
    size = {"max_height": 6, "max_width": 6}
    processor = transformers.Kimi_K25Processor(
        image_processor=transformers.Kimi_K25ImageProcessor(size=size, max_patches=64),
        tokenizer=tokenizer,
        video_processor=transformers.Kimi_K25VideoProcessor(size=size),
        chat_template=KIMI_TEMPLATE,
    )
    config = transformers.Kimi_K25Config(
        text_config=TEXT
        | {
            "model_type": "deepseek_v3",
            "vocab_size": len(tokenizer),
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **token_ids(
            tokenizer,
            image_token_id="<|media_pad|>",
            video_token_id="<|kimi_k25_video_placeholder|>",
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
    )
    return transformers.Kimi_K25ForConditionalGeneration(config), processor


OCR2_TEMPLATE = (
    "<|begin_of_sentence|>{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% if m.role == 'user' %}{{ '\n' }}{% else %}<|end_of_sentence|>"
    "{% endif %}{% endfor %}"
)


def deepseek_ocr2() -> Built:
    """A DeepSeek-OCR 2: a SAM, then a language model of its own as tower; a dense layer, then layers of experts."""
    tokenizer = byte_tokenizer(
        ["<image>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"],
        eos_token="<|end_of_sentence|>",
        pad_token="<|pad|>",
    )
    processor = transformers.DeepseekOcr2Processor(
        image_processor=transformers.DeepseekOcr2ImageProcessor(), tokenizer=tokenizer, chat_template=OCR2_TEMPLATE
    )
    tower = {
        "sam_config": {
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "global_attn_indexes": [1],
            "mlp_dim": 24,
            "downsample_channels": [16, 32],
        },
        "encoder_config": TOWER | {"num_key_value_heads": 2},
    }
    config = transformers.DeepseekOcr2Config(
        text_config=TEXT
        | {
            "vocab_size": len(tokenizer),
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "max_position_embeddings": 4096,
        },
        vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers.DeepseekOcr2ForConditionalGeneration(config), processor


FAMILIES = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "kimi_k25": kimi_k25,
    "deepseek_ocr2": deepseek_ocr2,
}
