"""The five recipes on one set-up, each with its forecast and its measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sft.common.console import muted, say
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import duration, size
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.forecast.limits import shortages
from vlm_sft.forecast.recipe_quality import (
    GUIDE_BASE,
    GUIDE_GPUS,
    GUIDE_QUESTIONS,
    Quality,
    guide_comparison,
    qualities,
)
from vlm_sft.forecast.recommend import RecipeCandidate, Recommendation, plot, recommend
from vlm_sft.planning.dry_run import plan_run
from vlm_sft.planning.options import PlanOptions, launch_line
from vlm_sft.planning.plan_report import PlannedRun
from vlm_sft.recipe.builtin import FILES, RECIPES

SHOWN = "1epoch"  # the recipe whose planning is printed; that of the others differs in numbers only


@dataclass(frozen=True)
class Advice:
    """A recommendation with what it rests on.

    Attributes:
        candidates: the recipes.
        recommendation: what to take.
        files: of the recipes, by name.
        launch: the command that starts the choice; "" without one.
    """

    candidates: tuple[RecipeCandidate, ...]
    recommendation: Recommendation
    files: dict[str, Path]
    launch: str


def recipe_files(folder: Path | None) -> dict[str, Path]:
    """The files of the recipes by name.

    Raises:
        RunError: one is missing.
    """
    place = folder or (Path("configs") if Path("configs").is_dir() else FILES)
    files = {name: place / f"{stem}.json" for stem, name in RECIPES.items()}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise RunError(f"recipes are not found: {', '.join(missing)}", "pass their folder with --configs")
    return files


def advise(
    options: PlanOptions, hours: float, disk: float | None, priority: str, runs: Path | None, configs: Path | None
) -> Advice:
    """Forecast all recipes on one set-up, print them, and choose.

    Args:
        options: the set-up; its recipe file is replaced by each of the recipes.
        hours: what the training may take.
        disk: what it may write, in gigabytes (10^9 bytes); None for no limit.
        priority: "quality", "balanced" or "speed".
        runs: folder of the user's own runs; None for none.
        configs: folder of the recipes; None for `configs`, or the package's own where there is none.

    Raises:
        RunError: hours or disk are not above 0, or a probe is asked for.
    """
    if hours <= 0 or (disk is not None and disk <= 0):
        raise RunError("--hours and --disk must be above 0", "give what there is")
    if options.train.probe:
        raise RunError("recommend forecasts without a probe", "probe the choice: vlm-sft plan --probe")
    files = recipe_files(configs)
    names = [spec.name for spec in parse_datasets(options.train.dataset, options.train.columns)]
    found, source = qualities(runs, options.train.base_model, names)
    say(source)
    candidates, planned = [], {}
    counted: dict[str, EncodedGroup] = {}
    for name, path in files.items():
        with muted(name != SHOWN):  # the set-up is the same for all of them
            planned[name] = plan_run(replace(options, train=replace(options.train, sft_config=path)), counted)
        candidates.append(_candidate(name, planned[name], found))
    recommendation = recommend(candidates, hours, None if disk is None else disk * 1e9, priority)
    launch = ""
    if recommendation.chosen:
        file = files[recommendation.chosen]
        chosen = replace(options.train, sft_config=file, output_dir=Path("outputs", file.stem))
        launch = launch_line(chosen, options.gpus or 1)
    advice = Advice(tuple(candidates), recommendation, files, launch)
    for line in advice_lines(advice):
        say(line)
    if _is_guide(options, next(iter(planned.values()))):
        for line in guide_comparison({one.name: one.seconds for one in candidates}):
            say(line)
    return advice


def _candidate(name: str, planned: PlannedRun, found: Mapping[str, Quality]) -> RecipeCandidate:
    """One recipe with its forecast."""
    forecast = planned.forecast
    problems = shortages(planned.inputs, forecast, planned.calibration, None)
    return RecipeCandidate(
        name,
        planned.inputs.passes.epochs,
        forecast.time_seconds.value,
        forecast.time_seconds.high,
        forecast.peak_bytes.value,
        forecast.peak_disk_bytes,
        found.get(name),
        planned.run.recipe.max_train is not None,
        problem="; ".join(f"{problem.what} ({problem.fix})" for problem in problems),
    )


def _is_guide(options: PlanOptions, planned: PlannedRun) -> bool:
    """Whether this is the set-up of the guide that the recipes began with."""
    data = options.hypothetical
    return (
        options.train.base_model == GUIDE_BASE
        and options.gpus == GUIDE_GPUS
        and data is not None
        and data.questions == GUIDE_QUESTIONS
    )


def advice_lines(advice: Advice) -> list[str]:
    """A recommendation as lines for a person."""
    lines = ["", "recipe      epochs        time  (up to)     memory       disk  quality"]
    choice = advice.recommendation
    for one in advice.candidates:
        mark = ">" if one.name == choice.chosen else "*" if one.name in choice.front else " "
        quality = one.quality.text if one.quality else "not measured"
        lines.append(
            f"{mark} {one.name:<10}{one.epochs:>6.1f}  {duration(one.seconds):>11} {duration(one.high_seconds):>11} "
            f"{size(one.peak_bytes):>9} {size(one.disk_bytes):>10}  {quality}"
        )
    lines += ["", *plot(advice.candidates, choice), "  # recommended, * on the Pareto front, o beaten", ""]
    if choice.chosen is None:
        lines.append("nothing is affordable:")
    else:
        lines.append(f"recommended: {choice.chosen}" + (f"; runner-up: {choice.runner_up}" if choice.runner_up else ""))
    lines += [f"  {reason}" for reason in choice.reasons]
    if advice.launch:
        lines += ["start it with:", f"  {advice.launch}"]
    return lines
