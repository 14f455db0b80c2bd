"""The figures of one run.

Every function takes a prefix that makes the ids inside its SVG unique in the page, and returns None when there is
nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vlm_sft.common import formats
from vlm_sft.report.records import PLOTTABLE, Benchmark, Best, DataPart, Forecast, GuardStep, Histogram
from vlm_sft.report.svg import DASHES, MARKERS, Drawing, Palette, Series, canvas, legend, rendered

SMOOTH_FROM_POINTS = 200
METRIC_PREFIX = "eval_"
NO_METRICS = ("eval_loss", "eval_seconds", "eval_questions_per_second", "eval_answer_seconds")
TOKEN_HISTOGRAMS = {
    "image_tokens": ("Tokens per image", "image tokens", "images"),
    "question_tokens": ("Tokens per question and answer", "tokens", "questions"),
    "answer_tokens": ("Tokens per answer", "supervised tokens", "questions"),
}
MOST_QUESTIONS = 40
Columns = dict[str, list[tuple[int, float]]]


def loss_drawing(series: Columns, best: Best | None, prefix: str) -> Drawing | None:
    """Draw training and evaluation loss over the steps with the best step marked.

    Args:
        series: metric name to (step, value) pairs; `loss` and `eval_loss` are used.
        best: the step to mark, if any.
        prefix: see the module.
    """
    train, evaluation = series.get("loss", []), series.get("eval_loss", [])
    if not train and not evaluation:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "step", "loss")
        if train:
            _plot_many(axes, train, palette, "training")
        if evaluation:
            axes.plot(
                *zip(*evaluation, strict=True),
                color=palette.second,
                marker="o",
                markersize=4,
                linewidth=1.6,
                label="evaluation",
            )
        if best is not None:
            axes.axvline(
                best.step, color=palette.text, linewidth=1, linestyle=(0, (4, 3)), label=f"best: step {best.step:,}"
            )
        legend(axes, palette)
        return figure

    named = (("Training loss", train), ("Evaluation loss", evaluation))
    words = [in_words(name, values) for name, values in named if values]
    if best is not None:
        value = "" if best.value is None else f" at {formats.number(best.value)}"
        words.append(f"Best step: {best.step:,} by {best.metric or 'an unnamed metric'}{value}.")
    return rendered("Loss", " ".join(words), draw, prefix)


def _plot_many(axes: Axes, points: Series, palette: Palette, label: str | None) -> None:
    """Draw every logged value; where they are many, pale, with their moving mean on top."""
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    crowded = len(points) >= SMOOTH_FROM_POINTS
    axes.plot(
        steps,
        values,
        color=palette.first,
        linewidth=0.8 if crowded else 1.6,
        alpha=0.35 if crowded else 1,
        marker="o" if len(points) == 1 else None,
        label=None if crowded else label,
    )
    if crowded:
        width = len(points) // 40
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        start = (width - 1) // 2
        axes.plot(
            steps[start : start + len(smooth)],
            smooth,
            color=palette.first,
            linewidth=1.6,
            label=label and f"{label} (mean of {width})",
        )


def learning_rate_drawing(series: Columns, prefix: str) -> Drawing | None:
    """Draw the learning rate over the steps."""
    return _single(series.get("learning_rate", []), "Learning rate", prefix)


def gradient_drawing(series: Columns, prefix: str) -> Drawing | None:
    """Draw the norm of the gradient, before it is clipped, over the steps."""
    return _single(series.get("grad_norm", []), "Gradient norm", prefix)


def _single(points: Series, title: str, prefix: str) -> Drawing | None:
    if not points:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "step", title.lower())
        _plot_many(axes, points, palette, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if min(value for _, value in points) >= 0:
            axes.set_ylim(bottom=0)
        return figure

    return rendered(title, in_words(title, points), draw, prefix)


def task_metrics(series: Columns) -> Columns:
    """The columns that are a benchmark's metric (0 to 1), by the name of the metric."""
    return {
        name.removeprefix(METRIC_PREFIX): points
        for name, points in series.items()
        if name.startswith(METRIC_PREFIX)
        and name not in NO_METRICS
        and not name.startswith("eval_loss")
        and all(0 <= value <= 1 for _, value in points)
    }


