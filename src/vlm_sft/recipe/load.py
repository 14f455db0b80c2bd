"""From a JSON or YAML file and the flags of the command line to a checked `Recipe`.

Three layers give the values: the defaults of the schema, the file, the command line. A later layer wins over
an earlier one, also where two keys set the same thing (warmup_steps and warmup_ratio); two different values in one
layer are a contradiction. Every mistake of all layers is collected and raised in one error.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import nearest
from vlm_sft.recipe.builtin import RECIPES, locate_recipe
from vlm_sft.recipe.parsing import check_value, parse_text, shown
from vlm_sft.recipe.reading import SUFFIXES, RecipeObject, parse_recipe
from vlm_sft.recipe.schema import FLOORED_SCHEDULERS, KEYS, Key, Recipe
from vlm_sft.recipe.validation import ALIASES, Mistake, find_contradictions, raise_mistakes, suggestion

COMMAND_LINE = "command line"
DECAY_KEYS = ("lr_decay_ratio", "lr_decay_type")
LORA_KEYS = ("lora_r", "lora_alpha")
TARGETS = ("lora_dropout", "target_modules")  # of LoRA on the language model alone
LORA_TRAINED = {"language", "vision_lora", "projector_lora"}
# What the classic pair means where only one of the two is given.
CLASSIC_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with notes for the user.

    Attributes:
        recipe: complete and checked.
        notes: one sentence for each name that was mapped and each value that another one replaced.
        flags: the keys that the command line gave.
    """

    recipe: Recipe
    notes: list[str]
    flags: frozenset[str] = frozenset()


@dataclass
class _Draft:
    """The values gathered from the layers, with their sources, mistakes and notes."""

    values: dict[str, Any] = field(default_factory=lambda: {key.name: key.default for key in KEYS.values()})
    sources: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rank(self, name: str) -> int:
        """The layer that gave the key: 0 for its default, 1 for a file, 2 for the command line."""
        return 0 if name not in self.sources else 2 if self.sources[name] == COMMAND_LINE else 1

    def replace(self, name: str, value: Any, reason: str) -> None:
        """Replace the value of a key in favour of another one; leaves a note where the user had given it."""
        if self.values[name] != value and self.rank(name):
            before = f"{name} {shown(self.values[name])} ({self.sources[name]})"
            self.notes.append(f"{before} becomes {shown(value)}: {reason}")
        self.values[name] = value


