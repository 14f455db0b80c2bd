"""The lessons of pocket on the drawings of the demo sets.

Most questions are worded in our own way, like the captions of a form and unlike the sentences of the demo sets:
"Oak > 30?", "More: Oak or Elm?". In the words of the demo sets pocket is asked what signs say, but nothing about
charts: that is left to fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from tools.pocket.canvas import Picture, Record
from tools.pocket.labels import Label, label_targets, rank
from vlm_sft.data.demo.chart_reader import NAMED_PARTS, drawn_parts, plain
from vlm_sft.data.demo.charts import SIZES, random_chart
from vlm_sft.data.demo.drawing import draw_chart, mark_ends
from vlm_sft.data.demo.sign_drawing import draw_sign
from vlm_sft.data.demo.sign_questions import sign_questions
from vlm_sft.data.demo.signs import SIGN_TYPES, random_sign
from vlm_sft.data.demo.signs import SIZES as SIGN_SIZES
from vlm_sft.data.demo.spec import ChartSpec

CHART_SIZES = SIZES
BOARD_SIZES = SIGN_SIZES
Pairs = list[tuple[str, str]]
READ_VALUE = ("{}?", "{}: value?", "Read {}.", "Number of {}?", "Value, {}?")
READ_CELL = ("{label}, {series}?", "Read {series} at {label}.", "{series} / {label}?", "Number of {series}, {label}?")
QUESTIONS = 10  # of one picture, at most
ASKED_SIGNS = 4  # questions in the demo set's words
MOST = ("top", "greatest", "biggest", "maximum")
READ_EXTREME = ("The {} value?", "Read the {} value.", "{} number?")
LEAST = ("bottom", "least", "minimum")
COLOUR_OF = ("Colour of {}?", "Color of {}?", "{}: colour?", "Name the color of {}.")
MORE_OF = ("More{2}: {0} or {1}?", "More: {0} / {1}{2}?", "Name the greater one{2}: {0}, {1}.")
LESS_OF = ("Less{2}: {0} or {1}?", "Less: {0} / {1}{2}?", "Name the lesser one{2}: {0}, {1}.")
READ_ROLE = ("Read the {}.", "What {} is written?", "Which {} do you see?", "Give the {}.", "Tell the {}.")


def chart(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart of one size with up to ten questions: values, labels, extremes, legend, title, structure."""
    return _chart("chart", random_chart(rng, size=size), rng)


