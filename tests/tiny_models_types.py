"""Tiny random models of further families; what is new in most of them is in another family, too."""

from __future__ import annotations

from typing import Any

import transformers

from tests import tiny_models_windows as windows
from tests.tiny_models_ocr2 import llava_next
from tests.tiny_models_parts import (
    CHATML,
    LLAVA_TEMPLATE,
    LLAVA_TOWER,
    QWEN_TEMPLATE,
    QWEN_TOKENS,
    QWEN_TOWER,
    TOWER,
    Builders,
    Built,
    byte_tokenizer,
    chatml,
    lacking,
    llava_tokenizer,
    m_rope,
    named_tokenizer,
    qwen_ids,
    qwen_tokenizer,
    siglip,
    text_of,
    token_ids,
)
from tests.tiny_models_recurrent import qwen3_5_processor

QWEN_SIZE = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
DEEP_TOWER = QWEN_TOWER | {
    "depth": 3,
    "patch_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
PLACEHOLDER = LLAVA_TEMPLATE.replace("<image>", "<image_placeholder>")
OMNI_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
AUDIO_TOWER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
    "num_mel_bins": 128,
}


def nemotron_h_omni() -> Built:
    """A Nemotron-H Omni: layers of Mamba-2, experts, attention or an MLP alone, behind a RADIO tower."""
    names = {
        "image_token": "<image>",
        "image_start_token": "<img>",
        "image_end_token": "</img>",
        "video_token": "<video>",
        "audio_token": "<so_embedding>",
    }
    tokenizer = named_tokenizer(CHATML, names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(
        transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=14, min_num_patches=4, max_num_patches=24),
        transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tokenizer,
        transformers.ParakeetFeatureExtractor(),
        chat_template=chatml("<image>"),
    )
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text_of(
            tokenizer,
            "nemotron_h",
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=32,
            n_routed_experts=4,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
        ),
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": 14,
            "max_img_size": 112,
            "video_temporal_patch_size": 2,
        },
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=48,
        **token_ids(tokenizer, image_token_id="<image>", video_token_id="<video>", audio_token_id="<so_embedding>"),
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config), processor


def llava_next_video() -> Built:
    """A LLaVA-NeXT-Video, asked about images."""
    tiles = [[42, 84], [84, 42], [84, 84]]
    tokenizer = llava_tokenizer("<video>")
    _, image = llava_next()
    processor = transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 42}),
        image.image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = transformers.LlavaNextVideoConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=LLAVA_TOWER,
        image_grid_pinpoints=tiles,
        **token_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config), processor


def video_llava() -> Built:
    """A Video-LLaVA, asked about images."""
    tokenizer = llava_tokenizer("<video>")
    size: dict[str, Any] = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    processor = transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**size),
        transformers.VideoLlavaVideoProcessor(**size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = transformers.VideoLlavaConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=LLAVA_TOWER,
        **token_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return transformers.VideoLlavaForConditionalGeneration(config), processor


def janus() -> Built:
    """A Janus: padded squares through SigLIP, Llama; the parts that draw images are not used."""
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = named_tokenizer(["<pad>", "</s>"], names, eos_token="</s>", pad_token="<pad>")
    processor = transformers.JanusProcessor(
        transformers.JanusImageProcessor(size={"height": 42, "width": 42}, min_size=14),
        tokenizer,
        num_image_tokens=9,
        chat_template=PLACEHOLDER,
    )
    tower = {"image_size": 42, "patch_size": 14, "mlp_ratio": 2.0, "projection_dim": 64, "num_image_tokens": 9}
    codes = {
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    }
    config = transformers.JanusConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **tower},
        vq_config=codes,
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return transformers.JanusForConditionalGeneration(config), processor


