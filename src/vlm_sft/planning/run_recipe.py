"""The recipe of one run: the file and the flags, with targets of LoRA that suit the base model."""

from __future__ import annotations

from dataclasses import replace

from vlm_sft.common.errors import ModelError
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.model.default_targets import default_targets
from vlm_sft.model.hub import model_config
from vlm_sft.model.load import resolve_path
from vlm_sft.model.parts import LANGUAGE
from vlm_sft.planning.options import TrainOptions
from vlm_sft.recipe.load import LoadedRecipe, read_recipe
from vlm_sft.recipe.schema import KEYS


def read_run_recipe(options: TrainOptions) -> LoadedRecipe:
    """Read the recipe of a run.

    The recipes' own `target_modules` are the names that most language models have. Where the command line gives none
    and the file has these, the base's own are taken, once for all that reads the recipe: training, forecast, identity
    of checkpoints, run.json.

    Args:
        options: the command line of the run.

    Raises:
        RecipeError: lists every mistake of the file and the flags.
        DataError: lists every mistake of the names of data sets.
    """
    loaded = read_recipe(options.sft_config, options.overrides)
    if options.dataset:
        parse_datasets(
            options.dataset, options.columns
        )  # a slip in its names is told before the Hub is asked for a configuration
    key, recipe = KEYS["target_modules"], loaded.recipe
    if key.name in loaded.flags or recipe.target_modules != key.default or LANGUAGE not in recipe.train:
        return loaded
    try:
        config = model_config(resolve_path(options.base_model), options.base_model)
    except ModelError:  # whatever keeps it from being opened is told when the base is looked for
        return loaded
    targets = default_targets(config)
    if targets == key.default:
        return loaded
    note = (
        f"LoRA on {', '.join(targets)}: the layers of {config.get_text_config().model_type} that mix tokens have these "
        f"projections ({key.flag} names others)"
    )
    return LoadedRecipe(replace(recipe, target_modules=targets), [*loaded.notes, note], loaded.flags)
