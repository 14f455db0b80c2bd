"""Draws synthetic charts with Pillow.

Text and bars are drawn at the final size, because they are crisp there; lines and pies at a multiple of it and reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageDraw

from vlm_sft.data.demo.fonts import load_font
from vlm_sft.data.demo.layout import GAP, PAD, SWATCH, Places, place, tick_labels
from vlm_sft.data.demo.spec import ChartSpec, Paint

Pen = Callable[[Image.Image], ImageDraw.ImageDraw]
SUPERSAMPLING = 2
GRID = "#d9d9d9"
AXIS = "#555555"


def draw_chart(spec: ChartSpec, pen: Pen = ImageDraw.Draw) -> Image.Image:
    """Draw a chart.

    Args:
        spec: what to draw, from `random_chart` or made by hand.
        pen: makes the tool that draws on the picture; one that keeps a record of the labels can be given.

    Returns:
        An RGB picture of `spec.width` by `spec.height` pixels.

    Raises:
        ValueError: the labels of the chart do not fit its size.
    """
    places = _places(spec)
    image = Image.new("RGB", (spec.width, spec.height), spec.style.paper)
    draw = pen(image)
    _draw_title(draw, spec)
    _draw_legend(draw, spec, places)
    if spec.chart_type == "pie":
        _draw_pie(image, draw, spec, places)
    elif spec.chart_type == "table":
        _draw_table(draw, spec, places)
    elif spec.chart_type == "line":
        _draw_lines(image, draw, spec, places)
    elif spec.chart_type == "horizontal_bar":
        _draw_horizontal_bars(draw, spec, places)
    else:
        _draw_vertical_bars(draw, spec, places)
    return image


def mark_ends(spec: ChartSpec) -> list[list[tuple[int, int]]]:
    """Where the ends of the bars or the points of the lines are.

    Returns:
        (x, y) in pixels, a list for every series with one for every category; empty for pies and tables.

    Raises:
        ValueError: as `draw_chart`.
    """
    places = _places(spec)
    if spec.chart_type in ("pie", "table"):
        return []
    found = []
    for number, series in enumerate(spec.series):
        ends = []
        for index, value in enumerate(series.values):
            if spec.chart_type == "horizontal_bar":
                ends.append((_reach_of(spec, places, value), round(_row(spec, places, index))))
                continue
            x = _column(spec, places, index)
            if spec.chart_type != "line":
                start, thickness = _bar(spec, places, number, index)
                x = start + thickness / 2
            ends.append((round(x), _height_of(spec, places, value)))
        found.append(ends)
    return found


def _places(spec: ChartSpec) -> Places:
    """Where everything of a chart stands; a ValueError where its labels do not fit."""
    places = place(spec)
    if places is None:
        raise ValueError(f"the labels of this {spec.chart_type} do not fit {spec.width}x{spec.height} pixels")
    return places


def text_colour(shade: str) -> str:
    """Black or white, whichever is easier to read on a "#rrggbb" background."""
    red, green, blue = (int(shade[start : start + 2], 16) for start in (1, 3, 5))
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def _write(
    draw: ImageDraw.ImageDraw,
    spec: ChartSpec,
    at: tuple[int, int],
    text: str,
    anchor: str,
    fill: str = "",
    outline: str = "",
) -> None:
    """Write a label in the chart's font; `outline` is the colour of a rim of one pixel, "" for none."""
    draw.text(
        at,
        text,
        fill=fill or spec.style.ink,
        font=load_font(spec.style.font, spec.style.font_size),
        anchor=anchor,
        stroke_width=1 if outline else 0,
        stroke_fill=outline or None,
    )


