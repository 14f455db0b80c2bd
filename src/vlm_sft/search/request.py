"""What a sweep is asked for: settings of a grid or ranges to search, seeds, and when a trial is stopped early."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from vlm_sft.common.errors import RecipeError, RunError, nearest, quoted
from vlm_sft.common.idle import Idle
from vlm_sft.common.options import option
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.planning.options import TrainOptions, flag_text
from vlm_sft.recipe.load import read_recipe
from vlm_sft.recipe.schema import KEYS
from vlm_sft.recipe.validation import ALIASES

GRID, OPTUNA = "grid", "optuna"
MEDIAN, NONE = "median", "none"
DATASET = "dataset"
FIXED = {"seed": "--seeds repeats every setting", "metric_for_best_model": "--metric names what is compared"}
# What a sweep decides for its trials; a flag of one of these would be overruled.
DECIDED = ("metric_for_best_model", "resume", "overwrite", "allow_changes", "probe")
IDLE = (
    Idle(
        (*DECIDED, "overwrite_output_dir"),
        lambda o: True,
        "here",
        "leave it out: the sweep decides it for its trials; --metric names the metric",
    ),
)
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_NAME_CHARACTERS = 48  # of one value in the name of a folder


def duration_seconds(text: str) -> float:
    """Read `--budget`: a number with its unit, e.g. "90min" or "4h".

    Raises:
        RunError: it is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if match is None or not float(match[1]):
        raise RunError(f"--budget {quoted(text)} is no duration", "pass a number and s, min, h or d, e.g. 4h")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class SweepOptions:
    """The command line of a sweep.

    Attributes:
        train: what every trial shares; its `output_dir` is the folder of the sweep.
        grid: texts of the values of each key.
        ranges: texts LOW:HIGH or LOW:HIGH:log of each key, for a search.
    """

    train: TrainOptions
    grid: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, str]
    search: str = option(
        GRID,
        "train all settings of --grid, or let Optuna (extra: optuna) choose --trials settings within --range and "
        "--grid (default: %(default)s)",
        choices=(GRID, OPTUNA),
    )
    trials: int = option(20, "settings that Optuna tries (default: %(default)s)", "N")
    seeds: int = option(
        1, "trainings of each setting: the recipe's seed, the next one, … (default: %(default)s; 3 tell more)", "N"
    )
    metric: str | None = option(
        None,
        "what is compared, as metric_for_best_model takes it: eval_loss or a benchmark's metric, measured on "
        "validation questions; a rule of own data, or module:function, scores it too (default: the metric of the first "
        "set of --dataset)",
        "NAME",
    )
    prune: str = option(
        MEDIAN,
        "stop a trial that is worse than the median of the finished ones, or let all end (default: %(default)s)",
        choices=(MEDIAN, NONE),
    )
    prune_after_trials: int = option(4, "finished trials before one is stopped early (default: %(default)s)", "N")
    prune_after_share: float = option(
        0.3, "share of its training before a trial is stopped early, 0 to 1 (default: %(default)s)", "SHARE"
    )
    budget: float | None = option(
        None,
        "what all trials together may take by their forecast, e.g. 90min or 4h; seeds, then settings, are left out "
        "where they would take more",
        "TIME",
        parse=str,
        read=duration_seconds,
    )
    gpus: int = option(1, "devices of each trial (default: %(default)s)", "N")
    parallel: int | None = option(
        None,
        "trials at a time, each on devices of its own (default: as many as the GPUs suffice for; one on a CPU)",
        "N",
    )
    dry_run: bool = option(False, "print the trials and their forecast, and start nothing")