def view(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart without questions: only the vision tower learns from it, in half the time."""
    return _chart("view", random_chart(rng, size=size), None)


def series_chart(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart with several series, with up to ten questions."""
    spec = random_chart(rng, size=size)
    while len(spec.series) == 1:
        spec = random_chart(rng, size=size)
    return _chart("chart", spec, rng)


def _chart(task: str, spec: ChartSpec, rng: Random | None) -> Picture:
    """The picture of a chart, with questions if there is an `rng` to choose them by."""
    labels = chart_labels(spec)
    numbers = {label.text: number for number, label in enumerate(labels, start=1)}
    record = Record(spec.width, spec.height, numbers)
    pixels = np.asarray(draw_chart(spec, record.pen))
    for (x, y), label in chart_marks(spec):
        labels.append(label)
        record.mark(x, y, len(labels))
    questions: tuple[tuple[str, str], ...] = ()
    if rng is not None:
        pairs = _single(rng, spec) if len(spec.series) == 1 else _several(rng, spec)
        questions = _chosen(rng, _values(rng, spec), pairs + _structure(rng, spec))
    targets = label_targets(record.labels(), labels, questions)
    return Picture(task, pixels, questions, record.slots(), **targets)


def chart_labels(spec: ChartSpec) -> list[Label]:
    """The labels of a chart: its categories, its series, and the printed values of a pie or a table."""
    colours = [paint.name for paint in spec.category_paints] or [""] * len(spec.categories)
    labels = [
        Label(text, "category", [plain(value) for value in values], colour, ranks=ranks, order=order)
        for order, (text, colour, values, ranks) in enumerate(
            zip(
                spec.categories,
                colours,
                zip(*(one.values for one in spec.series), strict=True),
                _ranks(spec),
                strict=True,
            )
        )
    ]
    several = len(spec.series) > 1
    if several:
        labels += [
            Label(one.name, "series", colour=one.paint.name if one.paint else "", place=place)
            for place, one in enumerate(spec.series)
        ]
    if spec.chart_type in ("pie", "table"):
        texts = [spec.printed(value) for one in spec.series for value in one.values]
        taken = {label.text for label in labels} | {text for text in texts if texts.count(text) > 1}
        labels += [
            Label(spec.printed(value), "value", [plain(value)], colour, place if several else None, order=order)
            for place, one in enumerate(spec.series)
            for order, (value, colour) in enumerate(zip(one.values, colours, strict=True))
            if spec.printed(value) not in taken
        ]
    return labels


def _ranks(spec: ChartSpec) -> list[list[int]]:
    """The rank of each value in its series: a list for every category with one for every series."""
    return [[rank(one.values[index], one.values) for one in spec.series] for index in range(len(spec.categories))]


def chart_marks(spec: ChartSpec) -> list[tuple[tuple[int, int], Label]]:
    """The ends of the bars and the points of the lines: x and y in pixels, and what is known there."""
    marks, ranks = [], _ranks(spec)
    for place, (one, ends) in enumerate(zip(spec.series, mark_ends(spec), strict=False)):
        for index, (value, end) in enumerate(zip(one.values, ends, strict=True)):
            paint = spec.category_paints[index] if spec.category_paints else one.paint
            several = place if len(spec.series) > 1 else None
            own, colour = ranks[index][place : place + 1], paint.name if paint else ""
            marks.append((end, Label("", "value", [plain(value)], colour, several, own, index)))
    return marks


def _chosen(rng: Random, first: Pairs, rest: Pairs) -> tuple[tuple[str, str], ...]:
    """All of `first` and some of `rest`, in random order, QUESTIONS altogether where there are as many."""
    pairs = [*first, *pick(rng, rest, QUESTIONS - len(first))]
    rng.shuffle(pairs)
    return tuple(pairs)


def board(rng: Random, size: tuple[int, int]) -> Picture:
    """A sign of the demo set, of one size: its lines by place and by what they are, answered in small letters.

    TextVQA's metric knows small letters only, and so do the answers of the demo set.
    """
    spec = random_sign(rng)
    while (spec.width, spec.height) != size:
        spec = random_sign(rng)
    lines, thing = [line.text.lower() for line in spec.lines], SIGN_TYPES[spec.sign_type].thing
    whole, first, last = " ".join(lines), lines[0], lines[-1]
    pairs = [(rng.choice(READ_ROLE).format(line.role), text) for line, text in zip(spec.lines, lines, strict=True)]
    pairs += [
        (rng.choice(("Read everything.", "Give the whole text.", f"Read the {thing}.")), whole),
        (rng.choice(("Top line?", "Read the text at the top.", "Which text is at the top?")), first),
        (rng.choice(("Bottom line?", "Read the text at the bottom.", "Which text is at the bottom?")), last),
        (rng.choice(("Name the first word.", "What is the first word?")), whole.split()[0]),
        (rng.choice(("Name the last word.", "What is the last word?")), whole.split()[-1]),
    ]
    asked = [(one.text, one.target) for one in sign_questions(spec, rng, ASKED_SIGNS)]
    record = Record(*size)
    pixels = np.asarray(draw_sign(spec, record.pen))
    return Picture("board", pixels, _chosen(rng, asked, pairs), record.slots(spec.rotation_degrees))


def _values(rng: Random, spec: ChartSpec) -> Pairs:
    """Four questions that read one value, or whose it is."""
    pairs: Pairs = []
    for index in rng.sample(range(len(spec.categories)), min(3, len(spec.categories))):
        one, label = rng.choice(spec.series), spec.categories[index]
        form = rng.choice(READ_VALUE if len(spec.series) == 1 else READ_CELL)
        pairs.append((form.format(label, label=label, series=one.name), plain(one.values[index])))
    one, index = rng.choice(spec.series), rng.randrange(len(spec.categories))
    where = f", {one.name}" if len(spec.series) > 1 else ""
    owner = rng.choice((f"Owner of {{}}{where}?", f"{{}}{where}: which {spec.noun}?"))
    return [*pairs, (owner.format(spec.printed(one.values[index])), spec.categories[index])]


def _single(rng: Random, spec: ChartSpec) -> Pairs:
    """Questions in our own words about a chart with one series."""
    pairs: Pairs = []
    table = list(zip(spec.categories, spec.series[0].values, strict=True))
    top, low = max(table, key=lambda one: one[1]), min(table, key=lambda one: one[1])
    pairs += [
        (_extreme(rng, spec, MOST), top[0]),
        (_extreme(rng, spec, LEAST), low[0]),
        (rng.choice(READ_EXTREME).format(rng.choice(MOST)), plain(top[1])),
        (rng.choice(READ_EXTREME).format(rng.choice(LEAST)), plain(low[1])),
    ]
    for _ in range(4):
        pairs += compared(rng, table, "")
    for _ in range(2):
        pairs += against_level(rng, spec.plural, spec.printed, table, "")
        pairs += added(rng, table, "")
    if len(table) > 3:
        ranked = sorted(table, key=lambda one: one[1], reverse=True)
        pairs += [(f"Second {spec.noun} of all?", ranked[1][0]), (f"Last {spec.noun} but one of all?", ranked[-2][0])]
    return pairs + _colours(rng, spec, table)


def _colours(rng: Random, spec: ChartSpec, table: Sequence[tuple[str, float]]) -> Pairs:
    """The colours of a chart with one series: of its categories, or of all."""
    paints = list(zip(table, spec.category_paints, strict=False))
    paint = spec.series[0].paint
    if not paints:
        return [(f"{NAMED_PARTS[spec.chart_type].capitalize()}s: which colour?", paint.name)] if paint else []
    some = min(2, len(paints))
    pairs = [(rng.choice(COLOUR_OF).format(label), paint.name) for (label, _), paint in rng.sample(paints, some)]
    for (label, _), paint in rng.sample(paints, some):
        pairs.append((rng.choice((f"{spec.noun.capitalize()}: {paint.name}?", f"Owner of {paint.name}?")), label))
    (_, value), paint = rng.choice(paints)
    return [*pairs, (f"{paint.name.capitalize()}: number?", plain(value))]


def compared(rng: Random, table: Sequence[tuple[str, float]], where: str) -> Pairs:
    """Two questions that compare two values; `where` ends them: ", May" or nothing."""
    (one, first), (other, second) = rng.sample(table, 2)
    larger, smaller = (one, other) if first > second else (other, one)
    over = rng.random() < 0.5
    pairs = [(f"{one} {'>' if over else '<'} {other}{where}?", "Yes" if (larger == one) == over else "No")]
    if rng.random() < 0.5:
        return [*pairs, (rng.choice(MORE_OF).format(one, other, where), larger)]
    return [*pairs, (rng.choice(LESS_OF).format(one, other, where), smaller)]


def against_level(
    rng: Random, plural: str, write: Callable[[float], str], table: Sequence[tuple[str, float]], where: str
) -> Pairs:
    """Is one value beyond a level, and how many are."""
    label, value = rng.choice(table)
    level, over = rng.choice(table)[1], rng.random() < 0.5
    printed = f"{'>' if over else '<'} {write(level)}"
    count = sum(one > level if over else one < level for _, one in table)
    return [
        (f"{label} {printed}{where}?", "Yes" if (value > level if over else value < level) else "No"),
        (f"Count the {plural} {printed}{where}.", str(count)),
    ]


def added(rng: Random, table: Sequence[tuple[str, float]], where: str) -> Pairs:
    """The sum or the difference of two values; `where` as in `compared`."""
    (one, first), (other, second) = rng.sample(table, 2)
    if rng.random() < 0.5:
        return [(f"{one} + {other}{where}?", plain(first + second))]
    if second > first:
        one, other = other, one
    return [(f"{one} - {other}{where}?", plain(abs(first - second)))]


def wins(rng: Random, table: Sequence[tuple[str, Sequence[float]]]) -> Pairs:
    """In how many places one of two series is larger."""
    (one, first), (other, second) = rng.sample(table, 2)
    return [(f"Count {one} > {other}.", str(sum(a > b for a, b in zip(first, second, strict=True))))]


def pick(rng: Random, pairs: Pairs, count: int) -> tuple[tuple[str, str], ...]:
    """At most `count` of the pairs, in random order."""
    return tuple(rng.sample(pairs, min(count, len(pairs))))


def _extreme(rng: Random, spec: ChartSpec, words: Sequence[str]) -> str:
    """Ask which category is the largest, or the smallest."""
    form = rng.choice(("{word} {noun}?", "{noun} with the {word} number?", "{noun}: {word}?"))
    return form.format(noun=spec.noun, word=rng.choice(words)).capitalize()


def _several(rng: Random, spec: ChartSpec) -> Pairs:
    """Questions in our own words about a chart with several series."""
    pairs: Pairs = []
    for series in spec.series:
        if series.paint is not None:
            pairs.append((rng.choice(COLOUR_OF).format(series.name), series.paint.name))
            whose = (f"Whose colour: {series.paint.name}?", f"Owner of {series.paint.name}?")
            pairs.append((rng.choice(whose), series.name))
    series = rng.choice(spec.series)
    table = list(zip(spec.categories, series.values, strict=True))
    where = f", {series.name}"
    top, low = max(table, key=lambda one: one[1]), min(table, key=lambda one: one[1])
    pairs += [
        (f"Peak of {series.name}?", top[0]),
        (f"{rng.choice(LEAST).capitalize()} of {series.name}?", low[0]),
        (f"Read the {rng.choice(MOST)} value of {series.name}.", plain(top[1])),
        (f"Read the {rng.choice(LEAST)} value of {series.name}.", plain(low[1])),
        *compared(rng, table, where),
        *compared(rng, table, where),
        *against_level(rng, spec.plural, spec.printed, table, where),
        *added(rng, table, where),
    ]
    for index in rng.sample(range(len(spec.categories)), 2):
        column = [(one.name, one.values[index]) for one in spec.series]
        pairs += compared(rng, column, f", {spec.categories[index]}")
    pairs += added(rng, column, f", {spec.categories[index]}")
    pairs += wins(rng, [(one.name, one.values) for one in spec.series])
    entries = "Legend: count?" if spec.legend != "none" else "Columns: count?"
    return [*pairs, (entries, str(len(spec.series)))]


def _structure(rng: Random, spec: ChartSpec) -> Pairs:
    pairs = [
        (rng.choice((f"Count the {spec.plural}.", f"{spec.plural.capitalize()}: count?")), str(len(spec.categories))),
        (rng.choice((f"Name the first {spec.noun}.", f"First {spec.noun}?")), spec.categories[0]),
        (rng.choice((f"Name the last {spec.noun}.", f"Last {spec.noun}?")), spec.categories[-1]),
        (f"List every {spec.noun}.", " ".join(spec.categories)),
    ]
    ends = ("Upper", "Lower") if spec.chart_type in ("horizontal_bar", "table") else ("Left", "Right")
    if spec.chart_type != "pie":
        pairs += [(f"{ends[0]} end?", spec.categories[0]), (f"{ends[1]} end?", spec.categories[-1])]
    pairs.append((f"{NAMED_PARTS[spec.chart_type].capitalize()}s: count?", str(drawn_parts(spec))))
    if spec.title:
        pairs.append((rng.choice(("Title?", "Read the headline.")), spec.title))
    return pairs
