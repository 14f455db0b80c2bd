"""A training that begins with a trained adapter: its weights are trained on, or merged into the base first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict

from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.errors import ModelError
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.distributed.collectives import agree
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.load import default_dtype, find_base, load_model, resolve_path
from vlm_sft.model.merged import write_merged
from vlm_sft.model.parts import ALL
from vlm_sft.model.saved_adapter import (
    BASE_WEIGHTS,
    adapter_sha256,
    check_adapter_folder,
    fit_problems,
    read_contents,
    require_fit,
)
from vlm_sft.planning.options import MERGE, TrainOptions
from vlm_sft.recipe.schema import Recipe

# What the recipe calls the settings of an adapter, and their values where a configuration does not say.
_SETTINGS = {"lora_r": ("r", 8), "lora_alpha": ("lora_alpha", 8), "use_rslora": ("use_rslora", False)}
_TOP, _END = "base_model.model.", ".lora_B.weight"  # of a tensor's name, around the path of its module
_SETTINGS |= {"use_dora": ("use_dora", False)}


def begin_second_stage(options: TrainOptions, recipe: Recipe) -> tuple[TrainOptions, dict[str, Any]]:
    """Check the adapter that a run begins with, and merge it where that is asked for; all ranks must call it.

    Returns:
        The options with the base that the run trains on, and what run.json says about its beginning.

    Raises:
        ModelError: the adapter is damaged, belongs to another base, or cannot be continued under this recipe.
    """
    assert options.adapter is not None
    place, digest = agree(lambda: _prepare(options, recipe))
    resolve_path(place)  # other machines may not see the folder
    facts = {"folder": str(options.adapter), "mode": options.adapter_mode, "sha256": digest}
    facts["base_model"] = options.base_model
    return replace(options, base_model=place), {"base_model": place, "starting_adapter": facts}


def _prepare(options: TrainOptions, recipe: Recipe) -> tuple[str, str]:
    """On rank 0: the base of the run, and the hash of the adapter."""
    assert options.adapter is not None
    config = check_adapter_folder(options.adapter)
    digest = adapter_sha256(options.adapter)
    if options.adapter_mode == MERGE:
        return str(_merge(options, recipe, digest)), digest
    _require_same_settings(options.adapter, config, recipe)
    prompt = PromptSettings.find(options.adapter)
    require_fit(options.adapter, find_base(options.base_model, bf16=recipe.bf16, prompt=prompt), None)
    say(f"second stage: training continues from {options.adapter}")
    return options.base_model, digest


def _merge(options: TrainOptions, recipe: Recipe, digest: str) -> Path:
    """Write the base with the adapter in it, in the run's number format, unless it is there; returns its folder."""
    assert options.adapter is not None
    folder = (options.output_dir / artifacts.MERGED_BASE).resolve()
    base = find_base(options.base_model, bf16=False, prompt=PromptSettings.find(options.adapter))
    dtype = default_dtype(recipe.bf16)
    origin = {
        "base_model": base.name,
        BASE_WEIGHTS: weights_fingerprint(base.path),
        "adapter_sha256": digest,
        "dtype": str(dtype).removeprefix("torch."),
    }
    record = folder / artifacts.ORIGIN
    if record.is_file() and artifacts.read_json(record) == origin:
        say(f"second stage: {folder} is {base.name} with {options.adapter} merged into it")
        return folder
    require_fit(options.adapter, base, None)
    say(f"second stage: {options.adapter} is merged into {base.name}: {folder}")
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_merged(load_adapter(load_model(base), options.adapter), base, partial, dtype)
        artifacts.write_json(partial / artifacts.ORIGIN, origin)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _require_same_settings(folder: Path, config: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse to go on with an adapter whose settings are not the recipe's.

    Raises:
        ModelError: each that differs, with the flags that make them the same.
    """
    other = "pass --adapter_mode merge to train new ones on top of it"
    if ALL in recipe.train:
        raise ModelError(f"--adapter {folder}: with --train all there is no adapter to continue from", other)
    differ = {}
    for name, (key, usual) in _SETTINGS.items():
        value = config.get(key, usual)
        if value != getattr(recipe, name):
            differ[name] = value
    if differ:
        found = ", ".join(f"{name} is {value} there and {getattr(recipe, name)} here" for name, value in differ.items())
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in differ.items())
        raise ModelError(
            f"--adapter {folder} cannot be continued under this recipe: {found}", f"pass {flags}; or {other}"
        )


def take_over(model: Any, folder: Path) -> None:
    """Put the weights of a saved adapter into a model that was made for training.

    Args:
        model: from `tune`, with an adapter of the same kind.
        folder: of the adapter; `begin_second_stage` has checked it.

    Raises:
        ModelError: it is on other modules, or of other ranks, or ZeRO-3 has partitioned the modules of the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_partitioned(*trained):
        raise ModelError(f"--adapter {folder}: ZeRO-3 has partitioned its modules already", "use --deepspeed zero2")
    config = check_adapter_folder(folder)
    contents = read_contents(folder, config)
    if problems := [*_places_differ(contents.layers, model), *_ranks_differ(config, model)]:
        raise ModelError(
            f"--adapter {folder} cannot be continued under this recipe: {'; '.join(problems)}",
            "train the same parts with the same --train, --target_modules and ranks, or pass --adapter_mode merge",
        )
    if problems := fit_problems(contents, model):
        raise ModelError(
            f"--adapter {folder} cannot be continued under this recipe: {'; '.join(problems)}",
            "train the same parts with the same --train, or pass --adapter_mode merge",
        )
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    assert all(parameter.requires_grad for parameter in trained), "an adapter in training stays trainable"


def _places_differ(layers: tuple[str, ...], model: Any) -> list[str]:
    """Which modules have LoRA on one side only, by their short names."""
    names = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = {name.removeprefix(_TOP).removesuffix(_END) for name in names if name.endswith(_END)}
    sides = {"in the adapter only": set(layers) - ours, "in the recipe only": ours - set(layers)}
    return [
        f"{len(paths)} modules have LoRA {side}: {', '.join(sorted({path.rpartition('.')[2] for path in paths}))}"
        for side, paths in sides.items()
        if paths
    ]


def _ranks_differ(config: Mapping[str, Any], model: Any) -> list[str]:
    """Which layers have other ranks or alphas of their own than the recipe gives them."""
    own = model.peft_config[model.active_adapter]
    return [
        f"its {name} is another"
        for name in ("rank_pattern", "alpha_pattern")
        if (config.get(name) or {}) != (getattr(own, name) or {})
    ]