def metric_drawing(series: Columns, prefix: str) -> Drawing | None:
    """Draw the benchmarks' metrics at the evaluations during training."""
    metrics = dict(list(task_metrics(series).items())[: len(MARKERS)])
    if not metrics:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "step", "score, %")
        for place, (name, points) in enumerate(metrics.items()):
            _plot_line(axes, [(step, 100 * value) for step, value in points], palette, place, name)
        axes.set_ylim(bottom=0)
        legend(axes, palette, columns=1 if len(metrics) < 3 else 2)
        return figure

    words = [
        f"{name}: " + ", ".join(f"{formats.percent(value)} at step {step:,}" for step, value in points[-6:]) + "."
        for name, points in metrics.items()
    ]
    return rendered("Benchmarks during training", " ".join(words), draw, prefix)


def _plot_line(axes: Axes, points: Series, palette: Palette, place: int, label: str) -> None:
    """One of several lines: they differ in colour, dash and marker."""
    axes.plot(
        *zip(*points, strict=True),
        color=palette.series[place],
        linestyle=DASHES[place],
        marker=MARKERS[place],
        markersize=4,
        linewidth=1.6,
        label=formats.shorten_name(label, 40),
    )


def guard_drawing(steps: Sequence[GuardStep], prefix: str) -> Drawing | None:
    """Draw what a guarded benchmark scored at each evaluation, and how far it may fall."""
    names = list(dict.fromkeys(step.benchmark for step in steps))[: len(MARKERS)]
    if not names:
        return None
    by_name = {name: [step for step in steps if step.benchmark == name] for name in names}

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "step", "score, %")
        for place, (name, rows) in enumerate(by_name.items()):
            _plot_line(axes, [(row.step, 100 * row.score) for row in rows], palette, place, name)
            axes.axhline(100 * rows[-1].base, color=palette.series[place], linewidth=1, alpha=0.6)
            axes.axhline(max(0, 100 * rows[-1].floor), color=palette.series[place], linewidth=1, linestyle=(0, (2, 2)))
            for row in (row for row in rows if not row.qualifies):
                axes.plot([row.step], [100 * row.score], marker="x", markersize=9, color=palette.text)
        axes.plot([], [], color=palette.text, linewidth=1, label="base")
        axes.plot([], [], color=palette.text, linewidth=1, linestyle=(0, (2, 2)), label="limit")
        axes.set_ylim(bottom=0)
        legend(axes, palette)
        return figure

    words = []
    for name, rows in by_name.items():
        refused = [f"{row.step:,}" for row in rows if not row.qualifies]
        words.append(
            f"{name}: base {formats.percent(rows[-1].base)}, limit {formats.percent(max(0, rows[-1].floor))}, lowest "
            f"{formats.percent(min(row.score for row in rows))}; "
            + (f"lost too much at step {', '.join(refused)}." if refused else "no step lost too much.")
        )
    return rendered("Guard", " ".join(words), draw, prefix)


def accuracy_drawing(benchmarks: Sequence[Benchmark], prefix: str) -> Drawing | None:
    """Draw the accuracies of base and tuned model with their intervals, one row a benchmark."""
    rows = [one for one in benchmarks if any(s and s.accuracy is not None for s in (one.base, one.tuned))]
    if not rows:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "accuracy, %", "", height=1.15 + 0.45 * len(rows))
        for side, offset, colour, marker in (("base", 0.13, palette.second, "s"), ("tuned", -0.13, palette.first, "o")):
            label: str | None = side
            for row, benchmark in enumerate(reversed(rows)):
                score = benchmark.base if side == "base" else benchmark.tuned
                if score is None or score.accuracy is None:
                    continue
                if score.interval is not None:
                    axes.plot([100 * end for end in score.interval], [row + offset] * 2, color=colour, linewidth=2)
                axes.plot(
                    [100 * score.accuracy],
                    [row + offset],
                    color=colour,
                    marker=marker,
                    markersize=6,
                    linestyle="none",
                    label=label,
                )
                label = None
        # Names come from files: a dollar sign in them must not start a formula.
        names = [formats.shorten_name(one.name, 24) for one in reversed(rows)]
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, 100)
        _grid_across(axes, palette)
        legend(axes, palette)
        return figure

    words = [f"{one.name}: base {_percent_of(one.base)}, tuned {_percent_of(one.tuned)}." for one in rows]
    return rendered("Accuracy", " ".join(words), draw, prefix)


def _grid_across(axes: Axes, palette: Palette) -> None:
    """Vertical grid lines instead of horizontal ones."""
    axes.grid(axis="x", color=palette.grid, linewidth=0.8)
    axes.grid(visible=False, axis="y")


def _percent_of(score: object) -> str:
    return formats.percent(getattr(score, "accuracy", None))


