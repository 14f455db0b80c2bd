"""The files of an export: the number format of a merged model, and an adapter's copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from vlm_sft.common import artifacts
from vlm_sft.export.request import AUTO
from vlm_sft.export.source import Source
from vlm_sft.model.hub import model_config
from vlm_sft.model.load import Base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_dtype(name: str, base: Base) -> torch.dtype:
    """The number format of merged weights.

    Args:
        name: "float32", "bfloat16", or "auto" for bfloat16 where the base has 16 bits and float32 elsewhere.
        base: the base model.
    """
    if name != AUTO:
        return DTYPES[name]
    stored = model_config(base.path).dtype
    return torch.bfloat16 if stored in (torch.bfloat16, torch.float16) else torch.float32


def write_adapter(source: Source, folder: Path) -> None:
    """Copy an adapter and its prompt settings."""
    for name in (artifacts.ADAPTER_WEIGHTS, artifacts.ADAPTER_CONFIG):
        shutil.copyfile(source.adapter / name, folder / name)
    source.base.prompt.save(folder)
