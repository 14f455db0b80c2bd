"""Adapters with random updates on tiny saved models, for tests of what is done with an adapter afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import tiny_models
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.model.load import find_base, load_model
from vlm_sft.model.trainable import save_tuned, tune
from vlm_sft.recipe.load import load_recipe

PROMPT = PromptSettings(template="{question}\nShort answer:", max_pixels=28 * 28 * 20, max_new_tokens=6)


def save_base(folder: Path, family: str = "qwen2_5_vl") -> Path:
    return tiny_models.save(family, folder)


def save_adapter(
    base_folder: Path, folder: Path, scale: float = 0.2, prompt: PromptSettings = PROMPT, **recipe: Any
) -> Path:
    """Write an adapter whose trained weights are moved at random by `scale`; 0 leaves it without effect."""
    base = find_base(str(base_folder), bf16=False, prompt=prompt)
    settings = load_recipe(None, {"lora_r": 4, "lora_alpha": 8, **recipe})
    model, _ = tune(load_model(base), settings, base.name, master=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and scale and "lora_A" not in name:
                parameter.add_(scale * torch.randn_like(parameter))
    save_tuned(model, folder, base, None)
    prompt.save(folder)
    return folder
