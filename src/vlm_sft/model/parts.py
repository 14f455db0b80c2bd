"""The parts of a model that can be trained: where they are, and what of them gets LoRA or is trained in full."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from vlm_sft.common.errors import ModelError
from vlm_sft.model.families import family_of
from vlm_sft.model.protocols import AnyModel, VisionLanguageModel
from vlm_sft.model.vision_features import inner_model, tower_modules, unwrap
from vlm_sft.recipe.schema import Recipe

LANGUAGE, PROJECTOR, VISION, ALL = "language", "projector", "vision", "all"
VISION_LORA, PROJECTOR_LORA = "vision_lora", "projector_lora"
WHOLE_PARTS = (PROJECTOR, VISION)
LORA_PARTS = {VISION_LORA: "vision tower", PROJECTOR_LORA: "projector"}


@dataclass(frozen=True, slots=True)
class PartLora:
    """LoRA on one part beside the language model.

    Attributes:
        name: as in the recipe's `train`.
        paths: full paths of its linear modules, all of which have LoRA.
        r: its rank.
    """

    name: str
    paths: tuple[str, ...]
    r: int


def part_loras(model: VisionLanguageModel, recipe: Recipe) -> tuple[PartLora, ...]:
    """LoRA on vision tower and projector, as a recipe asks for it.

    Args:
        model: the base model.
        recipe: its `train` and ranks.

    Raises:
        ModelError: the part is not where it should be, or has no linear module.
    """
    ranks = {VISION_LORA: recipe.vision_lora_rank, PROJECTOR_LORA: recipe.projector_lora_rank}
    found = []
    for name, rank in ranks.items():
        if name in recipe.train:
            paths = part_linears(model, name)
            if not paths:
                raise ModelError(
                    f"--train {','.join(recipe.train)}: the {LORA_PARTS[name]} of {unwrap(model).config.model_type} "
                    "has no linear module that LoRA could be on",
                    f"train it in full: {name.removesuffix('_lora')}",
                )
            found.append(PartLora(name, paths, rank or recipe.lora_r))
    return tuple(found)


def part_linears(model: VisionLanguageModel, name: str) -> tuple[str, ...]:
    """Full paths of the linear modules of one part, in the order of the model.

    The output projection of PyTorch's own attention module is not among them: that module multiplies by its weight
    itself, past any LoRA.

    Args:
        model: the base model.
        name: "vision_lora" or "projector_lora".

    Raises:
        ModelError: the projector is not where it should be.
    """
    modules = dict(unwrap(model).named_modules())
    projector, towers = _places(model, (name,))
    roots = projector if name == PROJECTOR_LORA else towers
    without = () if name == PROJECTOR_LORA else tuple(projector)
    found = []
    for path in linear_paths(modules, ""):
        parent = modules[path.rpartition(".")[0]]
        if _is_below(path, roots) and not _is_below(path, without):
            found += [] if isinstance(parent, torch.nn.MultiheadAttention) else [path]
    return tuple(found)


def _is_below(path: str, roots: Collection[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def part_parameters(model: AnyModel) -> dict[int, str]:
    """Which weights belong to the projector and which to the tower: `id` of each to "projector" or "vision".

    Args:
        model: with or without an adapter; weights of neither part are left out.

    Raises:
        ModelError: the projector is not where it should be.
    """
    base = unwrap(model)
    modules = dict(base.named_modules())
    projector, towers = _places(base, (PROJECTOR, VISION))
    found: dict[int, str] = {}
    for name, paths in ((VISION, towers), (PROJECTOR, projector)):  # a projector inside the tower is a projector
        found |= {id(parameter): name for path in paths for parameter in modules[path].parameters()}
    return found


def saved_modules(model: VisionLanguageModel, train: Sequence[str]) -> tuple[str, ...]:
    """The modules that are trained in full beside or instead of LoRA.

    Args:
        model: the base model.
        train: the recipe's `train`; "projector" and "vision" are looked at.

    Returns:
        Full module paths, for PEFT's `modules_to_save`; () where neither projector nor tower is trained in full.

    Raises:
        ModelError: the family's projector or tower is not where it should be.
    """
    if not set(WHOLE_PARTS) & set(train):
        return ()
    modules = dict(unwrap(model).named_modules())
    projector, towers = _places(model, train)
    found: list[str] = []
    if PROJECTOR in train:
        found += [part for path in projector for part in _wrappable(path, modules[path], ())]
    if VISION in train:
        found += [
            part for path in towers if path not in projector for part in _wrappable(path, modules[path], projector)
        ]
    return tuple(found)


def _places(model: VisionLanguageModel, train: Sequence[str]) -> tuple[list[str], list[str]]:
    """Full paths of a family's projector, and of all that turns pixels into embeddings, the projector included.

    Raises:
        ModelError: the projector is not where it should be.
    """
    base = unwrap(model)
    inner = next(path for path, module in base.named_modules() if module is inner_model(base))
    root = f"{inner}." if inner else ""
    projector = {f"{root}{path}" for path in family_of(base.config).projector}
    if lost := projector - {path for path, _ in base.named_modules()}:
        raise ModelError(
            f"--train {','.join(train)}: {base.config.model_type} has no {', '.join(sorted(lost))}",
            "where the projector of this family is, is not known: train language or all",
        )
    # No picture goes through what hears (Gemma 3n and 4).
    return sorted(projector), [f"{root}{name}" for name in tower_modules(base) if "audio" not in name]


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


def linear_paths(modules: Mapping[str, torch.nn.Module], root: str) -> dict[str, str]:
    """The linear modules below a path, each with the path of the module that carries its name.

    The two differ where a class of the family's own wraps a single linear module, e.g. to clip what goes in.

    Args:
        modules: the model's, by their paths.
        root: a path with its last dot.
    """
    linear = [path for path, module in modules.items() if isinstance(module, torch.nn.Linear) and path.startswith(root)]
    carriers = {}
    for path in linear:
        parent = path.rpartition(".")[0]
        wrapped = path.endswith(".linear") and len(list(modules[parent].children())) == 1
        carriers[path] = parent if wrapped else path
    return carriers
