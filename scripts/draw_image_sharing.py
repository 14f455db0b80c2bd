"""Draws docs/figures/image_sharing.svg: who sees whom, in separate sequences and behind one shared image prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FILE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "image_sharing.svg"
PREFIX, QUESTIONS = 6, (4, 3)  # tokens
COLORS = ("#9aa0a6", "#0072B2", "#D55E00")  # image, first and second question


def owners(separate: bool) -> list[tuple[int, int]]:
    """For each token of the layout: its sequence, and 0 for the image or the number of its question."""
    tokens = [(0, 0)] * (0 if separate else PREFIX)
    for number, length in enumerate(QUESTIONS, start=1):
        sequence = number if separate else 0
        tokens += [(sequence, 0)] * (PREFIX if separate else 0) + [(sequence, number)] * length
    return tokens


def sees(separate: bool) -> np.ndarray:
    """The mask of a layout: True at [row, column] where the row's token sees the column's."""
    tokens = owners(separate)
    return np.array(
        [
            [column <= row and there[0] == here[0] and there[1] in (0, here[1]) for column, there in enumerate(tokens)]
            for row, here in enumerate(tokens)
        ]
    )


def draw(axes: Axes, separate: bool, title: str) -> None:
    """Draw one mask with the labels of its parts."""
    tokens, mask = owners(separate), sees(separate)
    for row, column in np.ndindex(mask.shape):
        color = COLORS[tokens[column][1]] if mask[row, column] else "#f3f4f6"
        axes.add_patch(Rectangle((column, row), 0.92, 0.92, color=color, linewidth=0))
    names = {0: "image", 1: "Q1", 2: "Q2"}
    starts = [0, *(place for place in range(1, len(tokens)) if tokens[place] != tokens[place - 1]), len(tokens)]
    for start, end in zip(starts, starts[1:], strict=False):
        name, middle = names[tokens[start][1]], (start + end) / 2
        axes.text(middle, -0.5, name, ha="center", va="bottom", fontsize=9)
        axes.text(-0.5, middle, name, ha="right", va="center", fontsize=9)
    axes.set_xlim(-3, len(tokens))
    axes.set_ylim(len(tokens) + 0.5, -2)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"{title}: {len(tokens)} tokens", fontsize=11)


def render(path: Path = FILE) -> Path:
    """Write the figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "image_sharing", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        draw(left, True, "two sequences")
        draw(right, False, "one shared prefix")
        figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    render()
