"""The tensors of an adapter against what loaders read: PEFT by module path, vLLM by its own rules. Imports model.

A loader that finds no layer of a tensor's name passes it over, and the adapter then does less than it should, or
nothing, without a word (vLLM issue 34186). So every name is checked here.

vLLM's rules, from its `lora` package and the `hf_to_vllm_mapper` of its models: names are
`base_model.model.<path>.lora_A.weight` and `lora_B`, the path is that of transformers since 4.52
(`model.language_model.…` in the Qwen-VL, LLaVA and Gemma families, `model.text_model.…` in Idefics3), adapters work on
the language model only, and neither DoRA nor fully trained modules nor biases are taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_sft.artifacts import ADAPTER_WEIGHTS
from vlm_sft.errors import ModelError
from vlm_sft.model.adapt import language_model_path
from vlm_sft.model.load import Base

_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_magnitude_vector")
_ROOTS = ("model.language_model", "model.text_model")  # language models that vLLM's mappers know
LARGEST_RANK = 512  # that vLLM's max_lora_rank takes


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in an adapter's tensors.

    Attributes:
        broken: why a part of it would be passed over by every loader, one sentence each.
        not_for_vllm: why vLLM would refuse it or pass a part over.
        modules: how many layers it adapts.
        dead: how many of them have an update of zero.
        silent: nothing in the adapter differs from its base.
    """

    broken: tuple[str, ...]
    not_for_vllm: tuple[str, ...]
    modules: int
    dead: int
    silent: bool


def empty_model(base: Base) -> Any:
    """The base's architecture without weights."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def inspect_adapter(folder: Path, config: Mapping[str, Any], model: Any) -> Findings:
    """Check the tensors of an adapter.

    Args:
        folder: holds adapter_model.safetensors.
        config: its adapter_config.json.
        model: the base's architecture, from `empty_model`.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises its own error, outside of Python's hierarchy
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}", "train or copy it again") from error
    saved = list(config.get("modules_to_save") or ())
    sides: dict[str, set[str]] = {}
    dead = set()
    other = []
    for name, value in tensors.items():
        match = _LORA.fullmatch(name)
        if match:
            sides.setdefault(match["path"], set()).add(match["side"])
            if match["side"] == "B" and not value.any():
                dead.add(match["path"])
        elif not _MAGNITUDE.fullmatch(name) and not _is_saved(name, saved):
            other.append(name)
    linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    broken = _broken(other, sides, linear)
    silent = not saved and not config.get("use_dora") and len(dead) == len(sides)
    return Findings(broken, _not_for_vllm(config, saved, sides, model), len(sides), len(dead), silent)


def _is_saved(name: str, saved: list[str]) -> bool:
    """Whether a tensor belongs to a module that was trained in full."""
    return any(name.startswith(f"base_model.model.{path}.") for path in saved)


def _broken(other: list[str], sides: Mapping[str, set[str]], linear: set[str]) -> tuple[str, ...]:
    problems = []
    if other:
        problems.append(f"{len(other)} tensors that no loader of adapters reads, e.g. {other[0]}")
    unknown = sorted(set(sides) - linear)
    if unknown:
        problems.append(f"{len(unknown)} layers that the base does not have, e.g. {unknown[0]}")
    half = sorted(path for path, found in sides.items() if len(found) < 2)
    if half:
        problems.append(f"{len(half)} layers with one of their two matrices only, e.g. {half[0]}")
    return tuple(problems)


def _not_for_vllm(
    config: Mapping[str, Any], saved: list[str], sides: Mapping[str, set[str]], model: Any
) -> tuple[str, ...]:
    problems = []
    if saved:
        problems.append(f"vLLM loads no fully trained modules ({len(saved)}, e.g. {saved[0]})")
    if config.get("use_dora"):
        problems.append("vLLM has no DoRA")
    if config.get("bias", "none") != "none":
        problems.append("vLLM takes no biases in an adapter")
    rank = max([int(config.get("r", 0)), *(config.get("rank_pattern") or {}).values()])
    if rank > LARGEST_RANK:
        problems.append(f"rank {rank} is above vLLM's largest, {LARGEST_RANK}")
    root = language_model_path(model)
    if root not in _ROOTS:
        problems.append(f"vLLM's names for the language model {root} are not known here")
    outside = sorted(path for path in sides if not path.startswith(root + "."))
    if outside:
        problems.append(f"vLLM adapts the language model only, not {len(outside)} layers such as {outside[0]}")
    return tuple(problems)
