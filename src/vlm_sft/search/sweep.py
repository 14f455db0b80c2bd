"""One sweep from the command line to the recommended setting, readable top to bottom."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn
from vlm_sft.common.errors import InterruptedRunError, RecipeError, RunError
from vlm_sft.common.formats import plural
from vlm_sft.common.record import now
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.distributed.launch import launch_words
from vlm_sft.evaluate.own_metrics import is_rule
from vlm_sft.evaluate.tasks import names_of, rules_of
from vlm_sft.planning.options import TrainOptions, launch_line, train_words
from vlm_sft.planning.validation_plan import LOSS, NO_BENCHMARKS
from vlm_sft.recipe.load import read_recipe
from vlm_sft.recipe.schema import Recipe
from vlm_sft.report.markdown import table
from vlm_sft.search.judgement import Measured, judge
from vlm_sft.search.optuna_search import corners
from vlm_sft.search.outlook import (
    Forecaster,
    Outlook,
    check_disk,
    forecast_facts,
    outlook_cells,
    warn_of_few_steps,
    within_budget,
)
from vlm_sft.search.page import standing_cells, write_page
from vlm_sft.search.request import DATASET, MEDIAN, OPTUNA, SweepOptions, SweepSetting, settings_of
from vlm_sft.search.state import SweepState
from vlm_sft.search.trial_queue import TrialQueue, environments
from vlm_sft.search.trials import FAILED, FINISHED, PRUNED, SweepTrial
from vlm_sft.train.run_folder import RunLock


class Sweep:
    """A sweep that has been checked: its metric, the training that all trials share, its seeds.

    Args:
        options: what is asked for.

    Raises:
        VlmSftError: a mistake in any of it.
    """

    def __init__(self, options: SweepOptions) -> None:
        self.settings = varied_settings(options)
        self.metric = (options.metric or default_metric(self.settings[0].applied(options.train))).replace("/", "_")
        named = {"metric_for_best_model": self.metric}
        own = options.metric if options.metric and is_rule(options.metric) else options.train.metric
        self.given = replace(options.train, metric=own, overrides={**options.train.overrides, **named})
        # The test split is left alone: what chooses must not have seen it.
        trained = replace(self.given, eval_benchmarks=self.given.eval_benchmarks or NO_BENCHMARKS)
        self.options = replace(options, train=trained)
        recipes = [self.recipe(setting) for setting in self.settings]
        if any(recipe.eval_strategy == "no" for recipe in recipes):
            raise RecipeError("a sweep compares evaluations, and eval_strategy is no", "pass --eval_strategy epoch")
        if self.metric == LOSS and DATASET in options.grid:
            raise RunError(
                "the evaluation losses of different data sets do not compare", "name a benchmark's metric: --metric"
            )
        self.greater = recipes[0].best_is_greatest
        self.seeds = [recipes[0].seed + number for number in range(options.seeds)]
        self.folder = options.train.output_dir
        self.environments = environments(options.parallel, options.gpus)

    def recipe(self, setting: SweepSetting) -> Recipe:
        """The recipe of a setting."""
        applied = setting.applied(self.options.train)
        return read_recipe(applied.sft_config, applied.overrides).recipe

    def words(self, setting: SweepSetting, trial: SweepTrial, devices: str) -> list[str]:
        """The command line of a trial; `devices` are its own where others run beside it."""
        train = setting.applied(self.options.train)
        train = replace(train, overrides={**train.overrides, "seed": trial.seed}, resume="auto")
        parallel = "ddp" if train.deepspeed is None else train.deepspeed
        start = launch_words(self.options.gpus, parallel, devices)
        return [*start, *train_words(train), "--output_dir", str(self.place(trial))]

    def place(self, trial: SweepTrial) -> Path:
        """The folder of a trial."""
        return self.folder / artifacts.TRIALS_FOLDER / trial.name

    @property
    def asked(self) -> dict[str, Any]:
        """What must be the same when the sweep goes on."""
        searched = {"ranges": dict(self.options.ranges), "grid": {key: list(v) for key, v in self.options.grid.items()}}
        return {
            "training": train_words(self.options.train),
            "metric": self.metric,
            "search": self.options.search,
            "gpus": self.options.gpus,
            **(searched if self.options.search == OPTUNA else {}),
        }


def default_metric(train: TrainOptions) -> str:
    """The metric of the first benchmark of the data."""
    first, *_ = names_of(parse_datasets(train.dataset, train.columns))
    return rules_of(first).metric_name


def varied_settings(options: SweepOptions) -> list[SweepSetting]:
    """The settings of a grid, or the two ends of what is searched, once the request is checked.

    Raises:
        VlmSftError: a mistake in the request, or a setting that a training does not take.
    """
    check_request(options)
    return corners(options) if options.search == OPTUNA else settings_of(options)


def check_request(options: SweepOptions) -> None:
    """Check the numbers of a request, and what goes together.

    Raises:
        RunError: the first mistake.
    """
    for name, least in (("seeds", 1), ("trials", 2), ("gpus", 1), ("parallel", 1), ("prune_after_trials", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise RunError(f"--{name} {value} is below {least}", f"give {least} or more")
    if not 0 <= options.prune_after_share <= 1:
        raise RunError(f"--prune_after_share {options.prune_after_share:g} is no share", "give a number from 0 to 1")
    if options.search == OPTUNA and not options.ranges:
        raise RunError("--search optuna has nothing to search", "add --range learning_rate=1e-5:1e-3:log")
    if options.search != OPTUNA and options.ranges:
        raise RunError("--range is for --search optuna", "add --search optuna, or list values: --grid KEY=A,B")
    if not options.grid and not options.ranges:
        raise RunError("a sweep needs values to compare", "add --grid learning_rate=1e-4,2e-4, once a key")
    if both := options.grid.keys() & options.ranges.keys():
        raise RunError(f"{', '.join(sorted(both))}: both --grid and --range", "keep one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a sweep starts its trials itself, and was started by a launcher",
            "start it without one; --gpus N gives each trial N devices",
        )


def sweep(options: SweepOptions) -> SweepState:
    """Forecast the trials, carry them out, and say which setting to take.

    Args:
        options: what is asked for.

    Returns:
        The record: what sweep.json holds; of a dry run without trials.

    Raises:
        InterruptedRunError: a signal; the same command goes on.
        VlmSftError: a mistake in what is asked for; no setting came to its end.
    """
    asked = Sweep(options)
    if options.dry_run:
        state = SweepState(asked.folder, asked.asked, options.prune == MEDIAN)
        plan_trials(asked, state)
        return state
    asked.folder.mkdir(parents=True, exist_ok=True)
    with RunLock(asked.folder):
        state = SweepState(asked.folder, asked.asked, options.prune == MEDIAN)
        outlooks, seeds, forecaster = plan_trials(asked, state)
        state.write(metric=asked.metric, greater_is_better=asked.greater, seeds=seeds)
        try:
            tried = TrialQueue(asked, state, outlooks, seeds, forecaster).carry_out()
        except InterruptedRunError:
            state.write(status="interrupted")
            raise
        conclude(asked, state, tried, seeds, forecaster)
    return state


def plan_trials(asked: Sweep, state: SweepState) -> tuple[list[Outlook], list[int], Forecaster]:
    """Print what the trials are and what they take, after the budget has cut them."""
    options, parallel = asked.options, len(asked.environments)
    forecaster = Forecaster(options.train, options.gpus)
    outlooks = [forecaster.of(setting) for setting in asked.settings]
    if options.search == OPTUNA:  # what a setting takes lies between those of the two ends
        outlooks = [outlooks[number % 2] for number in range(options.trials)]
    kept, seeds, notes = within_budget(outlooks, asked.seeds, options.budget, parallel)
    for note in notes:
        warn(note)
    size = f"{plural(len(kept), 'setting')} x {plural(len(seeds), 'seed')}"
    say(f"sweep: {size}, compared by {asked.metric} on validation questions")
    cells = outlook_cells(kept, len(seeds), parallel)
    say(table([cells[0], *dict.fromkeys(map(tuple, cells[1:]))]))
    warn_of_few_steps(kept)
    check_disk(kept * len(seeds), options.train)
    state.values["forecast"] = forecast_facts(kept * len(seeds), parallel)
    state.outlook = cells
    return kept, seeds, forecaster


def conclude(
    asked: Sweep, state: SweepState, tried: Sequence[SweepSetting], seeds: Sequence[int], forecaster: Forecaster
) -> None:
    """Compare what came to its end, and print, write and draw it.

    Raises:
        RunError: nothing did.
    """
    measured, left_out = [], {}
    for setting in tried:
        trials = [state.trial(setting, seed) for seed in seeds]
        values = [one.value for one in trials if one.status == FINISHED and one.value is not None]
        if len(values) == len(seeds):
            places = tuple(asked.place(one) for one in trials)
            seconds, cost = fmean(one.seconds for one in trials), forecaster.of(setting).seconds.value
            measured.append(Measured(setting.label, places, tuple(values), seconds, cost))
        else:
            left_out[setting.label] = "; ".join(_why(one) for one in trials if one.status in (FAILED, PRUNED))
    if not measured:
        state.write(status="failed", finished=now())
        told = "; ".join(f"{label}: {why}" for label, why in left_out.items())
        what = f"no setting came to its end with every seed: {told}"
        raise RunError(what, f"see the logs in {asked.folder / artifacts.TRIALS_FOLDER}")
    state.judgement = found = judge(measured, asked.metric, asked.greater)
    chosen = next(setting for setting in tried if setting.label == found.recommended)
    line = next_line(asked, chosen)
    failed = sum(one.status == FAILED for one in state.trials)
    outcome = {"judgement": found.to_dict(), "recommended": dict(chosen.values), "next": line}
    state.write(status="finished", finished=now(), failed=failed, **outcome)
    jobs = [(setting, state.trial(setting, seed)) for setting in tried for seed in seeds]
    begun = {asked.place(trial): (setting, trial) for setting, trial in jobs}
    begun = {place: job for place, job in begun.items() if (place / artifacts.RUN).is_file()}
    page = write_page(asked.folder / artifacts.SWEEP_PAGE, found, asked.metric, begun, left_out, line)
    say("")
    say(table(standing_cells(found)))
    for label, why in left_out.items():
        (warn if FAILED in why else say)(f"not compared: {label}: {why}")
    for reason in found.reasons:
        say(reason)
    say(f"written: {state.path}, {page}")
    say(f"its adapter of seed {seeds[0]}: {asked.place(state.trial(chosen, seeds[0]))}")
    say(f"next: train it, and measure it on the test split, which the sweep has not looked at:\n      {line}")


def _why(trial: SweepTrial) -> str:
    """Why the setting of a trial has no place in the comparison."""
    return f"{trial.status} (seed {trial.seed}): {trial.reason}"


def next_line(asked: Sweep, chosen: SweepSetting) -> str:
    """The command that trains the chosen setting."""
    train: TrainOptions = chosen.applied(asked.given)
    folder = asked.folder.with_name(f"{asked.folder.name}-chosen")
    return launch_line(replace(train, output_dir=folder), asked.options.gpus)
