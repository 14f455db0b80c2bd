"""From loaded weights to a model in training: an adapter, fully trained parts, or all weights.

Also how such a model is saved, and how it answers as if it had not been trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlm_sft.common import artifacts
from vlm_sft.common.errors import ModelError
from vlm_sft.distributed.fsdp import is_divided
from vlm_sft.model.adapters import Targets, add_lora, no_targets, parameter_counts, resolve_targets
from vlm_sft.model.load import Base, load_model
from vlm_sft.model.parts import ALL, LANGUAGE, LORA_PARTS, WHOLE_PARTS, part_loras, saved_modules
from vlm_sft.model.sharded import load_divided
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
        facts |= _rates(recipe)
    else:
        targets = resolve_targets(weights, recipe.target_modules) if LANGUAGE in recipe.train else no_targets()
        loras = part_loras(weights, recipe)
        targets = replace(targets, saved=saved_modules(weights, recipe.train), parts=loras)
        model = _with_adapter(weights, targets, recipe, base_name)
        if master:
            widen(model)
        facts |= _facts(targets, recipe) | _rates(recipe)
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
    if targets.paths or targets.parts:
        lora = {
            "r": recipe.lora_r,
            "alpha": recipe.lora_alpha,
            "dropout": recipe.lora_dropout,
            "target_modules": list(recipe.target_modules) if targets.paths else [],
            "matched_modules": len(targets.paths),
            "modules": list(targets.paths),
            "by_name": targets.by_name,
            "use_rslora": recipe.use_rslora,
            "use_dora": recipe.use_dora,
            "load_in_4bit": recipe.load_in_4bit,
        }
    if targets.parts:
        lora["parts"] = {
            part.name: {"r": part.r, "matched_modules": len(part.paths), "modules": list(part.paths)}
            for part in targets.parts
        }
    return lora | ({"saved_modules": list(targets.saved)} if targets.saved else {})


def _rates(recipe: Recipe) -> dict[str, Any]:
    """The learning rates of parts that have their own, for run.json."""
    given = {"vision": recipe.vision_learning_rate, "projector": recipe.projector_learning_rate}
    rates = {part: rate for part, rate in given.items() if rate is not None}
    return {"learning_rates": rates} if rates else {}


def described(facts: dict[str, Any]) -> str:
    """One line that says what is trained.

    Args:
        facts: from `tune`.
    """
    parts = []
    if "modules" in facts:
        kind = "DoRA" if facts["use_dora"] else "rsLoRA" if facts["use_rslora"] else "LoRA"
        names = ", ".join(f"{name} x {count}" for name, count in facts["by_name"].items())
        if facts["matched_modules"]:
            parts.append(f"{kind}: {facts['matched_modules']} modules ({names})")
        for name, part in facts.get("parts", {}).items():
            where = f"{kind} of rank {part['r']} on the {LORA_PARTS[name]}"
            parts.append(f"{where}: {part['matched_modules']} modules{', without dropout' if facts['dropout'] else ''}")
    if "saved_modules" in facts:
        trained = " and ".join(part for part in facts["train"] if part in WHOLE_PARTS)
        parts.append(f"in full: {trained} ({len(facts['saved_modules'])} modules)")
    if ALL in facts["train"]:
        parts.append("in full: all weights")
    parts += [f"learning rate of the {part}: {rate:g}" for part, rate in facts.get("learning_rates", {}).items()]
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
        device = str(next(model.parameters()).device)
        yield load_divided(base, None, device) if is_divided(model) else load_model(base, device)


def in_format(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same tensors with floating-point values in one number format."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}


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
