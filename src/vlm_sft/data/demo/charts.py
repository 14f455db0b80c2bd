"""Random synthetic charts: a data table and a look.

Ties are avoided by construction: values differ within a series and within a category, and the largest and the
smallest value of a chart are unique. Without value labels every value lies on a tick or halfway between two and at
least one tick above zero, so a reader finds it well within the 5 % that relaxed accuracy allows.
"""

from __future__ import annotations

from random import Random

from vlm_sft.data.demo.layout import place
from vlm_sft.data.demo.spec import CHART_TYPES, ChartSpec, Paint, Series, Style
from vlm_sft.data.demo.vocabulary import COLOURS, KINDS, PERCENT_MEASURES, SERIES_NAMES, Kind

SIZES = ((192, 128), (192, 160), (224, 160), (256, 192))
TYPE_WEIGHTS = {"bar": 4, "horizontal_bar": 3, "grouped_bar": 3, "line": 4, "pie": 3, "table": 2}
PAPERS = ("#ffffff", "#ffffff", "#ffffff", "#ffffff", "#fbf8f0", "#f4f7fb", "#f5f5f5")
INKS = ("#111111", "#111111", "#222222", "#1d2b45")
# Label fonts that stay legible at their smallest size.
LABEL_FONTS = (
    ("sans", 10),
    ("sans", 11),
    ("pillow", 11),
    ("pillow", 12),
    ("serif", 10),
    ("times", 11),
    ("computer sans", 11),
)
TITLE_FONTS = ("sans bold", "sans", "serif bold", "times bold", "computer bold", "pillow")
MAX_ATTEMPTS = 400


def random_chart(rng: Random, chart_type: str | None = None, size: tuple[int, int] | None = None) -> ChartSpec:
    """Draw a random chart whose parts fit its picture.

    Args:
        rng: the only source of randomness; equal states give equal charts.
        chart_type: one of CHART_TYPES; drawn at random when None.
        size: width and height in pixels, multiples of 16; one of SIZES when None. A type that is drawn at random and
            hardly fits a small one gives way to another.
    """
    free = chart_type is None and size is not None
    if chart_type is None:
        chart_type = rng.choices(CHART_TYPES, weights=[TYPE_WEIGHTS[name] for name in CHART_TYPES])[0]
    size = size or rng.choice(SIZES)
    for _ in range(MAX_ATTEMPTS):
        spec = _propose(rng, chart_type, size)
        if spec is not None and place(spec) is not None:
            return spec
    if free:
        return random_chart(rng, size=size)
    raise AssertionError(f"no {chart_type} of {size} fits after {MAX_ATTEMPTS} attempts")


def _propose(rng: Random, chart_type: str, size: tuple[int, int]) -> ChartSpec | None:
    kind = rng.choice(KINDS)
    percent = chart_type == "pie" or rng.random() < 0.2
    measure = rng.choice(PERCENT_MEASURES if percent else kind.measures)
    categories = _categories(rng, kind, _category_count(rng, chart_type))
    names = _series_names(rng, chart_type)
    if set(names) & set(kind.labels):
        return None
    value_labels = _has_value_labels(rng, chart_type, len(names))
    axis_top, tick_step, decimals = _axis(rng, chart_type, percent, value_labels)
    rows = _rows(rng, chart_type, (len(names), len(categories)), percent, value_labels, (axis_top, tick_step, decimals))
    if rows is None:
        return None
    category_paints, series_paints = _paints(rng, chart_type, len(categories), len(names))
    legend = "none"
    if chart_type == "pie":
        legend = "right"
    elif len(names) > 1 and chart_type != "table":
        legend = rng.choice(("top", "top", "right"))
    return ChartSpec(
        chart_type=chart_type,
        width=size[0],
        height=size[1],
        title=_title(rng, kind, measure, percent),
        noun=kind.noun,
        plural=kind.plural,
        preposition=kind.preposition,
        measure=measure,
        unit="%" if percent else "",
        decimals=decimals,
        categories=categories,
        category_paints=category_paints,
        series=tuple(Series(*parts) for parts in zip(names, series_paints, rows, strict=True)),
        value_labels=value_labels,
        axis=not value_labels or (axis_top > 0 and rng.random() < 0.6),
        axis_top=axis_top,
        tick_step=tick_step,
        legend=legend,
        style=_style(rng),
    )


def _category_count(rng: Random, chart_type: str) -> int:
    return rng.randint(*{"grouped_bar": (2, 4), "pie": (3, 6)}.get(chart_type, (3, 7)))


def _categories(rng: Random, kind: Kind, count: int) -> tuple[str, ...]:
    count = min(count, len(kind.labels))
    if kind.ordered:
        start = rng.randrange(len(kind.labels) - count + 1)
        return kind.labels[start : start + count]
    return tuple(rng.sample(kind.labels, count))


