"""What is exported: an adapter, its base, and the run that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.model.load import Base, find_base
from vlm_sft.model.saved_adapter import base_of_adapter


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter folder that was found.

    Attributes:
        adapter: the folder.
        base: its base model, in float32.
        config: adapter_config.json.
        run: the run's folder, which may hold results, recipe and data counts; the adapter's own or its parent.
    """

    adapter: Path
    base: Base
    config: dict[str, Any]
    run: Path


def find_source(adapter: Path, base_model: str | None) -> Source:
    """Find an adapter with its base and its run.

    Raises:
        ModelError: the adapter or the base cannot be found.
    """
    name = base_of_adapter(adapter, base_model)
    base = find_base(name, bf16=False, prompt=PromptSettings.find(adapter))
    in_run = adapter.name.startswith("checkpoint-") and not (adapter / artifacts.RUN).is_file()
    run = adapter.parent if in_run else adapter
    return Source(adapter, base, artifacts.read_json(adapter / artifacts.ADAPTER_CONFIG), run)