def _draw_title(draw: ImageDraw.ImageDraw, spec: ChartSpec) -> None:
    if not spec.title:
        return
    style = spec.style
    font = load_font(style.title_font, style.title_size)
    middle = PAD + style.title_size // 2
    if style.centred:
        draw.text((spec.width // 2, middle), spec.title, fill=style.ink, font=font, anchor="mm")
    else:
        draw.text((PAD, middle), spec.title, fill=style.ink, font=font, anchor="lm")


def _draw_legend(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    for (name, paint), (left, top) in zip(spec.legend_entries(), places.legend, strict=True):
        draw.rectangle((left, top, left + SWATCH - 1, top + SWATCH - 1), fill=paint.shade)
        _write(draw, spec, (left + SWATCH + GAP, top + SWATCH // 2), name, "lm")


def _paint_of(spec: ChartSpec, series: int, category: int) -> Paint:
    paint = spec.category_paints[category] if spec.category_paints else spec.series[series].paint
    assert paint is not None, f"a {spec.chart_type} needs colours"
    return paint


def _draw_value_axis(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    """Ticks, their labels and the grid; values run upwards."""
    labels = tick_labels(spec)
    if spec.axis:
        for index, label in enumerate(labels):
            y = _height_of(spec, places, index * spec.tick_step)
            if spec.style.grid and index:
                draw.line((places.left, y, places.right, y), fill=GRID)
            draw.line((places.left - 2, y, places.left, y), fill=AXIS)
            _write(draw, spec, (places.left - 4, y), label, "rm")
        draw.line((places.left, places.top, places.left, places.bottom), fill=AXIS)
    draw.line((places.left, places.bottom, places.right, places.bottom), fill=AXIS)


def _height_of(spec: ChartSpec, places: Places, value: float) -> int:
    """The y pixel of a value on a vertical axis."""
    return places.bottom - round((places.bottom - places.top) * value / spec.axis_top)


def _reach_of(spec: ChartSpec, places: Places, value: float) -> int:
    """The x pixel of a value on a horizontal axis."""
    return places.left + round((places.right - places.left) * value / spec.axis_top)


def _column(spec: ChartSpec, places: Places, index: int) -> float:
    """The middle of a category along a horizontal axis of categories, in pixels."""
    return places.left + (index + 0.5) * ((places.right - places.left) / len(spec.categories))


def _row(spec: ChartSpec, places: Places, index: int) -> float:
    """The middle of a category along a vertical axis of categories, in pixels."""
    return places.top + (index + 0.5) * ((places.bottom - places.top) / len(spec.categories))


def _bar(spec: ChartSpec, places: Places, number: int, index: int) -> tuple[float, float]:
    """Left side and thickness, in pixels, of the upright bar of a series and a category."""
    slot = (places.right - places.left) / len(spec.categories)
    thickness = slot * (0.86 if len(spec.series) > 1 else 0.66) / len(spec.series)
    return _column(spec, places, index) + (number - len(spec.series) / 2) * thickness, thickness


def _baseline_below(spec: ChartSpec, places: Places) -> int:
    """The y pixel on which labels below the plot stand, whatever letters they have."""
    return places.bottom + 3 + round(0.8 * spec.style.font_size)


def _draw_category_labels(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    for index, name in enumerate(spec.categories):
        _write(draw, spec, (round(_column(spec, places, index)), _baseline_below(spec, places)), name, "ms")


def _draw_vertical_bars(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    _draw_value_axis(draw, spec, places)
    _draw_category_labels(draw, spec, places)
    for number, series in enumerate(spec.series):
        for index, value in enumerate(series.values):
            start, thickness = _bar(spec, places, number, index)
            y = _height_of(spec, places, value)
            right = max(round(start + thickness) - 1, round(start))
            draw.rectangle((round(start), y, right, places.bottom - 1), fill=_paint_of(spec, number, index).shade)
            if spec.value_labels:
                _write(draw, spec, (round(start + thickness / 2), y - 3), spec.printed(value), "ms")


def _draw_horizontal_bars(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    if spec.axis:
        for index, label in enumerate(tick_labels(spec)):
            x = _reach_of(spec, places, index * spec.tick_step)
            if spec.style.grid and index:
                draw.line((x, places.top, x, places.bottom), fill=GRID)
            draw.line((x, places.bottom, x, places.bottom + 2), fill=AXIS)
            _write(draw, spec, (x, _baseline_below(spec, places)), label, "ms")
        draw.line((places.left, places.bottom, places.right, places.bottom), fill=AXIS)
    slot = (places.bottom - places.top) / len(spec.categories)
    for index, (name, value) in enumerate(zip(spec.categories, spec.series[0].values, strict=True)):
        middle, end = _row(spec, places, index), _reach_of(spec, places, value)
        top, bottom = round(middle - slot * 0.33), round(middle + slot * 0.33) - 1
        draw.rectangle((places.left, top, end, bottom), fill=_paint_of(spec, 0, index).shade)
        _write(draw, spec, (places.left - 4, round(middle)), name, "rm")
        if spec.value_labels:
            _write(draw, spec, (end + 3, round(middle)), spec.printed(value), "lm")
    draw.line((places.left, places.top, places.left, places.bottom), fill=AXIS)


def _draw_lines(image: Image.Image, draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    _draw_value_axis(draw, spec, places)
    _draw_category_labels(draw, spec, places)
    # The axes stay outside of the box that is redrawn larger; a marker on the topmost tick stays inside.
    box = (places.left + 1, places.top - 4, places.right, places.bottom)
    scale = SUPERSAMPLING
    large = image.crop(box).resize(((box[2] - box[0]) * scale, (box[3] - box[1]) * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    tracks = []
    for number, series in enumerate(spec.series):
        heights = [_height_of(spec, places, value) for value in series.values]
        track = [(_column(spec, places, index), y) for index, y in enumerate(heights)]
        tracks.append(track)
        shade = _paint_of(spec, number, 0).shade
        points = [((x - box[0] + 0.5) * scale, (y - box[1] + 0.5) * scale) for x, y in track]
        pen.line(points, fill=shade, width=2 * scale, joint="curve")
        for x, y in points:
            pen.ellipse((x - 2.5 * scale, y - 2.5 * scale, x + 2.5 * scale, y + 2.5 * scale), fill=shade)
    image.paste(large.reduce(scale), box[:2])
    if spec.value_labels:
        _label_line(draw, spec, places, tracks[0])


def _label_line(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places, track: list[tuple[float, int]]) -> None:
    """Print the values of a single line on the side of each point that the line leaves free."""
    size = spec.style.font_size
    for index, value in enumerate(spec.series[0].values):
        x, y = track[index]
        neighbours = [height for _, height in track[max(index - 1, 0) : index + 2]]
        below = sum(neighbours) / len(neighbours) < y
        baseline = y + 4 + round(0.8 * size) if below else y - 5
        # A thin outline of paper keeps a steep line off the digits.
        _write(draw, spec, (round(x), baseline), spec.printed(value), "ms", outline=spec.style.paper)


def _draw_pie(image: Image.Image, draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    scale = SUPERSAMPLING
    diameter = places.right - places.left
    large = Image.new("RGB", (diameter * scale, diameter * scale), spec.style.paper)
    pen = ImageDraw.Draw(large)
    angle, labels = -90.0, []
    for index, share in enumerate(spec.series[0].values):
        end = angle + share * 3.6
        pen.pieslice(
            (0, 0, diameter * scale - 1, diameter * scale - 1),
            angle,
            end,
            fill=_paint_of(spec, 0, index).shade,
            outline=spec.style.paper,
            width=scale,
        )
        labels.append((math.radians((angle + end) / 2), index))
        angle = end
    image.paste(large.reduce(scale), (places.left, places.top))
    for direction, index in labels:
        x = (places.left + places.right) / 2 + 0.34 * diameter * math.cos(direction)
        y = (places.top + places.bottom) / 2 + 0.34 * diameter * math.sin(direction)
        fill = text_colour(_paint_of(spec, 0, index).shade)
        _write(draw, spec, (round(x), round(y)), spec.printed(spec.series[0].values[index]), "mm", fill=fill)


def _draw_table(draw: ImageDraw.ImageDraw, spec: ChartSpec, places: Places) -> None:
    header = (spec.noun.capitalize(), *(one.name or spec.measure for one in spec.series))
    rows = [header]
    for index, name in enumerate(spec.categories):
        rows.append((name, *(spec.printed(one.values[index]) for one in spec.series)))
    height = places.row_height
    draw.rectangle((places.left, places.top, places.right, places.top + height), fill="#dfe6ee")
    for number, row in enumerate(rows):
        middle = places.top + number * height + height // 2 + 1
        _write(draw, spec, (places.left + 4, middle), row[0], "lm")
        for edge, text in zip(places.columns[1:], row[1:], strict=True):
            _write(draw, spec, (edge - 4, middle), text, "rm")
        line = places.top + number * height
        draw.line((places.left, line, places.right, line), fill=AXIS if number < 2 else GRID)
    draw.line((places.left, places.bottom, places.right, places.bottom), fill=AXIS)
    if spec.style.grid:
        for edge in (places.left, *places.columns):
            draw.line((edge, places.top, edge, places.bottom), fill=GRID)
