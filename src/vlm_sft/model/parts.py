"""The parts of a model that can be trained in full: projector, vision tower, everything. Imports features and families.

What is trained in full is a copy beside the frozen original (PEFT's `modules_to_save`), so an adapter can still be
switched off, and it is saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from vlm_sft.errors import ModelError
from vlm_sft.model.families import family_of
from vlm_sft.model.features import tower_modules, unwrap

LANGUAGE, PROJECTOR, VISION, ALL = "language", "projector", "vision", "all"


def saved_modules(model: Any, train: Sequence[str]) -> tuple[str, ...]:
    """The modules that are trained in full beside or instead of LoRA.

    Args:
        model: the base model.
        train: the recipe's `train`: any of "language", "projector" and "vision".

    Returns:
        Full module paths, for PEFT's `modules_to_save`; () where neither projector nor tower is trained.

    Raises:
        ModelError: the family's projector or tower is not where it should be.
    """
    if not {PROJECTOR, VISION} & set(train):
        return ()
    base = unwrap(model)
    inner = _path_of(base, base.model)
    modules = dict(base.named_modules())
    projector = {f"{inner}.{path}" for path in family_of(base.config).projector}
    if not projector <= set(modules):
        raise ModelError(
            f"--train {','.join(train)}: {base.config.model_type} has no {', '.join(sorted(projector - set(modules)))}",
            "where the projector of this family is, is not known: train language or all",
        )
    found: list[str] = []
    if PROJECTOR in train:
        found += [part for path in sorted(projector) for part in _wrappable(path, modules[path], ())]
    if VISION in train:
        towers = {f"{inner}.{name}": module for name, module in tower_modules(base).items()}
        found += [
            part
            for path, module in towers.items()
            if path not in projector
            for part in _wrappable(path, module, projector)
        ]
    return tuple(found)


def _path_of(base: Any, wanted: torch.nn.Module) -> str:
    return next(path for path, module in base.named_modules() if module is wanted)


def _wrappable(path: str, module: torch.nn.Module, without: Collection[str]) -> Iterator[str]:
    """The largest modules below a path that hold weights, can be wrapped, and hold nothing of `without`."""
    if path in without or not any(True for _ in module.parameters()):
        return
    # A list has no forward pass, so PEFT wraps its members.
    listed = isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
    if listed or any(other.startswith(path + ".") for other in without):
        for name, child in module.named_children():
            yield from _wrappable(f"{path}.{name}", child, without)
    else:
        yield path


def train_everything(model: Any, master: bool) -> None:
    """Make every weight trainable.

    Args:
        model: the base model.
        master: hold the weights in float32: in bfloat16 the small updates of an optimizer are rounded away. False where
            DeepSpeed does so itself.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if master:
        widen(model)


def widen(model: torch.nn.Module) -> None:
    """Hold the trained weights in float32; computing goes on in the model's own format, under autocast."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
