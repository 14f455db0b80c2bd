"""Tiny random models of the families that read documents, and of two whose towers come from timm.

Classes are looked up when a model is built, so an older transformers lacks single families, not this module.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_parts import (
    CHATML,
    LLAVA_TOWER,
    QWEN_TEMPLATE,
    TOWER,
    Builders,
    Built,
    byte_tokenizer,
    chatml,
    lacking,
    m_rope,
    named_tokenizer,
    qwen_ids,
    qwen_tokenizer,
    text_of,
    token_ids,
)
from tests.tiny_models_recurrent import qwen3_5_text

PADDLE_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}Assistant:\n{% for c in m.content %}"
    "{{ c.text }}{% endfor %}</s>{% else %}User: {% for c in m.content %}{% if c.type == 'image' %}"
    "<|IMAGE_START|><|IMAGE_PLACEHOLDER|>"
    "<|IMAGE_END|>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
GRANITE_TOKENS = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|pad|>", "<image>"]
GRANITE_TEMPLATE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# Llama 3's turns, with the image in front of the question.
PERCEPTION_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|image|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def granite_text(tokenizer: Any) -> dict[str, Any]:
    """A language model whose embeddings, attention, residuals and scores have factors of their own."""
    text = text_of(tokenizer)
    return text | {
        "num_hidden_layers": 6,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": False,
    }


def paddleocr_vl() -> Built:
    """A PaddleOCR-VL: images of any shape through a NaViT tower, M-RoPE."""
    tokens = ["<s>", "</s>", "<pad>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>", "<|IMAGE_START|>", "<|IMAGE_END|>"]
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tokenizer = named_tokenizer(tokens, names, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 24}
    processor = transformers.PaddleOCRVLProcessor(
        transformers.PaddleOCRVLImageProcessor(size=size), tokenizer, chat_template=PADDLE_TEMPLATE
    )
    text = text_of(tokenizer)
    config = transformers.PaddleOCRVLConfig(
        text_config=text | {"head_dim": 16, "rope_parameters": m_rope()},
        vision_config=TOWER | {"image_size": 56, "patch_size": 14},
        **token_ids(
            tokenizer,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|IMAGE_START|>",
            vision_end_token_id="<|IMAGE_END|>",
        ),
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config), processor


def minicpm(name: str, pictures: str, **settings: Any) -> Built:
    """A MiniCPM: an image and its slices of any shape, before a Qwen3.5.

    Args:
        name: what its classes begin with.
        pictures: what those of its image and video processors begin with.
        **settings: of its configuration.
    """
    names = {
        "image_token": "<unk_image>",
        "video_token": "<unk_video>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    tokenizer = named_tokenizer(CHATML, names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    sizes = {"max_slice_nums": 4, "scale_resolution": 64, "patch_size": 14}
    processor = getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{pictures}ImageProcessor")(**sizes),
        getattr(transformers, f"{pictures}VideoProcessor")(**sizes),
        tokenizer,
        chat_template=chatml("<unk_image>"),
    )
    text = qwen3_5_text(tokenizer)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config = getattr(transformers, f"{name}Config")(
        text_config=text | {"model_type": "qwen3_5_text"},
        vision_config=TOWER | {"image_size": 56, "patch_size": 14, "insert_layer_id": 0},
        insert_layer_id=0,
        **settings,
        **token_ids(tokenizer, image_token_id="<unk_image>", video_token_id="<unk_video>"),
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def minicpmv4_6() -> Built:
    """A MiniCPM-V 4.6: slices that are merged twice."""
    return minicpm("MiniCPMV4_6", "MiniCPMV4_6", image_size=64)


def minicpmv4_7() -> Built:
    """A MiniCPM-V 4.7: the slices of MiniCPM-V 4.6."""
    return minicpm("MiniCPMV4_7", "MiniCPMV4_6", image_size=64)


def minicpm_ocr() -> Built:
    """A MiniCPM-OCR: slices whose number the size of the letters decides."""
    return minicpm("MiniCPMOcr", "MiniCPMOcr")


def granite4_vision() -> Built:
    """A Granite 4 Vision: tiles, and features of several vision layers added in front of several language layers."""
    tokenizer = byte_tokenizer(GRANITE_TOKENS, eos_token="<|end_of_text|>", pad_token="<|pad|>")
    tiles = [[56, 56], [56, 112], [112, 56], [112, 112]]
    processor = transformers.Granite4VisionProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        downsample_rate="1/2",
        chat_template=GRANITE_TEMPLATE,
    )
    config = transformers.Granite4VisionConfig(
        text_config=granite_text(tokenizer),
        vision_config=LLAVA_TOWER | {"hidden_size": 64, "image_size": 56},
        qformer_config={"model_type": "blip_2_qformer", "intermediate_size": 48, "num_hidden_layers": 1},
        image_grid_pinpoints=tiles,
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
        **token_ids(tokenizer, image_token_index="<image>"),
    )
    return transformers.Granite4VisionForConditionalGeneration(config), processor


def granite_docling() -> Built:
    """A Granite Docling: tiles of one size, features of deeper vision layers added to the first language layers."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokens = [*GRANITE_TOKENS, "<fake_token_around_image>", "<global-img>", *places]
    tokenizer = byte_tokenizer(tokens, eos_token="<|end_of_text|>", pad_token="<|pad|>")
    processor = transformers.GraniteDoclingProcessor(
        transformers.GraniteDoclingImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer,
        image_seq_len=4,
        chat_template=GRANITE_TEMPLATE.replace("<image>\n", "<image>"),
    )
    config = transformers.GraniteDoclingConfig(
        text_config=granite_text(tokenizer),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": 64,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image>"),
    )
    return transformers.GraniteDoclingForConditionalGeneration(config), processor