def _series_names(rng: Random, chart_type: str) -> tuple[str, ...]:
    """Names of the series; one empty name when the chart has a single series."""
    if chart_type == "grouped_bar":
        count = rng.choice((2, 2, 3))
    elif chart_type in ("line", "table"):
        count = rng.choice((1, 2, 2, 3))
    else:
        count = 1
    if count == 1:
        return ("",)
    names = rng.choice([names for names in SERIES_NAMES if len(names) >= count])
    return names[:count]


def _has_value_labels(rng: Random, chart_type: str, series: int) -> bool:
    if chart_type in ("pie", "table"):
        return True
    # Printed values of several lines would cover each other.
    return not (chart_type == "line" and series > 1) and rng.random() < 0.6


def _axis(rng: Random, chart_type: str, percent: bool, value_labels: bool) -> tuple[float, float, int]:
    """End of the value axis, distance of its ticks, digits after the point."""
    if chart_type == "pie":
        return 0, 0, 0
    # Half a tick must be printable: without value labels 5 is no step.
    steps = [2, 5, 10, 20] if value_labels else [2, 10, 20]
    step = rng.choice(steps if percent else [*steps, 1, 50, 100, 200])
    top = step * rng.choice((4, 5, 6) if not (percent and step == 20) else (4, 5))
    if value_labels:
        decimals = 1 if top <= 12 or (top <= 120 and rng.random() < 0.25) else 0
    else:
        decimals = 1 if step == 1 else 0
    return (0, 0, decimals) if chart_type == "table" else (top, step, decimals)


def _rows(
    rng: Random,
    chart_type: str,
    shape: tuple[int, int],
    percent: bool,
    value_labels: bool,
    axis: tuple[float, float, int],
) -> tuple[tuple[float, ...], ...] | None:
    """Values of all series without ties, or None when this attempt found none."""
    if chart_type == "pie":
        return (_shares(rng, shape[1]),)
    top, step, decimals = axis
    if not value_labels:
        pool = [level * step / 2 for level in range(2, 2 * round(top / step) + 1)]
    else:
        if chart_type == "table":
            top = rng.choice((10, 20, 60) if decimals else (20, 60, 100) if percent else (20, 60, 100, 500))
        scale = 10**decimals
        # Printed values with a decimal never end in ".0": "12.0" and "12" would be one value with two spellings.
        smallest = 0.3 if chart_type == "line" else 0.12
        counts = range(round(smallest * top * scale), round(top * scale) + 1)
        pool = [count / scale for count in counts if scale == 1 or count % 10]
    values = [int(value) if value == int(value) else value for value in pool]
    if len(values) < shape[1]:
        return None
    rows = tuple(tuple(rng.sample(values, shape[1])) for _ in range(shape[0]))
    return rows if _without_ties(rows) else None


def _without_ties(rows: tuple[tuple[float, ...], ...]) -> bool:
    everything = [value for row in rows for value in row]
    if everything.count(max(everything)) > 1 or everything.count(min(everything)) > 1:
        return False
    lines = (*rows, *zip(*rows, strict=True))
    return all(len(set(line)) == len(line) for line in lines)


def _shares(rng: Random, count: int) -> tuple[int, ...]:
    """Different percentages of at least 9 that add up to 100."""
    smallest = 9
    while True:
        cuts = sorted(rng.sample(range(1, 100 - smallest * count), count - 1))
        edges = [0, *cuts, 100 - smallest * count]
        shares = tuple(smallest + high - low for low, high in zip(edges, edges[1:], strict=False))
        if len(set(shares)) == count:
            return shares


def _paints(
    rng: Random, chart_type: str, categories: int, series: int
) -> tuple[tuple[Paint, ...], tuple[Paint | None, ...]]:
    """Colours of the categories, or of the series."""
    if chart_type == "table":
        return (), (None,) * series
    by_category = chart_type == "pie" or (chart_type in ("bar", "horizontal_bar") and rng.random() < 0.5)
    names = rng.sample(tuple(COLOURS), categories if by_category else series)
    paints = tuple(Paint(name, rng.choice(COLOURS[name])) for name in names)
    return (paints, (None,)) if by_category else ((), paints)


def _title(rng: Random, kind: Kind, measure: str, percent: bool) -> str:
    if rng.random() < 0.1:
        return ""
    # "Sales of years" is no English.
    third = measure if kind.ordered else f"{measure} of {kind.plural}"
    title = rng.choice((f"{measure} by {kind.noun}", f"{measure} per {kind.noun}", third, measure))
    if percent and rng.random() < 0.5:
        return f"{title} (%)"
    if not kind.ordered and rng.random() < 0.25:
        return f"{title}, {rng.randint(2001, 2024)}"
    return title


def _style(rng: Random) -> Style:
    font, font_size = rng.choice(LABEL_FONTS)
    return Style(
        font=font,
        font_size=font_size,
        title_font=rng.choice(TITLE_FONTS),
        title_size=rng.choice((11, 12, 13)),
        paper=rng.choice(PAPERS),
        ink=rng.choice(INKS),
        grid=rng.random() < 0.6,
        centred=rng.random() < 0.7,
    )
