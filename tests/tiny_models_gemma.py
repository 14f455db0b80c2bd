"""Tiny random models of Gemma 3n and 4: windows and whole attention in turn, inputs for each layer, rare towers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny_models_parts import TEXT, TOWER, Built, byte_tokenizer, token_ids

# The tokens around pictures and sounds.
GEMMA_NAMES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
GEMMA_TEMPLATE = (
    "<bos>{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|image|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def _gemma_tokenizer() -> Any:
    tokens = ["<bos>", "<pad>", "<|turn>", "<turn|>", *GEMMA_NAMES.values(), "<|video|>"]
    return byte_tokenizer(
        tokens, eos_token="<turn|>", pad_token="<pad>", bos_token="<bos>", extra_special_tokens=GEMMA_NAMES
    )


def _gemma_text(tokenizer: Any, layers: list[str]) -> dict[str, Any]:
    return TEXT | {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
        "num_hidden_layers": len(layers),
        "head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 24,
        "layer_types": layers,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _evened(model: Any) -> Any:
    """Scale queries by their norms as trained models do; the attention does not, and would look at one token only."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):
                weight.fill_(len(weight) ** -0.5)
    return model


def _gemma4(**text: Any) -> Built:
    tokenizer = _gemma_tokenizer()
    pictures = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**pictures),
        tokenizer,
        transformers.Gemma4VideoProcessor(**pictures),
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=70,
    )
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma4Config(
        text_config=_gemma_text(tokenizer, layers) | text,
        vision_config=TOWER
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "position_embedding_size": 256,
            "use_clipped_linears": True,
            "standardize": True,
        },
        audio_config=None,
        **token_ids(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            audio_token_id="<|audio|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
        ),
    )
    return _evened(transformers.Gemma4ForConditionalGeneration(config)), processor


def gemma4() -> Built:
    """A Gemma 4 with a part of every size: embeddings for each layer, shared keys and values, wider global heads."""
    return _gemma4(num_kv_shared_layers=2, global_head_dim=32, use_double_wide_mlp=True)


def gemma4_larger() -> Built:
    """A Gemma 4 like the larger ones: pictures seen in both directions, experts, values that are the keys."""
    return _gemma4(
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=0,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        final_logit_softcapping=30.0,
    )


def gemma3n() -> Built:
    """A Gemma 3n: AltUp, Laurel, embeddings for each layer, shared keys and values, a sparse MLP, a tower of timm."""
    tokenizer = _gemma_tokenizer()
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer,
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=4,
    )
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = _gemma_text(tokenizer, layers) | {
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    }
    config = transformers.Gemma3nConfig(
        text_config=text,
        vision_config={
            "architecture": "test_convnext",
            "hidden_size": 64,
            "vocab_size": 8,
            "vocab_offset": len(tokenizer),
            "num_classes": 0,
        },
        audio_config={
            "hidden_size": 32,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [8, 4],
            "vocab_size": 8,
            "vocab_offset": len(tokenizer) + 8,
        },
        vision_soft_tokens_per_image=4,
        **token_ids(
            tokenizer,
            image_token_id="<|image|>",
            audio_token_id="<|audio|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            boa_token_id="<|audio>",
            eoa_token_id="<audio|>",
        ),
    )
    return _evened(transformers.Gemma3nForConditionalGeneration(config)), processor


# Family to the class that a transformers which has it exports, and its builder.
