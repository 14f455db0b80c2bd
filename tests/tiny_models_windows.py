"""Tiny random models of the families whose layers look back a window or a chunk only, or that mix kinds of layers.

Windows and chunks are shorter than the sequences of the tests. Classes are looked up when a model is built, so an older
transformers lacks single families, not this module.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_gemma import gemma3n, gemma4, gemma4_larger
from tests.tiny_models_parts import (
    QWEN_TOWER,
    Builders,
    Built,
    byte_tokenizer,
    lacking,
    m_rope,
    siglip,
    text_of,
    token_ids,
)

GLM_TOKENS = [
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "[gMASK]",
    "<sop>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COHERE_TURN = "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}_TOKEN|>"
COHERE_TEMPLATE = (
    "<BOS_TOKEN>{% for m in messages %}" + COHERE_TURN + "{% for c in m.content %}{% if c.type == 'image' %}{image}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
COHERE_TOKENS = [
    "<PAD>",
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "<image>",
    "TILE_GLOBAL",
    "TILE",
]
LLAMA4_TOKENS = [
    "<pad>",
    "<|begin_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]
LLAMA4_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|image|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def _glm_text(tokenizer: Any, kind: str) -> dict[str, Any]:
    rope = m_rope(partial_rotary_factor=1.0)
    return text_of(tokenizer, kind, head_dim=16, max_position_embeddings=4096, rope_parameters=rope)


def glm(config: Any, model: Any, processor: str, text: str, images: str = "Glm46VImageProcessor", **more: Any) -> Built:
    """A GLM: M-RoPE, a tower with an interpolated position embedding and a convolution that merges patches."""
    tokenizer = byte_tokenizer(GLM_TOKENS, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    made = getattr(transformers, processor)(
        image_processor=getattr(transformers, images)(size=size, patch_size=14, merge_size=2),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, images.replace("Image", "Video"))(size=size),
        chat_template=GLM_TEMPLATE,
    )
    settings = config(
        text_config=_glm_text(tokenizer, text) | more,
        vision_config=QWEN_TOWER | {"image_size": 56, "patch_size": 14, "spatial_merge_size": 2},
        **token_ids(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )
    return model(settings), made


def glm4v() -> Built:
    """A GLM-4.1V: norms around attention and MLP on both sides."""
    config, model = transformers.Glm4vConfig, transformers.Glm4vForConditionalGeneration
    return glm(config, model, "Glm4vProcessor", "glm4v_text", "Glm4vImageProcessor")


def glm46v() -> Built:
    """A GLM-4.6V: the parts of GLM-4.1V put together by a processor of its own."""
    config, model = transformers.Glm46VConfig, transformers.Glm46VForConditionalGeneration
    return glm(config, model, "Glm46VProcessor", "glm4v_text")


def glm_ocr() -> Built:
    """A GLM-OCR."""
    config, model = transformers.GlmOcrConfig, transformers.GlmOcrForConditionalGeneration
    return glm(config, model, "Glm46VProcessor", "glm_ocr_text")


def _cohere_text(tokenizer: Any) -> dict[str, Any]:
    layers = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return text_of(tokenizer, "cohere2", head_dim=16, sliding_window=20, logit_scale=0.5, **layers)


def _cohere_tokenizer(names: dict[str, str]) -> Any:
    return byte_tokenizer(
        COHERE_TOKENS,
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        bos_token="<BOS_TOKEN>",
        **({"extra_special_tokens": names} if names else {}),
    )


def cohere2_vision() -> Built:
    """A Command A Vision: attention and MLP side by side, positions in the layers with a window only."""
    names = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = _cohere_tokenizer(names)
    size = {"height": 56, "width": 56}
    # The processor takes the patches of its image processor for the side of a tile in tokens.
    images = transformers.Cohere2VisionImageProcessor(size=size, max_patches=3, patch_size=2)
    processor = transformers.Cohere2VisionProcessor(
        images, tokenizer, chat_template=COHERE_TEMPLATE.replace("{image}", "<|IMG_PATCH|>")
    )
    config = transformers.Cohere2VisionConfig(
        text_config=_cohere_text(tokenizer),
        vision_config=siglip(56),
        alignment_intermediate_size=96,
        **token_ids(tokenizer, image_token_id="<|IMG_PATCH|>"),
    )
    return transformers.Cohere2VisionForConditionalGeneration(config), processor


def aya_vision() -> Built:
    """An Aya Vision: numbered tiles and a whole picture, features of an inner layer of the tower."""
    tokenizer = _cohere_tokenizer({})
    size = {"height": 56, "width": 56}
    processor = transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessor(size=size, max_patches=3, crop_to_patches=True),
        tokenizer,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE.replace("{image}", "<image>"),
    )
    config = transformers.AyaVisionConfig(
        text_config=_cohere_text(tokenizer),
        vision_config=siglip(56),
        **token_ids(tokenizer, image_token_index="<|IMG_PATCH|>"),
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def llama4() -> Built:
    """A Llama 4: chunks, layers without positions whose queries grow with their place, experts in every other layer."""
    tokenizer = byte_tokenizer(LLAMA4_TOKENS, eos_token="<|eot|>", pad_token="<pad>", bos_token="<|begin_of_text|>")
    processor = transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=3),
        tokenizer,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        chat_template=LLAMA4_TEMPLATE,
    )
    text = text_of(tokenizer, "llama4_text") | {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 20,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "attn_scale": 0.3,
    }
    config = transformers.Llama4Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vision_output_dim": 48,
            "projector_input_dim": 48,
            "projector_output_dim": 48,
            "image_size": 56,
            "patch_size": 14,
        },
        **token_ids(
            tokenizer, image_token_index="<|patch|>", boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>"
        ),
    )
    return transformers.Llama4ForConditionalGeneration(config), processor


_BUILDERS: Builders = {
    "glm4v": ("Glm4vForConditionalGeneration", glm4v),
    "glm46v": ("Glm46VForConditionalGeneration", glm46v),
    "glm_ocr": ("GlmOcrForConditionalGeneration", glm_ocr),
    "cohere2_vision": ("Cohere2VisionForConditionalGeneration", cohere2_vision),
    "aya_vision": ("AyaVisionForConditionalGeneration", aya_vision),
    "llama4": ("Llama4ForConditionalGeneration", llama4),
    "gemma4": ("Gemma4ForConditionalGeneration", gemma4),
    "gemma3n": ("Gemma3nForConditionalGeneration", gemma3n),
}
VARIANTS = {"gemma4_larger": gemma4_larger}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
