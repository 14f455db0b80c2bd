"""Tiny random models of the real architectures, with real processors and byte-level tokenizers, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests import (
    tiny_models_experts,
    tiny_models_more,
    tiny_models_ocr,
    tiny_models_ocr2,
    tiny_models_recurrent,
    tiny_models_types,
    tiny_models_windows,
)
from tests.older_versions import lacking_families
from tests.tiny_models_parts import (
    LLAVA_TOWER,
    QWEN_TEMPLATE,
    QWEN_TOWER,
    TEXT,
    TOWER,
    byte_tokenizer,
    llava_processor,
    llava_tokenizer,
    m_rope,
    qwen_ids,
    qwen_tokenizer,
    siglip,
    text_of,
    token_ids,
)
from vlm_sft.model.default_targets import mixer_projections

SMOL_TOKENS = [
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<pad>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
]
SMOL_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}{% if c.type == 'image' %}"
    "<image>{% else %} {{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TOKENS = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<image_soft_token>",
    "<end_of_image>",
]
GEMMA_TEMPLATE = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# PaliGemma has no chat: its processor wants the images and the question, and the answer follows a line feed.
PALIGEMMA_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


def _qwen_processor(kind: type) -> Any:
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}
    images = Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2)
    return kind(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )


def _qwen_text(vocab: int) -> dict[str, Any]:
    return TEXT | {
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_parameters": m_rope(),
        "tie_word_embeddings": False,
    }


def qwen2_5_vl() -> tuple[Any, Any]:
    """A Qwen2.5-VL with windowed and full attention blocks."""
    processor = _qwen_processor(Qwen2_5_VLProcessor)
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(len(processor.tokenizer)),
        vision_config=QWEN_TOWER
        | {"patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1]},
        **qwen_ids(processor.tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    """A Qwen2-VL."""
    processor = _qwen_processor(Qwen2VLProcessor)
    config = Qwen2VLConfig(
        text_config=_qwen_text(len(processor.tokenizer)),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "hidden_size": 64,
            "patch_size": 14,
        },
        **qwen_ids(processor.tokenizer),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    """A SmolVLM (Idefics3 design: tiles, SigLIP tower, pixel shuffle)."""
    tokenizer = byte_tokenizer(SMOL_TOKENS, eos_token="<end_of_utterance>", pad_token="<pad>", bos_token="<|im_start|>")
    images = SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = SmolVLMProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=SMOL_TEMPLATE,
    )
    config = SmolVLMConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=TOWER | {"image_size": 56, "patch_size": 14},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return SmolVLMForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """An Idefics3 (tiles of one size, SigLIP tower, pixel shuffle, Llama)."""
    tokenizer = byte_tokenizer(SMOL_TOKENS, eos_token="<end_of_utterance>", pad_token="<pad>", bos_token="<|im_start|>")
    images = Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOL_TEMPLATE)
    config = Idefics3Config(
        text_config=text_of(tokenizer, "llama"),
        vision_config=TOWER | {"image_size": 56, "patch_size": 14},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """A Qwen3-VL: interleaved M-RoPE, and features of an early vision block added to the first language layer."""
    tokenizer = qwen_tokenizer()
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
    text = _qwen_text(len(tokenizer)) | {"head_dim": 16, "num_hidden_layers": 3}
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **qwen_ids(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    """A LLaVA 1.5: CLIP tower without its class token, Llama."""
    tokenizer = llava_tokenizer()
    processor = llava_processor(tokenizer)
    config = LlavaConfig(
        text_config=text_of(tokenizer, "llama"),
        vision_config=LLAVA_TOWER,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """A Gemma 3: image tokens see each other in both directions; one layer of two looks back 24 tokens only."""
    extra = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(
        GEMMA_TOKENS, eos_token="<end_of_turn>", pad_token="<pad>", bos_token="<bos>", extra_special_tokens=extra
    )
    images = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    config = Gemma3Config(
        text_config=TEXT
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "pad_token_id": tokenizer.pad_token_id,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config=siglip(56),
        mm_tokens_per_image=4,
        **token_ids(
            tokenizer,
            image_token_index="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
    )
    return Gemma3ForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """A PaliGemma: image and question see each other in both directions, the answer is causal."""
    names = [*(f"<loc{number:04d}>" for number in range(4)), "<image>", "<bos>", "<eos>", "<pad>"]
    tokenizer = byte_tokenizer(names, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    images = SiglipImageProcessor(size={"height": 42, "width": 42})
    images.image_seq_length = 9
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=PALIGEMMA_TEMPLATE)
    config = PaliGemmaConfig(
        text_config=TEXT
        | {"model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 16, "pad_token_id": tokenizer.pad_token_id},
        vision_config=siglip(42) | {"projection_dim": 64},
        projection_dim=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return PaliGemmaForConditionalGeneration(config), processor


# Not every mechanism is tried again on these.
LATER = {
    **tiny_models_more.FAMILIES,
    **tiny_models_windows.FAMILIES,
    **tiny_models_recurrent.FAMILIES,
    **tiny_models_experts.FAMILIES,
    **tiny_models_ocr.FAMILIES,
    **tiny_models_ocr2.FAMILIES,
    **tiny_models_types.FAMILIES,
}
FAMILIES = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "llava": llava,
    "gemma3": gemma3,
    "paligemma": paligemma,
    **LATER,
}
# Why a family cannot be tried here.
LACKING = {
    **tiny_models_more.LACKING,
    **tiny_models_windows.LACKING,
    **tiny_models_ocr.LACKING,
    **tiny_models_ocr2.LACKING,
    **tiny_models_types.LACKING,
    **lacking_families(),
}
LATER = {name: builder for name, builder in LATER.items() if name not in LACKING}
FAMILIES = {name: builder for name, builder in FAMILIES.items() if name not in LACKING}


def targets(model: Any) -> list[str]:
    """Names of the modules that LoRA goes to: projections of every kind of layer that mixes tokens."""
    return list(mixer_projections(model.get_decoder()))


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """Make a model with seeded random weights large enough to matter, and its processor; skips a test that cannot."""
    if family in LACKING:
        pytest.skip(f"{family}: {LACKING[family]}")
    torch.manual_seed(seed)
    model, processor = (FAMILIES | tiny_models_windows.VARIANTS)[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    stop = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model as a folder that AutoModelForImageTextToText and AutoProcessor open."""
    model, processor = build(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    return folder
