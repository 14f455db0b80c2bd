"""Keyword arguments become the options that the command line's flags make, with the same names and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_sft.common.idle import given_names, refuse_idle
from vlm_sft.common.options import checked_options
from vlm_sft.data.engine_options import EngineOptions
from vlm_sft.model.saved_adapter import base_of_adapter
from vlm_sft.planning.options import IDLE, TrainOptions
from vlm_sft.recipe.schema import Recipe

Recipes = str | Path | Mapping[str, object] | Recipe | None
_NOT_KEYWORDS = {"output_dir", "overrides", "engine", "local_rank", "sft_config", "dataset"}
TRAIN_NAMES = {item.name for item in fields(TrainOptions)} - _NOT_KEYWORDS
ENGINE_NAMES = {item.name for item in fields(EngineOptions)}


def train_options(recipe: Recipes, dataset: str, output_dir: str | Path, keywords: Mapping[str, Any]) -> TrainOptions:
    """The options of a training.

    Args:
        recipe: the name of a recipe of the package, a file, a mapping of keys, or a `Recipe`; None for the defaults.
        dataset: as of `--dataset`.
        output_dir: folder of the run.
        keywords: recipe keys and options by name; a name that is neither is told as an unknown key of the recipe.

    Raises:
        RunError: an option has another kind of value than it takes, or would have no effect.
        ModelError: the base of `adapter` is not found.
    """
    keywords = {**keywords, **columns_text(keywords)}
    train = {name: value for name, value in keywords.items() if name in TRAIN_NAMES}
    engine = {name: value for name, value in keywords.items() if name in ENGINE_NAMES}
    keys = {name: value for name, value in keywords.items() if name not in TRAIN_NAMES | ENGINE_NAMES}
    given: Mapping[str, object] = {}
    if isinstance(recipe, Recipe):
        given = recipe.to_dict()
    elif isinstance(recipe, Mapping):
        given = recipe
    else:
        train["sft_config"] = recipe
    options = TrainOptions(output_dir=Path(output_dir), adapter=train.get("adapter"), resume=train.get("resume"))
    refuse_idle(options, IDLE, given_names(train))
    if train.get("adapter") is not None and train.get("base_model") is None:
        train["base_model"] = base_of_adapter(Path(train["adapter"]), None)
    return checked_options(
        TrainOptions,
        train,
        dataset=dataset,
        output_dir=Path(output_dir),
        overrides={**given, **keys},
        engine=checked_options(EngineOptions, engine),
    )


def columns_text(keywords: Mapping[str, Any]) -> dict[str, str]:
    """`columns` as the flag has it, where a mapping of our names to the data's was passed."""
    columns = keywords.get("columns")
    return (
        {"columns": ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())}
        if isinstance(columns, Mapping)
        else {}
    )
