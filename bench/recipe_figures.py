"""The figure of quality against time: an SVG that holds its numbers, so that a test can compare them."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vlm_sft.report.label_placement import Label, name_points
from vlm_sft.report.quality_figure import accuracy_limits

COLOURS = ("#1f5fbf", "#b4530a", "#2b7a3d", "#7a2b6f")
TEXT, GRID = "#1d2530", "#d5dbe3"
_DATA = re.compile(r"<desc>(.*?)</desc>", re.DOTALL)


def figure_data(result: dict[str, Any]) -> dict[str, Any]:
    """What the figure of a result file shows: for each benchmark the base, and a point for each measured recipe.

    Returns:
        {"benchmarks": {name: {"base": percent, "points": [[variant, recipe, seconds, percent, low, high], …]}}}
    """
    benchmarks: dict[str, Any] = {}
    for name, base in result["base"]["benchmarks"].items():
        points = []
        for row in result["rows"]:
            found = row["benchmarks"].get(name)
            if row["arm"] != "recipe" or found is None or row["wall_seconds"] is None:
                continue
            ends = [round(100 * end, 2) for end in (found["accuracy"], *found["interval"])]
            points.append([row["variant"], row["recipe"], round(row["wall_seconds"], 1), *ends])
        benchmarks[name] = {"base": round(100 * base["accuracy"], 2), "points": points}
    return {"benchmarks": benchmarks}


def draw(data: dict[str, Any]) -> str:
    """Draw one panel a benchmark: accuracy with its interval over the wall time of the training.

    Args:
        data: from `figure_data`.

    Returns:
        The SVG, with `data` as its description.
    """
    panels = data["benchmarks"]
    with matplotlib.rc_context({"svg.hashsalt": "recipes", "font.size": 9, "text.color": TEXT}):
        figure = Figure(figsize=(4.3 * max(1, len(panels)), 3.2), layout="constrained", facecolor="white")
        grid = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axes, (name, panel) in zip(grid, panels.items(), strict=False):
            _panel(axes, name, panel)
        handles = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        for axes, panel in zip(grid, panels.values(), strict=False):
            _name(axes, panel)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"<metadata>.*?</metadata>\n?", "", buffer.getvalue(), flags=re.DOTALL)
    start = text.index(">", text.index("<svg")) + 1
    return f"{text[:start]}\n<desc>{html.escape(json.dumps(data), quote=False)}</desc>{text[start:]}"


def _panel(axes: Any, name: str, panel: dict[str, Any]) -> None:
    """One benchmark."""
    axes.axhline(panel["base"], color=TEXT, linewidth=1, linestyle=(0, (4, 3)), label="base")
    variants = list(dict.fromkeys(point[0] for point in panel["points"]))
    for variant, colour in zip(variants, COLOURS, strict=False):
        points = [point for point in panel["points"] if point[0] == variant]
        seconds, percent = [point[2] for point in points], [point[3] for point in points]
        whiskers = [[point[3] - point[4] for point in points], [point[5] - point[3] for point in points]]
        axes.errorbar(
            seconds,
            percent,
            yerr=whiskers,
            color=colour,
            marker="o",
            markersize=5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            label=variant,
        )
    axes.set_title(name.replace("_", " "), fontsize=10)
    axes.set_xlabel("training, seconds of wall time")
    axes.set_ylabel("accuracy, %")
    ends = [end for point in panel["points"] for end in point[4:6]] + [panel["base"]]
    axes.set_ylim(*accuracy_limits(ends, air=0.3))  # names need room
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _name(axes: Any, panel: dict[str, Any]) -> None:
    """Names beside the points, clear of all points, of intervals and curves where that can be."""
    variants = list(dict.fromkeys(point[0] for point in panel["points"]))
    colours = dict(zip(variants, COLOURS, strict=False))
    curves = [[(seconds, low), (seconds, high)] for _, _, seconds, _, low, high in panel["points"]]
    curves += [[(point[2], point[3]) for point in panel["points"] if point[0] == variant] for variant in variants]
    curves.append([(end, panel["base"]) for end in axes.get_xlim()])
    labels = [Label(point[1], point[2], point[3], colours[point[0]]) for point in panel["points"]]
    name_points(axes, labels, leader_colour=TEXT, curves=curves, radius=2.5, fontsize=7)


def shown_data(path: Path) -> dict[str, Any] | None:
    """The numbers that a drawn figure holds; None where there is no such figure."""
    match = _DATA.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return json.loads(html.unescape(match[1])) if match else None
