"""The figure of quality against time: every run of a comparison as a point, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from vlm_sft.common import formats
from vlm_sft.report.label_placement import Label, name_points
from vlm_sft.report.records import Interval
from vlm_sft.report.svg import Drawing, Palette, canvas, legend, rendered

ALL_NAMED = 12  # runs up to which every point of the figure has its name; beyond, those of the front
MOST_NAMED = 30
RING = 11  # around the recommended point, its diameter in points
ROOMY_NAMES = 6  # names that a figure of the usual height has room for
LOG_FROM = 8.0  # ratio of the longest to the shortest training from which the axis of time is logarithmic
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
TICKS_SECONDS = (
    *(1, 2, 5, 10, 15, 20, 30),
    *(count * _MINUTE for count in (1, 2, 5, 10, 15, 20, 30)),
    *(count * _HOUR for count in (1, 2, 5, 10)),
    *(count * _DAY for count in (1, 2, 5, 10)),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model that could be taken.

    Attributes:
        name: the run, or the base model.
        is_base: whether it is a model that was not trained.
        seconds: its training took so long.
        accuracy, interval: 0 to 1, with 95 %.
        questions: how many it answered.
        on_front: no other candidate is both cheaper and better.
    """

    name: str
    is_base: bool
    seconds: float
    accuracy: float
    interval: Interval | None
    questions: int | None
    on_front: bool = False


def quality_drawing(
    benchmark: str, candidates: Sequence[Candidate], recommended: Candidate | None, prefix: str
) -> Drawing | None:
    """Draw accuracy against training time, with intervals, the front, the base as a line, and the recommendation.

    Args:
        benchmark: its name.
        candidates: by rising cost.
        recommended: the one to mark, or None.
        prefix: makes the ids inside the SVG unique in the page.
    """
    trained = [one for one in candidates if not one.is_base]
    front = [one for one in trained if one.on_front]
    if not trained:
        return None
    named = (front if len(trained) > ALL_NAMED else trained)[:MOST_NAMED]

    def draw(palette: Palette) -> Figure:
        height = 3.0 + 0.12 * max(0, len(named) - ROOMY_NAMES)
        figure, axes = canvas(palette, "training time", "accuracy, %", height)
        _draw_base(axes, [one for one in candidates if one.is_base], palette)
        _draw_runs(axes, trained, recommended, palette)
        axes.set_ylim(*_limits(candidates))
        _time_axis(axes, [one.seconds for one in trained])
        legend(axes, palette, columns=4)
        _name_points(axes, named, candidates, palette)
        return figure

    words = [
        f"{one.name}: {formats.percent(one.accuracy)} after {formats.duration(one.seconds)} of training"
        + (", on the front" if one.on_front else "")
        + "."
        for one in candidates[:20]
    ]
    if len(candidates) > 20:
        words.append(f"{len(candidates) - 20} more are in the table.")
    if recommended is not None:
        words.append(f"Recommended: {recommended.name}.")
    return rendered(f"Quality against time: {benchmark}", " ".join(words), draw, prefix)


def _draw_base(axes: Axes, bases: Sequence[Candidate], palette: Palette) -> None:
    """The untrained models: lines with their intervals."""
    for place, base in enumerate(bases):
        if base.interval is not None:
            axes.axhspan(*(100 * end for end in base.interval), color=palette.second, alpha=0.14, linewidth=0)
        style: dict[str, Any] = {"color": palette.second, "linewidth": 1.4, "linestyle": (0, (5, 3))}
        axes.axhline(100 * base.accuracy, **style, label=None if place else "base")


def _draw_runs(axes: Axes, trained: Sequence[Candidate], recommended: Candidate | None, palette: Palette) -> None:
    """The trained models: points with their intervals, those on the front joined, and a ring around the recommended."""
    beside = [one for one in trained if not one.on_front]
    front = [one for one in trained if one.on_front]
    for group, colour, line, label in (
        (beside, palette.faint, "none", "run"),
        (front, palette.first, "solid", "on the front"),
    ):
        for one in group:
            if one.interval is not None:
                ends = [100 * end for end in one.interval]
                axes.plot([one.seconds] * 2, ends, color=colour, linewidth=1.2, alpha=0.7)
        if group:
            points = [one.seconds for one in group], [100 * one.accuracy for one in group]
            axes.plot(*points, color=colour, marker="o", markersize=6, linestyle=line, linewidth=1.2, label=label)
    if recommended is not None and not recommended.is_base:
        axes.plot(
            [recommended.seconds],
            [100 * recommended.accuracy],
            marker="o",
            markersize=RING,
            linestyle="none",
            markerfacecolor="none",
            markeredgecolor=palette.text,
            markeredgewidth=1.4,
            label="recommended",
        )


def _limits(candidates: Sequence[Candidate]) -> tuple[float, float]:
    """The range of the axis of accuracy in percent: of all intervals, with some air, within 0 to 100."""
    ends = [end for one in candidates for end in (one.interval or ()) if 0 <= end <= 1]
    ends += [one.accuracy for one in candidates]
    return accuracy_limits([100 * end for end in ends])


def accuracy_limits(ends: Sequence[float], air: float = 0.12) -> tuple[float, float]:
    """The range of an axis of accuracy in percent.

    Args:
        ends: what it has to show, percent.
        air: share of that range that stays free below and above, and at least 2 points, within 0 to about 100.
    """
    low, high = min(ends), max(ends)
    margin = max(2.0, air * (high - low))
    return max(0.0, low - margin), min(102.0, high + margin)


def _time_axis(axes: Any, seconds: Sequence[float]) -> None:
    """An axis of time with round ticks; logarithmic where the times differ a lot."""
    low, high = min(seconds), max(seconds)
    if low > 0 and high / low >= LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * 1.6)
        axes.xaxis.set_major_locator(FixedLocator(_spaced(low / 1.6, high * 1.6)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        end = 1.12 * (high or 1)
        step = next((t for t in TICKS_SECONDS if end / t <= 6), TICKS_SECONDS[-1])
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(FixedLocator([step * place for place in range(int(end / step) + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_time(value)))


def _spaced(low: float, high: float) -> list[int]:
    """Round ticks of a logarithmic axis, far enough from each other for their labels."""
    apart = max(1.5, (high / low) ** (1 / 7))
    found: list[int] = []
    for tick in TICKS_SECONDS:
        if low <= tick <= high and (not found or tick >= apart * found[-1]):
            found.append(tick)
    return found


def _short_time(seconds: float) -> str:
    """Seconds as the label of a tick: "90 s", "5 min", "2 h", "3 d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (seconds >= size and seconds % size == 0):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds else "0"


def _name_points(axes: Axes, named: Sequence[Candidate], candidates: Sequence[Candidate], palette: Palette) -> None:
    """Names beside points, clear of all points, and of intervals, front and base where that can be."""
    trained = [one for one in candidates if not one.is_base]
    curves = [[(one.seconds, 100 * end) for end in one.interval] for one in trained if one.interval is not None]
    curves.append([(one.seconds, 100 * one.accuracy) for one in trained if one.on_front])
    curves += [[(x, 100 * one.accuracy) for x in axes.get_xlim()] for one in candidates if one.is_base]
    name_points(
        axes,
        [Label(one.name, one.seconds, 100 * one.accuracy, palette.text) for one in named],
        leader_colour=palette.faint,
        others=[(one.seconds, 100 * one.accuracy) for one in trained if one not in named],
        curves=curves,
        radius=RING / 2,
    )
