"""Tiny random models of the families that cut an image into tiles, or keep its shape, in ways of their own.

Classes are looked up when a model is built, so an older transformers lacks single families, not this module.
"""

from __future__ import annotations

import transformers

from tests.tiny_models_parts import (
    CHATML,
    TEXT,
    TOWER,
    Builders,
    Built,
    byte_tokenizer,
    chatml,
    lacking,
    siglip,
    text_of,
    token_ids,
)

MISTRAL_TOKENS = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.content %}{{ c.text }}{% endfor %}</s>"
    "{% else %}[INST]{% for c in m.content %}{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}[/INST]{% endif %}{% endfor %}"
)
MOLMO_TOKENS = [
    "<|image|>",
    "<|video|>",
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
]


def llava_onevision() -> Built:
    """A LLaVA-OneVision: an image and its tiles, unpadded, with a trained vector at the end of every row."""
    tokenizer = byte_tokenizer([*CHATML, "<image>", "<video>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tiles = [[42, 42], [42, 84], [84, 42], [84, 84]]
    size = {"height": 42, "width": 42}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>"),
    )
    config = transformers.LlavaOnevisionConfig(
        text_config=text_of(tokenizer, "qwen2"),
        vision_config=siglip(42),
        image_grid_pinpoints=tiles,
        **token_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> Built:
    """An InternVL 3: tiles of one size and a small whole image, pixel shuffle, a class token that is left out."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(
        [*CHATML, *names.values()], eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names
    )
    size = {"height": 56, "width": 56}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, max_patches=3),
        tokenizer,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>"),
    )
    config = transformers.InternVLConfig(
        text_config=text_of(tokenizer, "qwen2"),
        vision_config=TOWER | {"image_size": 56, "patch_size": 14},
        image_seq_length=4,
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def mistral3() -> Built:
    """A Mistral 3: images of any shape through a Pixtral tower, patches merged, a token at the end of every row."""
    tokenizer = byte_tokenizer(MISTRAL_TOKENS, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    config = transformers.Mistral3Config(
        text_config=text_of(tokenizer, "mistral", head_dim=16, sliding_window=None),
        vision_config=TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 112, "patch_size": 14},
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_index="[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def lfm2_vl() -> Built:
    """An LFM2-VL: one layer of two is a short convolution over neighbouring tokens."""
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    places = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = byte_tokenizer(
        [*CHATML, *names.values(), *places],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    images = transformers.Lfm2VlImageProcessor(
        tile_size=64, min_tiles=2, max_tiles=3, min_image_tokens=2, max_image_tokens=6, encoder_patch_size=16
    )
    processor = transformers.Lfm2VlProcessor(images, tokenizer, chat_template=chatml("<image>"))
    config = transformers.Lfm2VlConfig(
        text_config=text_of(tokenizer, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        vision_config=TOWER
        | {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 16, "vision_use_head": False},
        projector_hidden_size=48,
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image>"),
    )
    return transformers.Lfm2VlForConditionalGeneration(config), processor


def molmo2() -> Built:
    """A Molmo 2: overlapping crops pooled by attention, features added to the tokens, image tokens in one block."""
    tokenizer = byte_tokenizer([*CHATML, *MOLMO_TOKENS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"height": 42, "width": 42}
    processor = transformers.Molmo2Processor(
        transformers.Molmo2ImageProcessor(size=size, max_crops=4, overlap_margins=[0, 1], patch_size=14),
        transformers.Molmo2VideoProcessor(size=size),
        tokenizer,
        chat_template=chatml("<|image|>"),
    )
    config = transformers.Molmo2Config(
        text_config=TEXT | {"vocab_size": len(tokenizer), "additional_vocab_size": 0, "head_dim": 16},
        vision_config=TOWER | {"num_key_value_heads": 2, "head_dim": 16, "image_size": [42, 42], "patch_size": 14},
        adapter_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "text_hidden_size": 64,
            "vision_feature_layer": [1, 0],
        },
        **token_ids(
            tokenizer,
            image_patch_id="<im_patch>",
            image_start_token_id="<im_start>",
            image_end_token_id="<im_end>",
            low_res_image_start_token_id="<low_res_im_start>",
            frame_start_token_id="<frame_start>",
            frame_end_token_id="<frame_end>",
        ),
    )
    return transformers.Molmo2ForConditionalGeneration(config), processor


# Family to the class that a transformers which has it exports, and its builder.
_BUILDERS: Builders = {
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", llava_onevision),
    "internvl": ("InternVLForConditionalGeneration", internvl),
    "mistral3": ("Mistral3ForConditionalGeneration", mistral3),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration", lfm2_vl),
    "molmo2": ("Molmo2ForConditionalGeneration", molmo2),
}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
