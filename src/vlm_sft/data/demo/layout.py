"""Where the parts of a synthetic chart stand, and whether they fit.

`place` is asked twice: when a chart is made, to reject what would overlap or be clipped, and when it is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.data.demo.fonts import text_width
from vlm_sft.data.demo.spec import ChartSpec

PAD = 3
SWATCH = 8
GAP = 3
PIE_MIN_DIAMETER = 84


@dataclass(frozen=True, slots=True)
class Places:
    """Pixels of a chart's parts.

    Attributes:
        left, top, right, bottom: the box of the plot, of the pie, or of the table.
        legend: left and top of every legend swatch.
        columns: right edges of a table's columns.
        row_height: of a table.
    """

    left: int
    top: int
    right: int
    bottom: int
    legend: tuple[tuple[int, int], ...] = ()
    columns: tuple[int, ...] = ()
    row_height: int = 0


def label_width(spec: ChartSpec, text: str) -> int:
    """Width in pixels of a label in the chart's font."""
    return text_width(spec.style.font, spec.style.font_size, text)


def tick_labels(spec: ChartSpec) -> list[str]:
    """Labels of the value axis from 0 to its end."""
    count = round(spec.axis_top / spec.tick_step)
    return [f"{index * spec.tick_step:g}{spec.unit}" for index in range(count + 1)]


def place(spec: ChartSpec) -> Places | None:
    """Compute where the parts of a chart stand.

    Returns:
        The places, or None when a label would overlap another one or leave the picture.
    """
    style = spec.style
    top = PAD
    if spec.title:
        if text_width(style.title_font, style.title_size, spec.title) > spec.width - 2 * PAD:
            return None
        top += style.title_size + 5
    box = _with_legend(spec, top)
    if box is None:
        return None
    if spec.chart_type == "pie":
        return _pie(box)
    if spec.chart_type == "table":
        return _table(spec, box)
    if spec.chart_type == "horizontal_bar":
        return _horizontal(spec, box)
    return _vertical(spec, box)


def _with_legend(spec: ChartSpec, top: int) -> Places | None:
    """The box that title and legend leave over, with the legend placed."""
    box = Places(PAD, top, spec.width - PAD, spec.height - PAD)
    widths = [SWATCH + GAP + label_width(spec, name) for name, _ in spec.legend_entries()]
    if not widths:
        return box
    row = spec.style.font_size + 4
    if spec.legend == "top":
        spare = (spec.width - 2 * PAD - sum(widths)) // len(widths)
        if spare < 6:
            return None
        spacing = min(spare, 14)
        swatches, left = [], (spec.width - sum(widths) - spacing * (len(widths) - 1)) // 2
        for width in widths:
            swatches.append((left, top + (row - SWATCH) // 2))
            left += width + spacing
        return Places(PAD, top + row + 1, box.right, box.bottom, tuple(swatches))
    left = spec.width - PAD - max(widths)
    height = row * len(widths)
    if height > box.bottom - top:
        return None
    start = top + (box.bottom - top - height) // 2
    swatches = [(left, start + index * row + (row - SWATCH) // 2) for index in range(len(widths))]
    return Places(PAD, top, left - 8, box.bottom, tuple(swatches))


def _pie(box: Places) -> Places | None:
    diameter = min(box.right - box.left, box.bottom - box.top)
    if diameter < PIE_MIN_DIAMETER:
        return None
    left = (box.left + box.right - diameter) // 2
    top = (box.top + box.bottom - diameter) // 2
    return Places(left, top, left + diameter, top + diameter, box.legend)


def _table(spec: ChartSpec, box: Places) -> Places | None:
    header = [one.name or spec.measure for one in spec.series]
    widths = [max(label_width(spec, text) for text in (spec.noun.capitalize(), *spec.categories)) + 8]
    for name, one in zip(header, spec.series, strict=True):
        widths.append(max(label_width(spec, text) for text in (name, *map(spec.printed, one.values))) + 10)
    spare = box.right - box.left - sum(widths)
    row_height = min((box.bottom - box.top) // (len(spec.categories) + 1), spec.style.font_size + 9)
    if spare < 0 or row_height < spec.style.font_size + 4:
        return None
    columns, edge = [], box.left
    for width in widths:
        edge += width + spare // len(widths)
        columns.append(edge)
    bottom = box.top + row_height * (len(spec.categories) + 1)
    return Places(box.left, box.top, edge, bottom, (), tuple(columns), row_height)


def _vertical(spec: ChartSpec, box: Places) -> Places | None:
    """Bars that stand, grouped bars and lines."""
    size = spec.style.font_size
    ticks = tick_labels(spec)
    left = box.left + (max(label_width(spec, text) for text in ticks) + 5 if spec.axis else 2)
    top = box.top + (size + 3 if spec.value_labels else size // 2 + 1)
    plot = Places(left, top, box.right, box.bottom - size - 3, box.legend)
    slot = (plot.right - plot.left) / len(spec.categories)
    if spec.axis and (plot.bottom - plot.top) / (len(ticks) - 1) < size + 2:
        return None
    if plot.bottom - plot.top < 48 or max(label_width(spec, text) for text in spec.categories) > slot - 4:
        return None
    if spec.value_labels:
        lowest = min(value for one in spec.series for value in one.values) / spec.axis_top
        if spec.chart_type == "line" and lowest * (plot.bottom - plot.top) < size + 7:
            # The value of a low point is printed below it, above the axis.
            return None
        room = slot * 0.86 / len(spec.series) - 1 if len(spec.series) > 1 else slot - 3
        if max(label_width(spec, spec.printed(value)) for one in spec.series for value in one.values) > room:
            return None
    return plot


def _horizontal(spec: ChartSpec, box: Places) -> Places | None:
    size = spec.style.font_size
    ticks = tick_labels(spec)
    left = box.left + max(label_width(spec, text) for text in spec.categories) + 5
    if spec.value_labels:
        right = box.right - max(label_width(spec, spec.printed(value)) for value in spec.series[0].values) - 3
    else:
        right = box.right - label_width(spec, ticks[-1]) // 2 - 1
    plot = Places(left, box.top + 1, right, box.bottom - (size + 3 if spec.axis else 0), box.legend)
    if plot.right - plot.left < 72 or (plot.bottom - plot.top) / len(spec.categories) < size + 3:
        return None
    if spec.axis:
        needed = max(label_width(spec, text) for text in ticks) + 6
        if (plot.right - plot.left) / (len(ticks) - 1) < needed:
            return None
    return plot
