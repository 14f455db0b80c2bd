"""Pictures of synthetic charts show their data; nothing is clipped, and labels that do not fit are refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import numpy
import pytest
from PIL import Image

from tests.pictures import chart_spec
from vlm_sft.data.demo.charts import SIZES, random_chart
from vlm_sft.data.demo.drawing import draw_chart, mark_ends
from vlm_sft.data.demo.fonts import fonts, load_font
from vlm_sft.data.demo.spec import ChartSpec


def test_sizes_are_few_and_made_of_whole_visual_tokens():
    assert len(SIZES) <= 4
    for index in range(200):
        spec = chart_spec("train", index)
        assert (spec.width, spec.height) in SIZES
        assert spec.width % 16 == 0 and spec.height % 16 == 0
        assert draw_chart(spec).size == (spec.width, spec.height)


def test_nothing_is_clipped_at_the_edge():
    for index in range(300):
        spec = chart_spec("train", index)
        pixels = numpy.asarray(draw_chart(spec))
        edge = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        paper = [int(spec.style.paper[start : start + 2], 16) for start in (1, 3, 5)]
        assert (edge == paper).all(), f"chart {index}: {spec}"


def without_ink(spec: ChartSpec) -> ChartSpec:
    """The chart with text in a colour that no bar, slice or line has."""
    return dataclasses.replace(spec, style=dataclasses.replace(spec.style, ink="#010203"))


def mask_of(image: Image.Image, shade: str) -> numpy.ndarray:
    colour = [int(shade[start : start + 2], 16) for start in (1, 3, 5)]
    return (numpy.asarray(image) == colour).all(axis=2)


@pytest.mark.parametrize("chart_type", ["bar", "horizontal_bar"])
def test_bars_are_as_long_as_their_values(chart_type):
    measured = 0
    for index in range(150):
        spec = random_chart(Random(f"bars/{index}"), chart_type)
        if not spec.category_paints:
            continue
        image = draw_chart(without_ink(spec))
        axis = 0 if chart_type == "bar" else 1
        lengths = [mask_of(image, paint.shade).sum(axis=axis).max() for paint in spec.category_paints]
        values = spec.series[0].values
        scale = max(lengths) / max(values)
        for length, value in zip(lengths, values, strict=True):
            assert abs(length - value * scale) <= 2.5, (index, lengths, values)
        measured += 1
    assert measured > 40


def test_slices_are_as_large_as_their_shares():
    for index in range(60):
        spec = random_chart(Random(f"pies/{index}"), "pie")
        image = draw_chart(without_ink(spec))
        areas = numpy.array([mask_of(image, paint.shade).sum() for paint in spec.category_paints], dtype=float)
        # Printed numbers and rims cover some of each slice.
        assert numpy.abs(100 * areas / areas.sum() - spec.series[0].values).max() < 4


def test_every_value_on_a_line_is_marked_at_its_height():
    for index in range(60):
        spec = random_chart(Random(f"lines/{index}"), "line")
        if spec.value_labels or len(spec.series) > 1:
            continue
        mask = mask_of(draw_chart(without_ink(spec)), spec.series[0].paint.shade)
        rows = numpy.flatnonzero(mask.sum(axis=1) >= 2)
        values = spec.series[0].values
        # The outermost markers reach 2.5 pixels beyond the values.
        per_value = (rows[-1] - rows[0] - 4) / (max(values) - min(values))
        assert per_value * spec.tick_step >= spec.style.font_size, (index, spec)


@pytest.mark.parametrize("chart_type", ["bar", "horizontal_bar", "grouped_bar", "line"])
def test_the_ends_of_marks_are_where_their_colour_ends(chart_type):
    """Seen in the picture alone: a step inside is the mark's colour, a few steps beyond is not."""
    inside, beyond = ((-2, 0), (3, 0)) if chart_type == "horizontal_bar" else ((0, 2), (0, -3))
    seen = Counter()
    for index in range(40):
        # Printed values and their outlines, and the lines of other series, may cover an end.
        spec = dataclasses.replace(random_chart(Random(f"ends/{index}"), chart_type), value_labels=False)
        spec = dataclasses.replace(spec, series=spec.series[:1]) if chart_type == "line" else spec
        image = draw_chart(without_ink(spec))
        for series, ends in zip(spec.series, mark_ends(spec), strict=True):
            for number, (x, y) in enumerate(ends):
                paint = spec.category_paints[number] if spec.category_paints else series.paint
                mask = mask_of(image, paint.shade)
                if chart_type == "line":
                    seen[bool(mask[y, x])] += 1
                    continue
                seen[bool(mask[y + inside[1], x + inside[0]] and not mask[y + beyond[1], x + beyond[0]])] += 1
    assert seen[True] > 100 and seen[False] <= 0.02 * seen[True]
    assert mark_ends(random_chart(Random(1), "pie")) == mark_ends(random_chart(Random(1), "table")) == []


def test_a_chart_whose_labels_do_not_fit_is_refused():
    spec = dataclasses.replace(chart_spec("train", 0), title="A title that is far too long for a picture of this width")
    with pytest.raises(ValueError, match="do not fit"):
        draw_chart(spec)
    with pytest.raises(ValueError, match="do not fit"):
        mark_ends(spec)


def test_every_font_loads_and_writes():
    for name in fonts():
        assert load_font(name, 12).getlength("0123456789") > 40, name
