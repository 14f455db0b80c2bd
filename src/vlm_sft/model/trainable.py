"""From loaded weights to a model in training: an adapter, fully trained parts, or all weights.

Also how such a model is saved, and how it answers as if it had not been trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm_sft.common import artifacts
from vlm_sft.common.errors import ModelError
from vlm_sft.model.adapters import Targets, add_lora, no_targets, parameter_counts, resolve_targets
from vlm_sft.model.families import family_of
from vlm_sft.model.load import Base, load_model
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.vision_features import inner_model, tower_modules, unwrap
from vlm_sft.recipe.schema import Recipe


def tune(weights: Any, recipe: Recipe, base_name: str, master: bool) -> tuple[Any, dict[str, Any]]:
    """Make what the recipe's `train` names trainable, and nothing else.

    Args:
        weights: the loaded base model.
        recipe: says what is trained.
        base_name: written into an adapter's config.
        master: hold what is trained in float32; False where DeepSpeed keeps such a copy itself.

    Returns:
        The model, a `PeftModel` unless all weights are trained, and what run.json says under "lora".

    Raises:
        ModelError: modules that the recipe names are not there.
    """
    facts: dict[str, Any] = {"train": list(recipe.train)}
    if ALL in recipe.train:
        train_everything(weights, master)
        model = weights
    else:
        targets = resolve_targets(weights, recipe.target_modules) if LANGUAGE in recipe.train else no_targets()
        targets = replace(targets, saved=saved_modules(weights, recipe.train))
        model = _with_adapter(weights, targets, recipe, base_name)
        if master:
            widen(model)
        facts |= _facts(targets, recipe)
    trainable, total = parameter_counts(model)
    return model, facts | {"trainable_parameters": trainable, "total_parameters": total}


def checkpoint_layers(model: Any) -> None:
    """Compute the activations of each decoder layer again in the backward pass instead of keeping them.

    With it transformers makes the outputs of all input embeddings need a gradient, those of patches too: a frozen
    vision tower would keep its activations and get a backward pass. With `use_reentrant=False` nothing needs that.

    Args:
        model: from `tune`.

    Raises:
        ModelError: the family has no such thing.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"--gradient_checkpointing true: {error}",
            "leave it out, or pass a smaller --tokens_per_pack to save memory",
        ) from error
    model.disable_input_require_grads()


def _with_adapter(weights: Any, targets: Targets, recipe: Recipe, base_name: str) -> PeftModel:
    return add_lora(
        weights,
        targets,
        r=recipe.lora_r,
        alpha=recipe.lora_alpha,
        dropout=recipe.lora_dropout,
        seed=recipe.seed,
        base_name=base_name,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
    )


def _facts(targets: Targets, recipe: Recipe) -> dict[str, Any]:
    """What run.json says about an adapter."""
    lora: dict[str, Any] = {}
    if targets.paths:
        lora = {
            "r": recipe.lora_r,
            "alpha": recipe.lora_alpha,
            "dropout": recipe.lora_dropout,
            "target_modules": list(recipe.target_modules),
            "matched_modules": len(targets.paths),
            "modules": list(targets.paths),
            "by_name": targets.by_name,
            "use_rslora": recipe.use_rslora,
            "use_dora": recipe.use_dora,
            "load_in_4bit": recipe.load_in_4bit,
        }
    return lora | ({"saved_modules": list(targets.saved)} if targets.saved else {})


def described(facts: dict[str, Any]) -> str:
    """One line that says what is trained.

    Args:
        facts: from `tune`.
    """
    parts = []
    if "modules" in facts:
        kind = "DoRA" if facts["use_dora"] else "rsLoRA" if facts["use_rslora"] else "LoRA"
        names = ", ".join(f"{name} x {count}" for name, count in facts["by_name"].items())
        parts.append(f"{kind}: {facts['matched_modules']} modules ({names})")
    if "saved_modules" in facts:
        trained = " and ".join(part for part in facts["train"] if part != LANGUAGE)
        parts.append(f"in full: {trained} ({len(facts['saved_modules'])} modules)")
    if ALL in facts["train"]:
        parts.append("in full: all weights")
    counts = f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters are trained"
    return "; ".join([*parts, counts])


def save_tuned(model: Any, folder: Path, base: Base | None, state_dict: dict[str, Any] | None) -> None:
    """Save what was trained: an adapter, or a whole model that opens with plain transformers.

    Args:
        model: the unwrapped model.
        folder: made when missing. The weights of a checkpoint keep the number format and the names that the training
            goes on with; elsewhere they get those of the base.
        base: where the processor and the number format of a whole model come from; an adapter needs neither.
        state_dict: weights gathered from several devices; None for the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # Without the flag PEFT asks the Hub for the base's config, to learn whether the vocabulary grew.
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        return
    assert base is not None, "a whole model is saved with the processor of its base"
    if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
    else:
        weights = model.state_dict() if state_dict is None else state_dict
        model.save_pretrained(folder, state_dict=in_format(weights, base.dtype))
        config = artifacts.read_json(folder / "config.json")
        artifacts.write_json(folder / "config.json", config | {"dtype": base.dtype_name})
    base.processor.save_pretrained(folder)


@contextmanager
def untuned(model: Any, base: Base) -> Iterator[Any]:
    """The model as it was before the training: its adapter switched off, or the base loaded again."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    else:
        yield load_model(base, str(next(model.parameters()).device))


def in_format(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same tensors with floating-point values in one number format."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}


LANGUAGE, PROJECTOR, VISION, ALL = "language", "projector", "vision", "all"


def saved_modules(model: VisionLanguageModel, train: Sequence[str]) -> tuple[str, ...]:
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
    inner = _path_of(base, inner_model(base))
    root = f"{inner}." if inner else ""
    modules = dict(base.named_modules())
    projector = {f"{root}{path}" for path in family_of(base.config).projector}
    if not projector <= set(modules):
        raise ModelError(
            f"--train {','.join(train)}: {base.config.model_type} has no {', '.join(sorted(projector - set(modules)))}",
            "where the projector of this family is, is not known: train language or all",
        )
    found: list[str] = []
    if PROJECTOR in train:
        found += [part for path in sorted(projector) for part in _wrappable(path, modules[path], ())]
    if VISION in train:
        # No picture goes through what hears (Gemma 3n and 4).
        seeing = {name: module for name, module in tower_modules(base).items() if "audio" not in name}
        towers = {f"{root}{name}": module for name, module in seeing.items()}
        found += [
            part
            for path, module in towers.items()
            if path not in projector
            for part in _wrappable(path, module, projector)
        ]
    return tuple(found)


def _path_of(base: VisionLanguageModel, wanted: object) -> str:
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


def train_everything(model: torch.nn.Module, master: bool) -> None:
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
