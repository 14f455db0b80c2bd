"""An adapter put into the weights of its base: a whole model with its processor.

The merge is computed in float32 and rounded once, when the weights are written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import cached_file

from vlm_sft.common.errors import ModelError
from vlm_sft.model.load import Base

# Of a base's text side, which training does not change: programs that read older layouts find what they know.
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt "
    "special_tokens_map.json added_tokens.json tokenizer.model chat_template.json"
).split()


def write_merged(model: PeftModel, base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Put the adapter into the weights and write a whole model: weights, configuration, processor, prompt.

    Args:
        model: the adapter on its base, in float32; it is used up.
        base: where the processor and the prompt come from.
        folder: of the new model.
        dtype: number format of the weights.

    Raises:
        ModelError: the merged weights are not finite, or cannot be computed.
    """
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {error}", "train it again") from error
    limit = merged.generation_config.max_new_tokens
    if limit is not None:  # servers take it for the longest answer there may be
        merged.generation_config.max_new_tokens = max(limit, base.prompt.max_new_tokens)
    merged.to(dtype).save_pretrained(folder)
    write_processor(base, folder)
    base.prompt.save(folder)


def write_processor(base: Base, folder: Path) -> None:
    """Write the processor, with the run's bounds on images in it, in the layouts of new and older programs."""
    base.processor.save_pretrained(folder)
    # Older transformers, vLLM and llama.cpp read the image settings from this file.
    base.processor.image_processor.save_pretrained(folder)
    config = base.path if Path(base.path).is_dir() else cached_file(base.path, "config.json")
    place = Path(str(config)) if Path(str(config)).is_dir() else Path(str(config)).parent
    for name in _TOKENIZER_FILES:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
