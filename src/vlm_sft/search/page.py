"""A sweep as a table, and as a page: the report of its trials with the settings compared above them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlm_sft.common.formats import duration, number, p_value, percent, percent_interval, plural, points, points_interval
from vlm_sft.forecast.pareto import pareto_front
from vlm_sft.report.html import Settings, write_report
from vlm_sft.report.quality import Choice
from vlm_sft.report.quality_figure import Candidate, quality_drawing
from vlm_sft.search.judgement import Judgement, Standing
from vlm_sft.search.request import SweepSetting
from vlm_sft.search.trials import SweepTrial

HEADER = ["setting", "value", "sd over seeds", "difference", "p (Holm)", "verdict", "training", "forecast"]


def standing_cells(found: Judgement) -> list[list[str]]:
    """The settings as the cells of a table, header first: accuracies and differences in points, else as they are."""
    rows = [_cells(one, bool(found.questions)) for one in found.standings]
    return [HEADER, *([f"{text} {more}".strip() for text, more in row] for row in rows)]


def _cells(one: Standing, scored: bool) -> list[tuple[str, str]]:
    """Of each cell its text and the interval beside it."""
    show = percent if scored else number
    value, spread, difference = (show(one.value), ""), "", ("", "")
    if one.interval is not None:
        value = value[0], percent_interval(one.interval) if scored else _ends(one.interval, "")
    if one.spread is not None:
        spread = f"{100 * one.spread:.1f}" if scored else number(one.spread)
    if one.difference is not None:
        difference = points(one.difference) if scored else f"{one.difference:+.4g}", ""
    if one.difference_interval is not None:
        ends = one.difference_interval
        difference = difference[0], points_interval(ends) if scored else _ends(ends, "+")
    words = spread, p_value(one.p_holm), one.verdict, duration(one.seconds), duration(one.cost)
    plain = [(word, "") for word in words]
    return [(one.label, ""), value, plain[0], difference, *plain[1:]]


def _ends(interval: tuple[float, float], sign: str) -> str:
    return f"[{interval[0]:{sign}.4g}, {interval[1]:{sign}.4g}]"


def write_page(
    output: Path,
    found: Judgement,
    metric: str,
    trials: Mapping[Path, tuple[SweepSetting, SweepTrial]],
    left_out: Mapping[str, str],
    command: str,
) -> Path:
    """Write the report of all trials, with the settings, their figure and the recommendation.

    Args:
        output: the file.
        found: what the sweep found.
        metric: what was compared.
        trials: by run folder, with the setting of each.
        left_out: settings that could not be compared, and why.
        command: trains the recommended setting.
    """
    places = {one.label: place for place, one in enumerate(found.standings)}
    ordered = sorted(trials, key=lambda folder: places.get(trials[folder][0].label, len(places)))
    short = {setting.label: setting.values_alone for setting, _ in trials.values()}
    front = set(pareto_front([(one.seconds, one.value) for one in found.standings])) if found.questions else set()
    candidates = [
        Candidate(one.label, False, one.seconds, one.value, one.interval, found.questions, place in front)
        for place, one in enumerate(found.standings)
    ]
    drawn = {one.name: replace(one, name=short[one.name]) for one in candidates}
    keys = ", ".join(trials[ordered[0]][0].keys)
    title, chosen = f"{metric} ({keys})", drawn[found.recommended]
    drawing = quality_drawing(title, list(drawn.values()), chosen, "sweep") if found.questions else None
    recommended = next(one for one in candidates if one.name == found.recommended)
    seeds, questions = found.standings[0].seeds, f"{found.questions:,} " if found.questions else ""
    settings = Settings(
        title=f"Sweep of {keys.replace(', ', ' and ') if keys.count(',') == 1 else keys}",
        about=f"{plural(len(places) + len(left_out), 'setting')} x {plural(seeds, 'seed')}, compared by {metric} on "
        f"{questions}validation questions",
        header=HEADER,
        rows=[_cells(one, bool(found.questions)) for one in found.standings],
        left_out=list(left_out.items()),
        choice=Choice(metric, False, tuple(candidates), recommended, candidates[0], found.reasons, drawing),
        command=command,
        trials={
            folder: (f"{short[setting.label]}, seed {trial.seed}", trial.status)
            for folder, (setting, trial) in trials.items()
        },
        naming=f"Trials are named by {keys} and seed.",
    )
    return write_report(ordered, output, settings)
