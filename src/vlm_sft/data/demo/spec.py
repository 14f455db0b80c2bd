"""The drawing specification of a synthetic chart: what picture and questions are made from."""

from __future__ import annotations

from dataclasses import dataclass

CHART_TYPES = ("bar", "horizontal_bar", "grouped_bar", "line", "pie", "table")


@dataclass(frozen=True, slots=True)
class Paint:
    """A colour: the name that questions use, and its shade as "#rrggbb"."""

    name: str
    shade: str


@dataclass(frozen=True, slots=True)
class Series:
    """One row of data.

    Attributes:
        name: what the legend calls it; "" when a chart has a single series.
        paint: its colour; None where colours belong to categories instead.
        values: one for each category, as printed: integers or one decimal.
    """

    name: str
    paint: Paint | None
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """How a chart looks; sizes in pixels.

    Attributes:
        font, font_size: of labels; see `fonts`.
        title_font, title_size: of the title.
        paper, ink: "#rrggbb" of the background and of text.
        grid: lines across the plot at every tick.
        centred: the title stands in the middle, otherwise at the left.
    """

    font: str
    font_size: int
    title_font: str
    title_size: int
    paper: str
    ink: str
    grid: bool
    centred: bool


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """One chart.

    Attributes:
        chart_type: one of CHART_TYPES.
        width, height: pixels, multiples of 16.
        title: "" for none.
        noun, plural, preposition: how questions name the categories: "fruit", "fruits", "for".
        measure: what the values are: "Sales".
        unit: "" or "%".
        decimals: digits after the point of printed values: 0 or 1.
        categories: labels along the axis, of the slices, or of the table's rows.
        category_paints: the colour of every category; empty where colours belong to series or to nothing.
        series: one or more rows of data.
        value_labels: every value is printed. Otherwise every value lies on a tick or in the middle between two.
        axis: tick labels are drawn; always true without value labels.
        axis_top, tick_step: end of the value axis and distance of its ticks, in values; 0 for pies and tables.
        legend: "none", "top" or "right".
        style: fonts and colours.
    """

    chart_type: str
    width: int
    height: int
    title: str
    noun: str
    plural: str
    preposition: str
    measure: str
    unit: str
    decimals: int
    categories: tuple[str, ...]
    category_paints: tuple[Paint, ...]
    series: tuple[Series, ...]
    value_labels: bool
    axis: bool
    axis_top: float
    tick_step: float
    legend: str
    style: Style

    def legend_entries(self) -> tuple[tuple[str, Paint], ...]:
        """Names and colours that the legend shows."""
        if self.legend == "none":
            return ()
        if self.category_paints:
            return tuple(zip(self.categories, self.category_paints, strict=True))
        return tuple((one.name, one.paint) for one in self.series if one.paint is not None)

    def printed(self, value: float) -> str:
        """A value as the chart prints it."""
        return f"{value:.{self.decimals}f}{self.unit}"
