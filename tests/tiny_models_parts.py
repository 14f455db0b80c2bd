"""Tokenizers and configurations that the tiny models of tests/tiny_models*.py have in common."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
LLAVA_TOWER = TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 42, "patch_size": 14}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
Built = tuple[Any, Any]
Builders = dict[str, tuple[str, Callable[[], Built]]]  # family to the class that a transformers which has it exports


def byte_tokenizer(special: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special, **kwargs)


def named_tokenizer(special: list[str], names: dict[str, str], **kwargs: Any) -> Any:
    """A byte-level tokenizer some of whose special tokens have names, as `tokenizer.image_token`."""
    tokenizer = byte_tokenizer(special, extra_special_tokens=names, **kwargs)
    tokenizer.add_tokens([token for token in special if token not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def qwen_tokenizer() -> Any:
    """The tokenizer of Qwen's models."""
    return byte_tokenizer(QWEN_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llava_tokenizer(*more: str) -> Any:
    """The tokenizer of LLaVA 1.5, with further special tokens."""
    return byte_tokenizer(["<image>", *more, "<pad>", "</s>"], eos_token="</s>", pad_token="<pad>")


def chatml(image: str) -> str:
    """Qwen's conversation with other tokens where the image stands."""
    return QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)


def token_ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    """Configuration values that are ids of tokens."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text_of(tokenizer: Any, kind: str = "", **more: Any) -> dict[str, Any]:
    """A small language model of some kind; without one, of the kind that its family has."""
    named = {"model_type": kind} if kind else {}
    return named | TEXT | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **more}


def m_rope(**more: Any) -> dict[str, Any]:
    """Rotary positions on three axes."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **more}


def siglip(image_size: int) -> dict[str, Any]:
    """A small SigLIP tower for square pictures of so many pixels a side."""
    tower = {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": 14, "vision_use_head": False}
    return TOWER | tower


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of Qwen's image tokens, as its configurations name them."""
    return token_ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def llava_processor(tokenizer: Any) -> Any:
    """The processor of LLaVA 1.5."""
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


_TIMM = ("fast_vlm", "gemma3n", "perception_lm")  # their towers come from timm


def lacking(builders: Builders) -> dict[str, str]:
    """Why families cannot be built here, by family."""
    reason = f"transformers {transformers.__version__} lacks it"
    exported = set(dir(transformers))  # to ask for an attribute would load its family
    found = {name: reason for name, (needed, _) in builders.items() if needed not in exported}
    if find_spec("timm") is None:
        found |= {name: "its vision tower needs timm" for name in _TIMM if name in builders}
    return found
