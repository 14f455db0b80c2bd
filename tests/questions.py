"""Seeded pictures with several questions each, and their packs on a tiny model, for tests of exactness."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import tiny_models
from tests.pictures import encoded
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.load import set_attention

PROMPT = PromptSettings(template="{question}\nShort answer:")


def picture(seed: int, size: tuple[int, int] = (72, 56)) -> ImageRef:
    """An image of noise, (width, height) pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return ImageRef.from_bytes(encoded(Image.fromarray(noise)), f"picture {seed}")


def ask(image: ImageRef, question: str, target: str, number: int = 0) -> Sample:
    return Sample(f"{image.source}/{number}", "tiny", "", (image,), question, target, (target,))


def questions(seed: int, count: int, size: tuple[int, int] = (72, 56)) -> list[Sample]:
    """Questions of different lengths about one image, with answers of different lengths."""
    random = np.random.default_rng([seed, 1])
    image = picture(seed, size)
    samples = []
    for number in range(count):
        words = " ".join(random.choice(["red", "bars", "2019", "how", "many", "sum"], 2 + number % 3))
        samples.append(ask(image, f"Q{number}: {words}?", str(int(random.integers(1, 10 ** (1 + number % 4)))), number))
    return samples


def adapted(model: Any, seed: int = 1, dropout: float = 0.0) -> Any:
    """The model with LoRA of rank 4 on q, v and o whose B matrices are not zero, so that A gets gradients too."""
    targets = resolve_targets(model, tiny_models.targets(model))
    wrapped = add_lora(model, targets, r=4, alpha=8, dropout=dropout, seed=seed, base_name="tiny")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return wrapped


def tiny(family: str, dtype: torch.dtype, attention: str, dropout: float = 0.0) -> tuple[Any, Encoder]:
    """An adapted tiny model whose language model uses one of our attention functions, and its encoder."""
    model, processor = tiny_models.build(family)
    model = model.to(dtype)
    if dtype == torch.float64:  # PyTorch's grouped product of matrices has no such format
        model.set_experts_implementation("eager")
    set_attention(model, attention)
    return adapted(model, dropout=dropout), Encoder(processor, PROMPT)


def pack(bundles: list[Bundle], groups: list[EncodedGroup], dtype: torch.dtype = torch.float32) -> PackedBatch:
    """Collate a pack, with its images in the number format of the model."""
    batch = collate(bundles, groups)
    batch.tensors = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in image.items()}
        for image in batch.tensors
    ]
    return batch


def asked_types(processor: Any) -> dict[str, bool]:
    """What a processor is asked for besides texts and pictures: Cosmos 3 Edge's gives its token types on demand."""
    return {"return_mm_token_type_ids": True} if "Cosmos3Edge" in type(processor).__name__ else {}
