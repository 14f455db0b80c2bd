"""Tiny random models, with real processors, of types that share images by the check of unknown families, or never."""

from __future__ import annotations

import transformers

from tests.tiny_models_parts import CHATML, TOWER, Builders, Built, byte_tokenizer, chatml, m_rope, text_of, token_ids
from tests.tiny_models_recurrent import QWEN3_5_TOWER
from tests.tiny_models_windows import glm

MUSE_TOKENS = [
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|video|>",
    "<|vid_frame_separator|>",
    "<|vid_start|>",
    "<|vid_end|>",
]
COMPASS_TOKENS = ["<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def muse_spark() -> Built:
    """A Muse Spark: a Muse Glimmer with experts, which hears, too."""
    sounds = ["<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"]
    tokenizer = byte_tokenizer([*CHATML, *MUSE_TOKENS, *sounds], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.MuseSparkProcessor(
        transformers.MuseGlimmerImageProcessor(max_image_tokens=24),
        transformers.MuseGlimmerVideoProcessor(),
        tokenizer,
        transformers.MuseSparkFeatureExtractor(),
        chat_template=chatml("<|patch|>"),
    )
    text = text_of(
        tokenizer,
        num_hidden_layers=3,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_local_experts=4,
        moe_hidden_size=32,
        **EXPERTS,
    )
    config = transformers.MuseSparkConfig(
        text_config=text,
        vision_config=TOWER | {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
        audio_config={"out_hidden_size": 64, "hidden_sizes": [8] * 4, "depths": [1] * 4},
        out_hidden_size=128,
        projector_hidden_size=48,
        **token_ids(tokenizer, image_token_id="<|patch|>", video_token_id="<|video|>", audio_token_id="<|audio|>"),
    )
    return transformers.MuseSparkForConditionalGeneration(config), processor


def glm5_next() -> Built:
    """A GLM 5 preview: layers of the delta rule, one of latent attention to what an index chooses, several streams."""
    latent = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 0}
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 4}
    linear = {"linear_head_dim": 16, "linear_num_heads": 4, "hc_mult": 2}
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "rope_parameters": None}
    kinds = transformers.Glm5NextConfig, transformers.Glm5NextForConditionalGeneration
    parts = "Glm5NextProcessor", "glm5_next_text", "Glm5NextImageProcessor"
    return glm(*kinds, *parts, **(latent | index | linear | sizes | EXPERTS))


def cohere_compass() -> Built:
    """A Command A with the tower of Qwen3-VL: M-RoPE for each kind of layer, attention and MLP side by side."""
    tokenizer = byte_tokenizer([*CHATML, *COMPASS_TOKENS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    processor = transformers.CohereCompassProcessor(
        transformers.CohereCompassImageProcessor(size=size, patch_size=16),
        tokenizer,
        transformers.CohereCompassVideoProcessor(),
        chat_template=chatml("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    )
    layers = ["sliding_attention", "full_attention"] * 2
    rope = dict.fromkeys(layers, m_rope(mrope_interleaved=True))
    config = transformers.CohereCompassConfig(
        text_config=text_of(
            tokenizer, num_hidden_layers=4, sliding_window=24, layer_types=layers, rope_parameters=rope
        ),
        vision_config=QWEN3_5_TOWER | {"deepstack_visual_indexes": [0]},
        **token_ids(
            tokenizer,
            image_token_id="<|IMAGE_PAD|>",
            video_token_id="<|VIDEO_PAD|>",
            vision_start_token_id="<|VISION_START|>",
            vision_end_token_id="<|VISION_END|>",
        ),
    )
    return transformers.CohereCompassForConditionalGeneration(config), processor


# Type to the class that a transformers which has it exports, and its builder.
BUILDERS: Builders = {
    "muse_spark": ("MuseSparkForConditionalGeneration", muse_spark),
    "glm5_next": ("Glm5NextForConditionalGeneration", glm5_next),
    "cohere_compass": ("CohereCompassForConditionalGeneration", cohere_compass),
}