@dataclass(frozen=True)
class SweepSetting:
    """One setting of the keys that a sweep varies.

    Attributes:
        values: by key, as flags take them.
    """

    values: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """The setting for a person."""
        return ", ".join(f"{key}={value}" for key, value in self.values)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that vary."""
        return tuple(key for key, _ in self.values)

    @property
    def values_alone(self) -> str:
        """The setting where there is little room: its values, in the order of the keys."""
        return ", ".join(value for _, value in self.values)

    @property
    def name(self) -> str:
        """The setting as a part of a folder's name; different settings have different names."""
        return "_".join(f"{key}-{_slug(value)}" for key, value in self.values)

    def applied(self, train: TrainOptions) -> TrainOptions:
        """The training with this setting."""
        values = dict(self.values)
        dataset = values.pop(DATASET, train.dataset)
        given = {ALIASES.get(key, key): value for key, value in train.overrides.items()}
        return replace(train, dataset=dataset, overrides={**given, **values})


def _slug(value: str) -> str:
    """A value as part of a file's name: as it is where every character and the length suit, else with its hash."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.")[:_NAME_CHARACTERS]
    return plain if plain == value else f"{plain}-{sha256(value.encode()).hexdigest()[:6]}"


def read_grid(entries: Sequence[str], what: str) -> dict[str, str]:
    """Read `--grid` or `--range`: KEY=TEXT, one a flag.

    Args:
        entries: as they were given.
        what: the flag's name.

    Raises:
        RunError: all that cannot be varied, together.
    """
    found: dict[str, str] = {}
    mistakes = []
    for entry in entries:
        given, equals, text = entry.partition("=")
        name = given.strip().lstrip("-").replace("-", "_")
        key = ALIASES.get(name, name)
        if not equals or not text.strip():
            mistakes.append(f"--{what} {quoted(entry)} has no values")
        elif key in FIXED:
            mistakes.append(f"--{what} {key} cannot be varied: {FIXED[key]}")
        elif key not in KEYS and key != DATASET:
            mistakes.append(f"--{what} {quoted(name)} is no key of a recipe{nearest(name, [*KEYS, DATASET])}")
        elif key in found:
            mistakes.append(f"--{what} {key} comes twice")
        elif what == "grid" and not grid_values(text):
            mistakes.append(f"--grid {key}={quoted(text)} has no values")
        else:
            found[key] = text.strip()
    if mistakes:
        form = "learning_rate=1e-4,2e-4" if what == "grid" else "learning_rate=1e-5:1e-3:log"
        raise RunError("; ".join(mistakes), f"write --{what} {form}, once a key")
    return found


def entries_of(values: Mapping[str, object], what: str) -> list[str]:
    """Values from Python as the flags have them: lists of values, or (low, high) and (low, high, "log")."""
    found = []
    for key, one in values.items():
        parts = [flag_text(part) for part in one] if isinstance(one, list | tuple) else [flag_text(one)]
        found.append(f"{key}={';'.join(parts)};" if what == "grid" else f"{key}={':'.join(parts)}")
    return found


def grid_values(text: str) -> tuple[str, ...]:
    """The values of one key: with commas between them, or with semicolons where a value has commas."""
    return tuple(part.strip() for part in text.split(";" if ";" in text else ",") if part.strip())


def settings_of(options: SweepOptions) -> list[SweepSetting]:
    """All settings of the grid, each checked as a recipe, the first key changing slowest.

    Raises:
        RecipeError, DataError: a setting is not one that a training takes.
    """
    combinations = itertools.product(*options.grid.values())
    settings = [checked_setting(options.train, dict(zip(options.grid, values, strict=True))) for values in combinations]
    return list(dict.fromkeys(settings))


def checked_setting(train: TrainOptions, values: Mapping[str, str]) -> SweepSetting:
    """A setting whose values are written in one way each, so that 1e-4 and 0.0001 are one.

    Raises:
        RecipeError, DataError: the setting is not one that a training takes.
    """
    setting = SweepSetting(tuple(values.items()))
    applied = setting.applied(train)
    if DATASET in values:
        parse_datasets(applied.dataset, applied.columns)
    try:
        recipe = read_recipe(applied.sft_config, applied.overrides).recipe.to_dict()
    except RecipeError as error:
        raise RecipeError(f"the setting {setting.label} cannot be trained: {error.what}", error.fix) from error
    written = {key: text if key == DATASET else flag_text(recipe[key]) for key, text in values.items()}
    return SweepSetting(tuple(written.items()))
