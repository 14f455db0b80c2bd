"""Figures that lay several runs over each other."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from vlm_sft.common import formats
from vlm_sft.report.figures import task_metrics
from vlm_sft.report.records import RunReport
from vlm_sft.report.svg import DASHES, PLACEHOLDERS, Drawing, Palette, canvas, legend, rendered

HIGHLIGHTED = len(PLACEHOLDERS.series)
POINTS = 400  # of one curve; more cannot be told apart in so small a figure

Curves = dict[str, list[tuple[int, float]]]


def overlays(runs: Sequence[RunReport], first: Sequence[str]) -> list[Drawing]:
    """Draw loss, evaluation loss, gradient norm and the benchmarks' metrics of all runs over the steps.

    Args:
        runs: at least two.
        first: names of runs that deserve a colour before others; where there are more runs than colours, the rest is
            drawn faintly.
    """
    order = [run for name in first for run in runs if run.name == name]
    order += [run for run in runs if run not in order]
    coloured = [run.name for run in order[:HIGHLIGHTED]]
    columns: dict[str, Curves] = {}
    for run in order:
        for title, key in (("Training loss", "loss"), ("Evaluation loss", "eval_loss"), ("Gradient norm", "grad_norm")):
            if run.series.get(key):
                columns.setdefault(title, {})[run.name] = run.series[key]
        for name, points in task_metrics(run.series).items():
            columns.setdefault(name, {})[run.name] = [(step, 100 * value) for step, value in points]
    units = {"Training loss": "loss", "Evaluation loss": "loss", "Gradient norm": "norm"}
    return [
        _overlay(title, units.get(title, "score, %"), curves, coloured, f"overlay{number}")
        for number, (title, curves) in enumerate(columns.items(), start=1)
        if len(curves) > 1
    ]


def _overlay(title: str, unit: str, curves: Curves, coloured: Sequence[str], prefix: str) -> Drawing:
    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "step", unit)
        for name, points in curves.items():
            if name not in coloured:
                axes.plot(*zip(*_thinned(points), strict=True), color=palette.faint, linewidth=0.8, alpha=0.6)
        for place, name in enumerate(coloured):
            if name in curves:
                points = _thinned(curves[name])
                axes.plot(
                    *zip(*points, strict=True),
                    color=palette.series[place],
                    linestyle=DASHES[place],
                    linewidth=1.5,
                    marker="o" if len(points) < 12 else None,
                    markersize=3.5,
                    label=formats.shorten_name(name, 22),
                )
        if any(name not in coloured for name in curves):
            axes.plot([], [], color=palette.faint, linewidth=0.8, label="other runs")
        legend(axes, palette, columns=2)
        return figure

    words = [
        f"{name}: {formats.number(points[0][1])} at step {points[0][0]:,} to {formats.number(points[-1][1])} at step "
        f"{points[-1][0]:,}."
        for name, points in list(curves.items())[:HIGHLIGHTED]
    ]
    if len(curves) > HIGHLIGHTED:
        words.append(f"{len(curves) - HIGHLIGHTED} more runs are drawn faintly.")
    return rendered(title, " ".join(words), draw, prefix)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of equal parts where there are many points."""
    width = -(-len(points) // POINTS)
    if width == 1:
        return points
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [(part[len(part) // 2][0], sum(value for _, value in part) / len(part)) for part in parts]