def data_drawings(part: DataPart | None, prefix: str) -> list[Drawing]:
    """Draw how many questions an image has, and how many tokens, of the training part."""
    if part is None:
        return []
    sharing = _sharing(part.questions_per_image)
    drawings = [
        None if sharing is None else histogram_drawing(sharing, "Questions per image", "questions", "images", prefix)
    ]
    for key, (title, x_label, y_label) in TOKEN_HISTOGRAMS.items():
        if key in part.token_histograms:
            drawings.append(histogram_drawing(part.token_histograms[key], title, x_label, y_label, prefix))
    return [drawing for drawing in drawings if drawing is not None]


def _sharing(questions_per_image: dict[str, float]) -> Histogram | None:
    """How many images have 1, 2, … questions; what has more than MOST_QUESTIONS is counted there."""
    counts: dict[int, float] = {}
    for key, images in questions_per_image.items():
        if key.isascii() and key.isdigit() and len(key) < 10 and 0 <= images < PLOTTABLE:
            number = min(int(key), MOST_QUESTIONS)
            counts[number] = counts.get(number, 0) + images
    if not counts:
        return None
    low, high = min(counts), max(counts)
    return Histogram(tuple(range(low, high + 2)), tuple(counts.get(number, 0) for number in range(low, high + 1)))


def histogram_drawing(histogram: Histogram, title: str, x_label: str, y_label: str, prefix: str) -> Drawing | None:
    """Draw how often values fall between edges.

    Args:
        histogram: edges and counts.
        title: of the figure.
        x_label, y_label: what is counted, and of what.
        prefix: see the module.
    """
    if not histogram.counts:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, x_label, y_label, height=2.3)
        edges, counts = np.array(histogram.edges), np.array(histogram.counts)
        axes.bar(edges[:-1], counts, width=0.9 * np.diff(edges), align="edge", color=palette.first)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if all(width == 1 for width in np.diff(edges)):  # whole numbers: the tick belongs under the bar
            axes.set_xticks([])
            first, last = int(edges[0]), int(edges[-1]) - 1
            shown = range(first, last + 1, max(1, (last - first) // 8))
            axes.set_xticks([value + 0.45 for value in shown], [f"{value:,}" for value in shown])
        return figure

    total, peak = sum(histogram.counts), int(np.argmax(histogram.counts))
    low, high = histogram.edges[peak], histogram.edges[peak + 1]
    usual = f"{low:,.0f}" if high - low <= 1 else f"{low:,.0f} to {high - 1:,.0f}"
    alt = (
        f"{title}: {total:,.0f} {y_label}, {x_label} from {histogram.edges[0]:,.0f} to {histogram.edges[-1] - 1:,.0f}, "
        f"most often {usual}."
    )
    return rendered(title, alt, draw, prefix)


def forecast_drawing(rows: Sequence[Forecast], prefix: str) -> Drawing | None:
    """Draw what was forecast, with its interval, against what came, in percent of the forecast."""
    known = [(row, row.value) for row in rows if row.value and row.value > 0]
    if not known:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = canvas(palette, "% of the forecast", "", height=1.15 + 0.4 * len(known))
        for place, (row, value) in enumerate(reversed(known)):
            if row.interval is not None:
                axes.plot(
                    [100 * end / value for end in row.interval],
                    [place] * 2,
                    color=palette.second,
                    linewidth=6,
                    alpha=0.45,
                    solid_capstyle="butt",
                    label="expected range" if not place else None,
                )
            axes.plot(
                [100],
                [place],
                marker="|",
                markersize=14,
                color=palette.second,
                linestyle="none",
                label="forecast" if not place else None,
            )
            if row.actual is not None:
                axes.plot(
                    [100 * row.actual / value],
                    [place],
                    marker="o",
                    markersize=6,
                    color=palette.first,
                    linestyle="none",
                    label="actual" if not place else None,
                )
        axes.set_yticks(range(len(known)), [row.label for row, _ in reversed(known)])
        axes.set_ylim(-0.6, len(known) - 0.4)
        _grid_across(axes, palette)
        legend(axes, palette)
        return figure

    words = [f"{row.label}: forecast {row.text(value)}, actual {row.text(row.actual)}." for row, value in known]
    return rendered("Forecast against actual", " ".join(words), draw, prefix)


def in_words(name: str, points: Series) -> str:
    """A curve for those who cannot see it."""
    (first_step, first), (last_step, last) = points[0], points[-1]
    low_step, low = min(points, key=lambda point: (point[1], point[0]))
    return (
        f"{name} from {formats.number(first)} at step {first_step:,} to {formats.number(last)} at step {last_step:,}, "
        f"lowest {formats.number(low)} at step {low_step:,}."
    )
