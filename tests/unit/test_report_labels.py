"""Names in the figure of quality against time: none covers another one or a point, as drawn and in a browser."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from tests import chromium
from vlm_sft.report.label_placement import Label, name_points
from vlm_sft.report.quality_figure import Candidate, quality_drawing
from vlm_sft.report.svg import PAPER, PAPER_DOTS_PER_INCH, Drawing, canvas

RADIUS = 4.0
LONG = "a_run_with_quite_a_long_name_and_number_{}"

points_drawn = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from(["r{}", "recipe_{}", LONG])),
    min_size=1,
    max_size=30,
)


def figure_with(points: list[tuple[float, float, str]], log: bool = False) -> tuple[Figure, Axes, list[Label]]:
    """A figure as tall as a report would make it, with its names."""
    figure, axes = canvas(PAPER, "time", "accuracy, %", 3.0 + 0.12 * max(0, len(points) - 6))
    if log:
        axes.set_xscale("log")
    axes.set_xlim(1 if log else -1, 14)
    axes.set_ylim(-1, 13)
    labels = [Label(name.format(index), x + log, y, PAPER.text) for index, (x, y, name) in enumerate(points)]
    return figure, axes, name_points(axes, labels, leader_colour=PAPER.faint, radius=RADIUS)


def boxes_of(figure: Figure, axes: Axes, dots: int) -> tuple[list[Any], list[Any], Any]:
    """What is really drawn, in points: boxes of names and of markers, and of the axes."""
    figure.set_dpi(dots)
    agg = FigureCanvasAgg(figure)
    agg.draw()
    renderer, scale = agg.get_renderer(), 72 / dots
    names, markers = [], []
    for one in (text for text in axes.texts if isinstance(text, Annotation)):
        # The text alone: with its arrow, the box of an annotation reaches to the point.
        names.append(np.array(Text.get_window_extent(one, renderer).extents) * scale)
        x, y = axes.transData.transform(one.xy) * scale
        markers.append(np.array([x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS]))
    return names, markers, np.array(axes.get_window_extent(renderer).extents) * scale


def overlap(one: Any, other: Any) -> bool:
    return bool(min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1]))


def assert_clear(figure: Figure, axes: Axes, dots: int) -> None:
    names, markers, frame = boxes_of(figure, axes, dots)
    assert not [pair for pair in itertools.combinations(names, 2) if overlap(*pair)]
    assert not [(name, marker) for name in names for marker in markers if overlap(name, marker)]
    for name in names:
        assert (name[:2] >= frame[:2] - 0.5).all() and (name[2:] <= frame[2:] + 0.5).all()


@settings(max_examples=6, deadline=None)
@given(points_drawn, st.booleans())
def test_no_name_covers_a_name_or_a_point(points: list[tuple[float, float, str]], log: bool) -> None:
    figure, axes, missing = figure_with(points, log)
    assert missing == [] and len(axes.texts) == len(points)
    assert_clear(figure, axes, 72)


@pytest.mark.parametrize("dots", [72, PAPER_DOTS_PER_INCH])
def test_names_of_one_and_the_same_point_have_lines_to_it(dots: int) -> None:
    figure, axes, missing = figure_with([(12, 6, LONG)] * 30)
    assert missing == []
    assert_clear(figure, axes, dots)
    lines = [text for text in axes.texts if isinstance(text, Annotation) and text.arrow_patch is not None]
    assert len(lines) >= 22, "eight places are beside the point"
    assert {text.xy for text in axes.texts if isinstance(text, Annotation)} == {(12, 6)}


def test_a_name_alone_stands_beside_its_point_and_wide_letters_have_room() -> None:
    figure, axes, _ = figure_with([(5, 5, "short")])
    (name,), (marker,), _ = boxes_of(figure, axes, 72)
    assert 0 < name[0] - marker[0] < 12 and axes.texts[0].arrow_patch is None
    _, wide, _ = figure_with([(5, 5, "訓練" * 5), (8, 5, "x")])
    assert len(wide.texts) == 2


def test_equal_figures_have_equal_places_and_what_has_no_room_is_told() -> None:
    points = [(float(index % 5), float(index % 3), LONG) for index in range(12)]
    first, second = ([text.xyann for text in figure_with(points)[1].texts] for _ in range(2))
    assert first == second
    figure, axes = canvas(PAPER, "x", "y", 1.0)
    labels = [Label(LONG.format(index), 0.5, 0.5, PAPER.text) for index in range(60)]
    missing = name_points(axes, labels, leader_colour=PAPER.faint)
    assert 0 < len(missing) < 60 and len(axes.texts) == 60 - len(missing)
    assert_clear(figure, axes, 72)


def candidates(count: int) -> list[Candidate]:
    base = Candidate("base model pocket", True, 0.0, 0.3, (0.26, 0.34), 100, True)
    return [
        base,
        *(
            Candidate(
                LONG.format(place), False, 100.0 + place % 3, 0.5 + 0.01 * (place % 4), (0.45, 0.58), 100, place > 1
            )
            for place in range(count)
        ),
    ]


def drawn(count: int) -> Drawing:
    rows = candidates(count)
    drawing = quality_drawing("own", rows, rows[2], "quality")
    assert drawing is not None
    return drawing


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_names_are_clear_of_each_other_in_a_browser(width: int, tmp_path: Path) -> None:
    page = tmp_path / "figure.html"
    style = "body { margin: 12px } .plot { width: 100%; max-width: 32rem } text { font-family: system-ui, sans-serif }"
    page.write_text(
        f"<!DOCTYPE html><meta name=viewport content='width=device-width'><style>{style}</style>{drawn(12).markup}",
        encoding="utf-8",
    )
    with chromium.Chromium(width=width, height=800, phone=width < 500) as browser:
        browser.open(page)
        boxes = browser.run(
            "[...document.querySelectorAll('svg text')].filter(one => one.textContent.startsWith('a_run'))"
            ".map(one => { const box = one.getBoundingClientRect();"
            "return [box.left, box.top, box.right, box.bottom, one.textContent]; })"
        )
        frame = browser.run(
            "(() => { const b = document.querySelector('svg').getBoundingClientRect();return [b.left, b.right]; })()"
        )
    assert len(boxes) == 12
    assert not [(one[4], other[4]) for one, other in itertools.combinations(boxes, 2) if overlap(one, other)]
    assert all(frame[0] <= box[0] and box[2] <= frame[1] for box in boxes)


def test_beyond_a_dozen_runs_those_of_the_front_have_names() -> None:
    markup = drawn(20).markup
    assert markup.count(">a_run_wit") == 18
    assert len(markup) < 120_000