def deepseek_vl_hybrid() -> Built:
    """A DeepSeek-VL with two towers: SigLIP for the picture, SAM for its details."""
    names = {"image_token": "<image_placeholder>"}
    tokenizer = named_tokenizer(["<pad>", "</s>"], names, eos_token="</s>", pad_token="<pad>")
    processor = transformers.DeepseekVLHybridProcessor(
        transformers.DeepseekVLHybridImageProcessor(
            size={"height": 64, "width": 64}, high_res_size={"height": 256, "width": 256}, min_size=14
        ),
        tokenizer,
        num_image_tokens=16,
        chat_template=PLACEHOLDER,
    )
    details = {
        "model_type": "sam_vision_model",
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "global_attn_indexes": [1],
        "mlp_dim": 24,
        "image_size": 256,
        "patch_size": 16,
    }
    config = transformers.DeepseekVLHybridConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=siglip(64) | {"patch_size": 16},
        high_res_vision_config=details,
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config), processor


def aria() -> Built:
    """An Aria: queries that read the patches of a square, and a mixture of experts."""
    tokenizer = named_tokenizer(CHATML, {"image_token": "<|img|>"}, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.AriaProcessor(
        transformers.AriaImageProcessor(max_image_size=490),
        tokenizer,
        chat_template=chatml("<|img|>"),
        size_conversion={490: 4, 980: 8},
    )
    experts = {"intermediate_size": 32, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = transformers.AriaConfig(
        text_config=text_of(tokenizer, "aria_text", **experts),
        vision_config=TOWER | {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 70},
        projector_patch_to_query_dict={49: 4, 196: 8},
        **token_ids(tokenizer, image_token_index="<|img|>"),
    )
    return transformers.AriaForConditionalGeneration(config), processor


def glm4v_moe() -> Built:
    """A GLM-4.5V: a dense layer, then layers of experts."""
    experts = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
    config, model = transformers.Glm4vMoeConfig, transformers.Glm4vMoeForConditionalGeneration
    layers = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
    return windows.glm(config, model, "Glm4vProcessor", "glm4v_moe_text", "Glm4vImageProcessor", **experts, **layers)


def glmga() -> Built:
    """A GLM whose image processor rounds in another way."""
    config, model = transformers.GlmgaConfig, transformers.Glm46VForConditionalGeneration
    return windows.glm(config, model, "Glm46VProcessor", "glm4v_text", "GlmgaImageProcessor")


def _omni_ids(tokenizer: Any, ending: str) -> dict[str, int]:
    """The ids that the thinkers of Qwen's Omni models have, some of whose names end otherwise."""
    kinds = {f"{kind}_token_{ending}": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")}
    return qwen_ids(tokenizer) | token_ids(
        tokenizer, **kinds, audio_start_token_id="<|audio_start|>", audio_end_token_id="<|audio_end|>"
    )


def qwen2_5_omni_thinker() -> Built:
    """The thinker of a Qwen2.5-Omni, asked about images."""
    tokenizer = named_tokenizer(QWEN_TOKENS, OMNI_NAMES, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.Qwen2_5OmniProcessor(
        transformers.Qwen2VLImageProcessor(size=QWEN_SIZE, patch_size=14, merge_size=2),
        transformers.Qwen2VLVideoProcessor(size=QWEN_SIZE),
        transformers.WhisperFeatureExtractor(),
        tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text_of(tokenizer, rope_parameters=m_rope(), tie_word_embeddings=False),
        audio_config=AUDIO_TOWER,
        vision_config=QWEN_TOWER | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        **_omni_ids(tokenizer, "index"),
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni_moe_thinker() -> Built:
    """The thinker of a Qwen3-Omni: experts, features of early vision blocks, positions that need a mask."""
    tokenizer = named_tokenizer(QWEN_TOKENS, OMNI_NAMES, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    processor = transformers.Qwen3OmniMoeProcessor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
        transformers.Qwen2VLVideoProcessor(size=size, patch_size=16),
        transformers.WhisperFeatureExtractor(),
        tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = text_of(tokenizer, head_dim=16, rope_parameters=m_rope(mrope_interleaved=True), tie_word_embeddings=False)
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text | experts | {"num_hidden_layers": 3},
        audio_config=AUDIO_TOWER | {"downsample_hidden_size": 16},
        vision_config=DEEP_TOWER,
        **_omni_ids(tokenizer, "id"),
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def cosmos3_edge() -> Built:
    """A Cosmos 3 Edge: M-RoPE, and a processor that gives token types on demand only."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    processor = transformers.Cosmos3EdgeProcessor(
        transformers.Cosmos3EdgeImageProcessor(size=size),
        tokenizer,
        transformers.Cosmos3EdgeVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
    config = transformers.Cosmos3EdgeConfig(
        text_config=text_of(tokenizer, head_dim=16, rope_parameters=m_rope()),
        vision_config=TOWER | {"patch_size": 16, "num_patches": 16},
        projector_hidden_size=48,
        **qwen_ids(tokenizer),
    )
    return transformers.Cosmos3EdgeForConditionalGeneration(config), processor


def cosmos3_omni() -> Built:
    """A Cosmos 3 Omni: a Qwen3-VL for what it says."""
    processor = qwen3_5_processor()
    tokenizer = processor.tokenizer
    text = text_of(tokenizer, head_dim=16, num_hidden_layers=3, tie_word_embeddings=False)
    config = transformers.Cosmos3OmniConfig(
        text_config=text | {"rope_parameters": m_rope(mrope_interleaved=True)},
        vision_config=DEEP_TOWER,
        **qwen_ids(tokenizer),
    )
    return transformers.Cosmos3OmniForConditionalGeneration(config), processor


def hyperclovax_vision_v2() -> Built:
    """A HyperCLOVA X Vision 2: a Qwen2.5-VL tower and ordinary positions."""
    tokenizer = qwen_tokenizer()
    processor = transformers.HyperCLOVAXVisionV2Processor(
        transformers.Qwen2VLImageProcessor(size=QWEN_SIZE, patch_size=14, merge_size=2),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=QWEN_SIZE),
        chat_template=QWEN_TEMPLATE,
    )
    tower = {"model_type": "qwen2_5_vl_vision", "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = transformers.HyperCLOVAXVisionV2Config(
        text_config=text_of(tokenizer, "hyperclovax"),
        vision_config=QWEN_TOWER | tower,
        **token_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config), processor


def step3p7() -> Built:
    """A Step 3.7: a picture and its crops, experts, a layer that looks back 24 tokens."""
    crops = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
    tokenizer = byte_tokenizer([*CHATML, *crops], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.Step3p7Processor(
        transformers.Step3p7ImageProcessor(
            size={"height": 112, "width": 112}, patch_size=56, vision_patch_size=14, downsampler_stride=4
        ),
        tokenizer,
        chat_template=chatml("<im_patch>"),
    )
    experts = {
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "share_expert_dim": 24,
    }
    layers = {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}
    config = transformers.Step3p7Config(
        text_config=text_of(tokenizer, head_dim=16, **experts, **layers),
        vision_config=TOWER | {"image_size": 112, "patch_size": 14, "mlp_ratio": 1.5, "max_position_embeddings": 64},
        **token_ids(tokenizer, image_token_id="<im_patch>"),
    )
    return transformers.Step3p7ForConditionalGeneration(config), processor


# Family to the class that a transformers which has it exports, and its builder.
_BUILDERS: Builders = {
    "nemotron_h_omni": ("NemotronH_Omni_Reasoning_V3", nemotron_h_omni),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", llava_next_video),
    "video_llava": ("VideoLlavaForConditionalGeneration", video_llava),
    "janus": ("JanusForConditionalGeneration", janus),
    "deepseek_vl_hybrid": ("DeepseekVLHybridForConditionalGeneration", deepseek_vl_hybrid),
    "aria": ("AriaForConditionalGeneration", aria),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", glm4v_moe),
    "glmga": ("GlmgaConfig", glmga),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5_omni_thinker),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni_moe_thinker),
    "cosmos3_edge": ("Cosmos3EdgeForConditionalGeneration", cosmos3_edge),
    "cosmos3_omni": ("Cosmos3OmniForConditionalGeneration", cosmos3_omni),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2ForConditionalGeneration", hyperclovax_vision_v2),
    "step3p7": ("Step3p7ForConditionalGeneration", step3p7),
}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
