"""The architecture of pocket, its processor, and its folder.

A small Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923): the stock transformers classes with small numbers, so that
whatever trains pocket trains the large ones. What departs from the large models, and why:

- patches of 8 px, merged 2 x 2: a visual token covers 16 x 16 px, so small pictures have few tokens and stay legible;
- full attention in every vision block: pictures are far smaller than Qwen's attention windows;
- white paper is zero: with CLIP's mean it is a large constant in every patch that RMSNorm keeps, and nothing is
  learned;
- rotary positions with base 100, and the sections of time, height and width interleaved over the frequencies:
  contexts are short, and in the usual order the width of a small grid would fall on frequencies too low to tell
  columns apart.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tools.pocket import tokenizer as tokens
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.model.pocket import WEIGHTS

PATCH_PX = 8
MERGE = 2
TOKEN_PX = PATCH_PX * MERGE
MIN_PIXELS = 32 * 32
MAX_PIXELS = 256 * 256
MAX_NEW_TOKENS = 24
TRAINING_HEADS = "training_heads.safetensors"  # only needed to go on with the training
SHIPPED_HEADS = Path(__file__).parent / "weights" / TRAINING_HEADS
# Offsets (down, right), in patches, that the heads of the first vision blocks start from; the others start free.
_AROUND = ((0, -1), (0, 1), (-1, 0), (1, 0))
PATCH_OFFSETS = (_AROUND, _AROUND, ((0, -1), (0, 1)))
PATCH_BIAS = 4.8
PREVIOUS_TOKEN_LAYERS = 2
TOKEN_BIAS = 3.6
IMAGE_MEAN = 1.0
IMAGE_STD = 0.3


def build_config(vocab_size: int, ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """The configuration of pocket.

    Args:
        vocab_size: number of tokens.
        ids: id of every special token of `tokenizer.SPECIAL_TOKENS`.
    """
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.07,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3] * 4},
        "bos_token_id": None,
        "eos_token_id": ids[tokens.TURN_END],
        "pad_token_id": ids[tokens.END_OF_TEXT],
    }
    vision: dict[str, Any] = {
        "depth": 5,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "patch_size": PATCH_PX,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 16 * TOKEN_PX,
        "fullatt_block_indexes": [0, 1, 2, 3, 4],
        "initializer_range": 0.08,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[tokens.IMAGE_PAD],
        video_token_id=ids[tokens.VIDEO_PAD],
        vision_start_token_id=ids[tokens.VISION_START],
        vision_end_token_id=ids[tokens.VISION_END],
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Build pocket with random weights, float32.

    Every matrix starts at 1 / sqrt(inputs); those that write into the residual stream are divided by sqrt(2 x depth)
    more, so that the stream keeps its size (GPT-2's rule).

    Args:
        seed: of the weights; the global generator of torch is left as it was.
    """
    tokenizer = tokens.build_tokenizer()
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in tokens.SPECIAL_TOKENS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config: Any = build_config(len(tokenizer), ids)
        model = Qwen2_5_VLForConditionalGeneration(config)
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            std = 0.08 if "embed_tokens" in name else 1 / math.sqrt(weight[0].numel())
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                depth = config.vision_config.depth if "visual" in name else config.text_config.num_hidden_layers
                std /= math.sqrt(2 * depth)
            torch.nn.init.normal_(weight, std=std)
        _favour_neighbours(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ids[tokens.TURN_END],
        pad_token_id=ids[tokens.END_OF_TEXT],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return model


@torch.no_grad()
def _favour_neighbours(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let some heads begin by looking at a neighbour: a patch beside, above, below, or the token before.

    Under rotary positions constant biases of query and key make a score that depends on the distance alone (Su et al.
    2021, arXiv:2104.09864): with a key of size c everywhere and a query turned by the angle of an offset it is
    largest at that offset. A convolution has that knowledge built in; learning it from random biases costs the first
    part of a short run.
    """
    vision: Any = model.config.vision_config
    width = vision.hidden_size // vision.num_heads
    per_axis = model.model.visual.rotary_pos_emb.inv_freq
    for block, offsets in zip(model.model.visual.blocks, PATCH_OFFSETS, strict=False):
        for head, (down, right) in enumerate(offsets):
            angles = torch.cat([per_axis * down, per_axis * right])
            query, key = block.attn.qkv.bias.view(3, vision.num_heads, width)[:2, head]
            _write_offset(query, key, angles, PATCH_BIAS)
    text: Any = model.config.text_config
    frequencies = model.model.language_model.rotary_emb.inv_freq
    for layer in model.model.language_model.layers[:PREVIOUS_TOKEN_LAYERS]:
        attention = layer.self_attn
        query = attention.q_proj.bias.view(text.num_attention_heads, -1)[0]
        _write_offset(query, attention.k_proj.bias.view(text.num_key_value_heads, -1)[0], -frequencies, TOKEN_BIAS)


def _write_offset(query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor, size: float) -> None:
    """Write biases whose score is largest at the offset that `angles` (frequency times offset) stand for, in place."""
    query.copy_(size * torch.cat([angles.cos(), angles.sin()]))
    key.copy_(size * torch.cat([torch.ones_like(angles), torch.zeros_like(angles)]))


def build_processor() -> Qwen2_5_VLProcessor:
    """The processor of pocket: images whose sides are multiples of 16 px are taken as they are, up to 256 x 256 px."""
    geometry: dict[str, Any] = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry),
        tokenizer=tokens.build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**geometry),
        chat_template=tokens.CHAT_TEMPLATE,
    )


def heads_file(folder: Path) -> Path:
    """Where the heads of an exported folder are: in it; those of the shipped one stay out of the package."""
    return SHIPPED_HEADS if folder.resolve() == WEIGHTS.resolve() else folder / TRAINING_HEADS


def save_folder(
    model: Qwen2_5_VLForConditionalGeneration, folder: str | Path, heads: torch.nn.Module | None = None
) -> Path:
    """Write a folder that AutoModelForImageTextToText and AutoProcessor open, the weights in bfloat16.

    Args:
        model: pocket; it is not changed.
        folder: made when missing; files of an earlier export are replaced.
        heads: what only the training needs.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shipped: Any = copy.deepcopy(model)
        shipped.to(torch.bfloat16)
        shipped.save_pretrained(folder)
        build_processor().save_pretrained(folder)
        if heads is not None:
            save_file({name: weight.bfloat16() for name, weight in heads.state_dict().items()}, heads_file(folder))
            heads_file(folder).chmod(0o644)
        for file in folder.iterdir():
            file.chmod(0o644)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error}", "choose a folder that you may write to") from error
    prompt = {
        "schema": 1,
        "template": "{question}",
        "system": "",
        "min_pixels": None,
        "max_pixels": MAX_PIXELS,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    artifacts.write_json(folder / artifacts.PROMPT, prompt)
    return folder