def lfm3_vl() -> Built:
    """An LFM3-VL: short convolutions, layers that look back 24 tokens, and full attention."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 24}
    processor = transformers.Lfm3VlProcessor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
    config = transformers.Lfm3VlConfig(
        text_config=text_of(tokenizer, "lfm3")
        | {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["conv", "full_attention", "sliding_attention"],
            "conv_L_cache": 4,
        },
        vision_config=TOWER | {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        projector_hidden_size=48,
        tie_word_embeddings=False,
        **qwen_ids(tokenizer),
    )
    return transformers.Lfm3VlForConditionalGeneration(config), processor


def fast_vlm() -> Built:
    """A FastVLM: a convolutional FastViT tower of timm, Qwen2."""
    tokenizer = byte_tokenizer([*CHATML, "<image>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"height": 128, "width": 128}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 128}, crop_size=size),
        tokenizer,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )
    tower = {"inference_mode": True, "layers": [1] * 5, "embed_dims": [32] * 5}
    config = transformers.FastVlmConfig(
        text_config=text_of(tokenizer, "qwen2"),
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 64,
            "do_pooling": True,
            "model_args": tower,
        },
        **token_ids(tokenizer, image_token_index="<image>"),
    )
    return transformers.FastVlmForConditionalGeneration(config), processor


def perception_lm() -> Built:
    """A PerceptionLM: an image and its tiles through a Perception Encoder of timm, pooled two by two."""
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = named_tokenizer(tokens, names, eos_token="<|eot_id|>", pad_token="<|pad|>")
    processor = transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(size={"height": 56, "width": 56}),
        transformers.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4),
        tokenizer,
        patch_size=14,
        pooling_ratio=2,
        chat_template=PERCEPTION_TEMPLATE,
    )
    tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [56, 56], "ref_feat_shape": [4, 4]}
    config = transformers.PerceptionLMConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "do_pooling": True,
            "global_pool": "map",
            "model_args": tower,
        },
        projector_pooling_ratio=2,
        **token_ids(tokenizer, image_token_id="<|image|>", video_token_id="<|video|>"),
    )
    return transformers.PerceptionLMForConditionalGeneration(config), processor


_BUILDERS: Builders = {
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", paddleocr_vl),
    "minicpmv4_6": ("MiniCPMV4_6ForConditionalGeneration", minicpmv4_6),
    "minicpmv4_7": ("MiniCPMV4_7ForConditionalGeneration", minicpmv4_7),
    "minicpm_ocr": ("MiniCPMOcrForConditionalGeneration", minicpm_ocr),
    "granite4_vision": ("Granite4VisionForConditionalGeneration", granite4_vision),
    "granite_docling": ("GraniteDoclingForConditionalGeneration", granite_docling),
    "lfm3_vl": ("Lfm3VlForConditionalGeneration", lfm3_vl),
    "fast_vlm": ("FastVlmForConditionalGeneration", fast_vlm),
    "perception_lm": ("PerceptionLMForConditionalGeneration", perception_lm),
}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
