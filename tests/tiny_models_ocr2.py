"""Tiny random models of further families: those of tests/tiny_models_ocr.py go on here."""

from __future__ import annotations

import transformers

from tests.tiny_models_parts import (
    CHATML,
    LLAVA_TEMPLATE,
    LLAVA_TOWER,
    QWEN_TEMPLATE,
    TOWER,
    Builders,
    Built,
    byte_tokenizer,
    chatml,
    lacking,
    llava_processor,
    llava_tokenizer,
    named_tokenizer,
    qwen_ids,
    qwen_tokenizer,
    siglip,
    text_of,
    token_ids,
)

IDEFICS2_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %} {{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
HUNYUAN_TOKENS = ["<begin>", "<user_end>", "<assistant_end>", "<pad>"]
HUNYUAN_TEMPLATE = (
    "<begin>{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<image_start><image_pad><image_end>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}<assistant_end>{% else %}<user_end>{% endif %}{% endfor %}"
)
OVIS_TOKENS = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
NAVIT_TOWER = TOWER | {"patch_size": 14}


def exaone4_5() -> Built:
    """An EXAONE 4.5: a Qwen2.5-VL tower with grouped keys, and two layers of three that look back 24 tokens."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    processor = transformers.Exaone4_5_Processor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
    ids = {name: value for name, value in qwen_ids(tokenizer).items() if name in ("image_token_id", "video_token_id")}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Exaone4_5_Config(
        text_config=text_of(
            tokenizer, "exaone4", num_hidden_layers=3, head_dim=16, sliding_window=24, layer_types=layers
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    return transformers.Exaone4_5_ForConditionalGeneration(config), processor


def lighton_ocr() -> Built:
    """A LightOnOCR: images of any shape through a Pixtral tower, Qwen3."""
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = named_tokenizer(CHATML, names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.LightOnOcrProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chatml("<|image_pad|>"),
    )
    config = transformers.LightOnOcrConfig(
        text_config=text_of(tokenizer, "qwen3", head_dim=16, sliding_window=None),
        vision_config=NAVIT_TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 112},
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<|image_pad|>"),
    )
    return transformers.LightOnOcrForConditionalGeneration(config), processor


def qianfan_ocr() -> Built:
    """A Qianfan-OCR: InternVL's tiles and pixel shuffle, Qwen3; a tower with stochastic depth."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = named_tokenizer([*CHATML, "<image>"], names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.QianfanOCRProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=3),
        tokenizer,
        image_seq_length=4,
        chat_template=chatml("<image>"),
    )
    config = transformers.QianfanOCRConfig(
        text_config=text_of(tokenizer, "qwen3", head_dim=16),
        vision_config=NAVIT_TOWER | {"image_size": 56},
        image_seq_length=4,
        **token_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return transformers.QianfanOCRForConditionalGeneration(config), processor


def ovis2() -> Built:
    """An Ovis 2: a visual vocabulary, whose embeddings the tower's scores weigh."""
    tokenizer = byte_tokenizer([*CHATML, "<image>", *OVIS_TOKENS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=3),
        tokenizer,
        image_seq_length=4,
        chat_template=chatml("<image>"),
    )
    config = transformers.Ovis2Config(
        text_config=text_of(tokenizer, "qwen2"),
        vision_config=NAVIT_TOWER | {"image_size": 56, "vocab_size": 48, "hidden_stride": 2},
        hidden_size=64,
        vocab_size=len(tokenizer),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(OVIS_TOKENS[1:]),
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<IMG_ATOM>"),
    )
    return transformers.Ovis2ForConditionalGeneration(config), processor


def llava_next() -> Built:
    """A LLaVA-NeXT: an image and its tiles, unpadded, with a trained vector at the end of every row."""
    tokenizer = llava_tokenizer()
    tiles = [[42, 84], [84, 42], [84, 84]]
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = transformers.LlavaNextConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=LLAVA_TOWER,
        image_grid_pinpoints=tiles,
        **token_ids(tokenizer, image_token_index="<image>"),
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def vipllava() -> Built:
    """A ViP-LLaVA: features of several layers of a CLIP tower side by side."""
    tokenizer = llava_tokenizer()
    config = transformers.VipLlavaConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=LLAVA_TOWER,
        vision_feature_layer=[-2, 1],
        **token_ids(tokenizer, image_token_index="<image>"),
    )
    return transformers.VipLlavaForConditionalGeneration(config), llava_processor(tokenizer)


def video_llama_3() -> Built:
    """A VideoLLaMA 3: images of any shape, merged by interpolation, Qwen2 with ordinary positions."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 24}
    processor = transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(size=size, merge_size=2),
        tokenizer,
        transformers.VideoLlama3VideoProcessor(size=size),
        chat_template=chatml("<|image_pad|>"),
    )
    config = transformers.VideoLlama3Config(
        text_config=text_of(tokenizer, "qwen2", tie_word_embeddings=False),
        vision_config=NAVIT_TOWER,
        **token_ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return transformers.VideoLlama3ForConditionalGeneration(config), processor


def idefics2() -> Built:
    """An Idefics 2: an image and its four quarters, resampled to a few latents by a perceiver, Mistral."""
    tokens = ["<end_of_utterance>", "<fake_token_around_image>", "<image>", "<pad>"]
    tokenizer = byte_tokenizer(tokens, eos_token="<end_of_utterance>", pad_token="<pad>")
    processor = transformers.Idefics2Processor(
        transformers.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 84}, do_image_splitting=True),
        tokenizer,
        image_seq_len=3,
        chat_template=IDEFICS2_TEMPLATE,
    )
    config = transformers.Idefics2Config(
        text_config=text_of(tokenizer, "mistral", head_dim=16, sliding_window=None),
        vision_config=NAVIT_TOWER | {"image_size": 84},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        **token_ids(tokenizer, image_token_id="<image>"),
    )
    return transformers.Idefics2ForConditionalGeneration(config), processor


def deepseek_vl() -> Built:
    """A DeepSeek-VL: padded squares through SigLIP, Llama."""
    names = {"image_token": "<image_placeholder>"}
    tokenizer = named_tokenizer(["<pad>", "</s>"], names, eos_token="</s>", pad_token="<pad>")
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessor(size={"height": 42, "width": 42}, min_size=14),
        tokenizer,
        num_image_tokens=9,
        chat_template=LLAVA_TEMPLATE.replace("<image>", "<image_placeholder>"),
    )
    config = transformers.DeepseekVLConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=siglip(42),
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return transformers.DeepseekVLForConditionalGeneration(config), processor


def hunyuan_vl() -> Built:
    """A HunyuanOCR: positions on four axes, the number of the image among them; a vector at the end of every row."""
    names = {"image_token": "<image_pad>", "image_start_token": "<image_start>", "image_end_token": "<image_end>"}
    tokenizer = named_tokenizer(HUNYUAN_TOKENS, names, eos_token="<assistant_end>", pad_token="<pad>")
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 24}
    processor = transformers.HunYuanVLProcessor(
        transformers.HunYuanVLImageProcessor(size=size), tokenizer, chat_template=HUNYUAN_TEMPLATE
    )
    text = text_of(tokenizer)
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "alpha": 1000.0,
        "factor": 1.0,
        "mrope_section": [2, 2, 2, 2],
    }
    config = transformers.HunYuanVLConfig(
        text_config=text | {"head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=NAVIT_TOWER | {"patch_size": 16, "out_hidden_size": 64, "max_image_size": 128},
        tie_word_embeddings=False,
        **token_ids(tokenizer, image_token_id="<image_pad>", im_start_id="<image_start>", im_end_id="<image_end>"),
    )
    return transformers.HunYuanVLForConditionalGeneration(config), processor


# Family to the class that a transformers which has it exports, and its builder.
_BUILDERS: Builders = {
    "exaone4_5": ("Exaone4_5_ForConditionalGeneration", exaone4_5),
    "lighton_ocr": ("LightOnOcrForConditionalGeneration", lighton_ocr),
    "qianfan_ocr": ("QianfanOCRForConditionalGeneration", qianfan_ocr),
    "ovis2": ("Ovis2ForConditionalGeneration", ovis2),
    "llava_next": ("LlavaNextForConditionalGeneration", llava_next),
    "vipllava": ("VipLlavaForConditionalGeneration", vipllava),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", video_llama_3),
    "idefics2": ("Idefics2ForConditionalGeneration", idefics2),
    "hunyuan_vl": ("HunYuanVLForConditionalGeneration", hunyuan_vl),
    "deepseek_vl": ("DeepseekVLForConditionalGeneration", deepseek_vl),
}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