def load_recipe(path: str | Path | None, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Read a recipe; `read_recipe` without its notes.

    Args:
        path: a flat JSON (comments allowed) or YAML file, or the name of a recipe of the package, e.g. "best"; None
            takes the defaults.
        overrides: values that win over the file's, by key; texts are parsed as the flags' are.

    Returns:
        The complete, checked recipe.

    Raises:
        RecipeError: lists every mistake of the file and the overrides.
    """
    return read_recipe(path, overrides).recipe


def read_recipe(path: str | Path | None, overrides: Mapping[str, object] | None = None) -> LoadedRecipe:
    """Read a recipe, with the notes about mapped names and replaced values; arguments as for `load_recipe`.

    Raises:
        RecipeError: lists every mistake of the file and the overrides.
    """
    draft = _Draft()
    if path is not None:
        path = locate_recipe(path)
        _add_layer(draft, _read_object(path, draft.mistakes), str(path))
    _add_layer(draft, overrides or {}, COMMAND_LINE)
    return _finish(draft)


def _finish(draft: _Draft) -> LoadedRecipe:
    _settle_warmup(draft)
    _settle_best(draft)
    _settle_batch(draft)
    _note_idle(draft)
    draft.mistakes += find_contradictions(draft.values, draft.sources, draft.broken)
    raise_mistakes(draft.mistakes)
    flags = frozenset(name for name in draft.sources if draft.rank(name) == 2)
    return LoadedRecipe(Recipe(**draft.values), draft.notes, flags)


def _read_object(path: Path, mistakes: list[Mistake]) -> Mapping[str, object]:
    """The object in a file; an empty one, with the mistake noted, where there is none."""

    def failed(problem: str, remedy: str) -> Mapping[str, object]:
        mistakes.append(Mistake(str(path), "", problem, remedy))
        return {}

    try:
        value = parse_recipe(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        return failed("the file does not exist", _recipe_meant(path))
    except OSError as error:
        return failed(f"cannot be read ({error.strerror})", "give a file that you may read")
    except UnicodeDecodeError as error:
        return failed(f"not UTF-8 text (byte {error.start})", "save it as UTF-8")
    except ValueError as error:
        if str(error).startswith("not "):
            return failed(str(error), "correct it there")
        return failed(f"not a recipe ({error})", "give a flat object of keys and short values")
    except RecursionError as error:
        return failed(f"not a recipe ({error})", "give a flat object of keys and short values")
    if not isinstance(value, RecipeObject):
        return failed(f"holds {shown(value)}, not an object", 'a recipe is {"key": value, …}')
    for name, given in value.repeated.items():
        problem = f"given {len(given)} times"
        mistakes.append(Mistake(str(path), f"{name} = {' and '.join(map(shown, given))}", problem, "keep one of them"))
    return value


def _choice_meant(key: Key, value: object) -> str:
    """The choice nearest to a wrong value, as the end of a message."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    wrong = (name.strip() for name in names if isinstance(name, str) and name.strip() not in key.choices)
    return nearest(next(wrong, ""), key.choices)


def _recipe_meant(path: Path) -> str:
    """The recipe of the package, or the file nearby, that a missing path may have meant."""
    stems = {stem: name for stem, name in RECIPES.items()} | {name: name for name in RECIPES.values()}
    beside = {file.name: str(file) for file in sorted(path.parent.glob("*")) if file.suffix in SUFFIXES}
    known = beside if path.suffix else stems  # a name without an ending is one of the package
    meant = stems.get(path.stem) or known.get(nearest(path.name, known, "{}"))
    names = f"name a recipe of the package: {', '.join(RECIPES.values())}"
    return f"did you mean {meant}? or {names}" if meant else f"check its path, or {names}"


def _add_layer(draft: _Draft, layer: Mapping[str, object], where: str) -> None:
    """Check the values of one layer and put them over those of the earlier ones."""
    names: dict[str, str] = {}
    dashes = "--" if where == COMMAND_LINE else ""
    for given, value in layer.items():
        name = ALIASES.get(given, given)
        label = f"{dashes}{given} = {shown(value)}"
        if name not in KEYS:
            draft.mistakes.append(Mistake(where, label, "unknown key", suggestion(given)))
            continue
        key = KEYS[name]
        if name in names:
            problem = f"is {name}, which {names[name]} gives too"
            draft.mistakes.append(Mistake(where, label, problem, "keep one of them"))
        elif name != given:
            draft.notes.append(f"{given} ({where}) is read as {name}")
        names[name] = given
        if where == COMMAND_LINE and isinstance(value, str):
            value = parse_text(key, value)
        checked, problem = check_value(key, value)
        if problem:
            draft.mistakes.append(Mistake(where, label, problem, f"allowed: {key.allowed}{_choice_meant(key, value)}"))
            draft.broken.add(name)
        else:
            draft.values[name] = checked
            draft.sources[name] = where


def _settle_warmup(draft: _Draft) -> None:
    """Keep one length of the warmup: that of the later layer, none for the constant schedule."""
    values = draft.values
    if values["warmup_ratio"] and values["warmup_steps"]:
        if draft.rank("warmup_steps") > draft.rank("warmup_ratio"):
            draft.replace("warmup_ratio", 0.0, "warmup_steps is given")
        elif draft.rank("warmup_steps") < draft.rank("warmup_ratio"):
            draft.replace("warmup_steps", 0, "warmup_ratio is given")
    if values["lr_scheduler_type"] == "constant":
        for name, nothing in (("warmup_ratio", 0.0), ("warmup_steps", 0)):
            if draft.rank(name) < draft.rank("lr_scheduler_type"):
                draft.replace(name, nothing, "the constant schedule has no warmup")


def _settle_best(draft: _Draft) -> None:
    """With load_best_model_at_end, align evaluations and checkpoints that were not both given by one layer."""
    values = draft.values
    if not values["load_best_model_at_end"]:
        return
    for evaluate, save in (("eval_strategy", "save_strategy"), ("eval_steps", "save_steps")):
        if evaluate == "eval_steps" and not values["eval_strategy"] == values["save_strategy"] == "steps":
            return
        leader, follower = (evaluate, save) if draft.rank(evaluate) >= draft.rank(save) else (save, evaluate)
        same_layer = draft.rank(leader) == draft.rank(follower) > 0
        if not same_layer and "no" not in (values[leader], values[follower]):
            draft.replace(follower, values[leader], f"load_best_model_at_end needs it equal to {leader}")


def _settle_batch(draft: _Draft) -> None:
    """Keep either the global batch size or the classic pair, unless one layer gave all three."""
    values = draft.values
    pair = [name for name in CLASSIC_BATCH if values[name] is not None]
    target = draft.rank("global_batch_size")
    if not pair:
        return
    if len(pair) == 1 and (target == 0 or values["global_batch_size"] is None):
        (missing,) = CLASSIC_BATCH.keys() - set(pair)
        values[missing] = CLASSIC_BATCH[missing]
        draft.notes.append(f"{missing} is {values[missing]}, because {pair[0]} is given without a global_batch_size")
        pair.append(missing)
    if len(pair) == 2:
        if max(map(draft.rank, pair)) > target:
            draft.replace("global_batch_size", None, f"{' x '.join(pair)} x devices is given")
        elif max(map(draft.rank, pair)) < target and values["global_batch_size"] is not None:
            draft.replace("gradient_accumulation_steps", None, "global_batch_size is given")


def _note_idle(draft: _Draft) -> None:
    """Note which flags of the command line have no effect beside the other values.

    They are not refused: `vlm-sft verify` changes a launch line by appending flags to it.
    """
    values, scheduler = draft.values, draft.values["lr_scheduler_type"]
    for names, idle, reason in (
        (("eval_steps",), values["eval_strategy"] != "steps", f"eval_strategy is {values['eval_strategy']}"),
        (("save_steps",), values["save_strategy"] != "steps", f"save_strategy is {values['save_strategy']}"),
        (("save_total_limit",), values["save_strategy"] == "no", "save_strategy is no"),
        (("early_stopping_threshold",), values["early_stopping_patience"] is None, "early_stopping_patience is null"),
        (("min_lr_ratio",), scheduler not in FLOORED_SCHEDULERS, f"lr_scheduler_type is {scheduler}"),
        (DECAY_KEYS, scheduler != "warmup_stable_decay", f"lr_scheduler_type is {scheduler}"),
        (TARGETS, "language" not in values["train"], "train does not name language, whose layers these are"),
        (LORA_KEYS, not LORA_TRAINED & set(values["train"]), "train names nothing that gets LoRA"),
    ):
        draft.notes += [
            f"{name} ({COMMAND_LINE}) has no effect: {reason}"
            for name in names
            if idle and draft.rank(name) == 2 and name not in draft.broken
        ]


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for every key of the recipe.

    The flags hold texts that `read_recipe` checks with the same rules as a file's values; a flag that is not given
    leaves nothing in the namespace.

    Args:
        parser: must not have flags of these names of its own.
    """
    for key in KEYS.values():
        unit = f" [{key.unit}]" if key.unit else ""
        text = f"{key.help}{unit} (default: {key.default_text})".replace("%", "%%")
        # A switch without a value means true, as the flags of the classic trainers do.
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if key.kind in ("switch", "auto switch") else {}
        parser.add_argument(key.flag, default=argparse.SUPPRESS, metavar=key.metavar, help=text, **bare)


def overrides_from(args: argparse.Namespace) -> dict[str, object]:
    """The recipe keys that were given as flags, for `load_recipe` or `read_recipe`."""
    return {name: value for name, value in vars(args).items() if name in KEYS}
