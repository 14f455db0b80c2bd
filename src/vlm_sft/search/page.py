"""A sweep as a table, and as a page: the report of its trials with the settings compared above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_sft.common.formats import duration, number, p_value, percent, percent_interval, points, points_interval
from vlm_sft.forecast.pareto import pareto_front
from vlm_sft.report.html import Settings, write_report
from vlm_sft.report.quality import Choice
from vlm_sft.report.quality_figure import Candidate, quality_drawing
from vlm_sft.search.judgement import Judgement, Standing

HEADER = ["setting", "seeds", "value", "sd", "difference", "p (Holm)", "verdict", "training", "forecast"]


def standing_cells(found: Judgement) -> list[list[str]]:
    """The settings as the cells of a table, header first: accuracies and differences in points, else as they are."""
    scored = bool(found.questions)
    return [HEADER, *(_cells(one, scored) for one in found.standings)]


def _cells(one: Standing, scored: bool) -> list[str]:
    show = percent if scored else number
    value, spread, difference = show(one.value), "", ""
    if one.interval is not None:
        value += " " + (percent_interval(one.interval) if scored else _ends(one.interval, ""))
    if one.spread is not None:
        spread = f"{100 * one.spread:.1f}" if scored else number(one.spread)
    if one.difference is not None:
        difference = points(one.difference) if scored else f"{one.difference:+.4g}"
        if one.difference_interval is not None:
            ends = one.difference_interval
            difference += " " + (points_interval(ends) if scored else _ends(ends, "+"))
    seconds, cost = duration(one.seconds), duration(one.cost)
    return [one.label, str(one.seeds), value, spread, difference, p_value(one.p_holm), one.verdict, seconds, cost]


def _ends(interval: tuple[float, float], sign: str) -> str:
    return f"[{interval[0]:{sign}.4g}, {interval[1]:{sign}.4g}]"


def write_page(folders: Sequence[Path], found: Judgement, metric: str, output: Path) -> Path:
    """Write the report of all trials, with the settings, their figure and the recommendation.

    Args:
        folders: run folders of the trials.
        found: what the sweep found.
        metric: what was compared.
        output: the file.
    """
    front = set(pareto_front([(one.seconds, one.value) for one in found.standings])) if found.questions else set()
    candidates = [
        Candidate(one.label, False, one.seconds, one.value, one.interval, found.questions, place in front)
        for place, one in enumerate(found.standings)
    ]
    best, recommended = candidates[0], next(one for one in candidates if one.name == found.recommended)
    drawing = quality_drawing(metric, candidates, recommended, "sweep") if found.questions else None
    choice = Choice(metric, False, tuple(candidates), recommended, best, found.reasons, drawing)
    settings = Settings(f"Settings by {metric} on validation questions", standing_cells(found), choice)
    return write_report(list(folders), output, settings)
