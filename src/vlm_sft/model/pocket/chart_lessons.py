"""The lessons of pocket on the drawings of the demo sets. Imports data.demo, canvas, labels.

Most questions are worded in our own way. Of those that the demo sets ask, pocket meets the ones that need nothing but
reading: all of signs, and of charts a value. To look for extremes, compare, count, add, and to speak of colours, order
and structure in those words is left to fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from vlm_sft.data.demo.asking import plain
from vlm_sft.data.demo.chart_questions import chart_questions
from vlm_sft.data.demo.charts import SIZES, random_chart
from vlm_sft.data.demo.drawing import draw_chart, mark_ends
from vlm_sft.data.demo.sign_drawing import draw_sign
from vlm_sft.data.demo.sign_questions import sign_questions
from vlm_sft.data.demo.signs import SIGN_TYPES, random_sign
from vlm_sft.data.demo.signs import SIZES as SIGN_SIZES
from vlm_sft.data.demo.spec import ChartSpec
from vlm_sft.model.pocket.canvas import Picture, Record
from vlm_sft.model.pocket.labels import Label, label_targets

CHART_SIZES = SIZES
BOARD_SIZES = SIGN_SIZES
Pairs = list[tuple[str, str]]
READ_VALUE = (
    "Read the value of {}.",
    "How much has {}?",
    "{}?",
    "Give the number for {}.",
    "What is {}'s value?",
    "What value do you see for {}?",
    "Say the value in {}.",
    "What is the number for {}?",
    "The value at {} is?",
)
READ_CELL = (
    "Read {series} at {label}.",
    "{label}, {series}?",
    "Give the number of {series} for {label}.",
    "What value has {series} in {label}?",
    "How much has {series} for {label}?",
)
QUESTIONS = 10  # of one picture, at most
PRACTISED = ("retrieval",)  # types of the demo charts' questions that pocket meets
ASKED_CHARTS, ASKED_SIGNS = 8, 4  # questions drawn in the demo sets' words; of charts about four are practised
MOST = ("highest", "largest", "greatest", "biggest")
READ_EXTREME = ("The {} value?", "Read the {} value.", "How much is the {} one?")
LEAST = ("lowest", "smallest", "least", "minimum")
COLOUR_OF = ("Colour of {}?", "What colour has {}?", "In which color is {} drawn?", "Name the color of {}.")
MORE_OF = ("Which has more, {} or {}{}?", "Larger: {} or {}{}?", "Which one is greater{2}: {0} or {1}?")
LESS_OF = ("Which has less, {} or {}{}?", "Smaller: {} or {}{}?", "Which one is lower{2}: {0} or {1}?")
READ_ROLE = ("Read the {}.", "What {} is written?", "Which {} do you see?", "Give the {}.", "Tell the {}.")


def chart(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart of one size with up to ten questions: values, labels, extremes, legend, title, structure."""
    return _chart("chart", random_chart(rng, size=size), rng)


def view(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart without questions: only the vision tower learns from it, in half the time."""
    return _chart("view", random_chart(rng, size=size), None)


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
        asked = [one for one in chart_questions(spec, rng, ASKED_CHARTS) if one.question_type in PRACTISED]
        pairs = _single(rng, spec) if len(spec.series) == 1 else _several(rng, spec)
        questions = _chosen(rng, [(one.text, one.answer) for one in asked], pairs + _structure(rng, spec))
    targets = label_targets(record.labels(), labels, questions)
    return Picture(task, pixels, questions, record.slots(), **targets)


def chart_labels(spec: ChartSpec) -> list[Label]:
    """The labels of a chart: its categories, its series, and the printed values of a pie or a table."""
    colours = [paint.name for paint in spec.category_paints] or [""] * len(spec.categories)
    labels = [
        Label(text, "category", [plain(value) for value in values], colour, ranks=ranks, order=order)
        for order, (text, colour, values, ranks) in enumerate(
            zip(
                spec.categories, colours, zip(*(one.values for one in spec.series), strict=True), _ranks(spec),
                strict=True,
            )
        )
    ]  # fmt: skip
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
    """How many values of the same series are larger: a list for every category with one for every series."""
    return [
        [sum(other > one.values[index] for other in one.values) for one in spec.series]
        for index in range(len(spec.categories))
    ]


def chart_marks(spec: ChartSpec) -> list[tuple[tuple[int, int], Label]]:
    """The ends of the bars and the points of the lines: x and y in pixels, and what is known there."""
    marks, ranks = [], _ranks(spec)
    for place, (one, ends) in enumerate(zip(spec.series, mark_ends(spec), strict=False)):
        for index, (value, end) in enumerate(zip(one.values, ends, strict=True)):
            paint = spec.category_paints[index] if spec.category_paints else one.paint
            several = place if len(spec.series) > 1 else None
            rank, colour = ranks[index][place : place + 1], paint.name if paint else ""
            marks.append((end, Label("", "value", [plain(value)], colour, several, rank, index)))
    return marks


def _chosen(rng: Random, first: Pairs, rest: Pairs) -> tuple[tuple[str, str], ...]:
    """All of `first` and some of `rest`, in random order, QUESTIONS altogether where there are as many."""
    pairs = first + rng.sample(rest, min(QUESTIONS - len(first), len(rest)))
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


def _single(rng: Random, spec: ChartSpec) -> Pairs:
    """Questions in our own words about a chart with one series."""
    values = spec.series[0].values
    table = list(zip(spec.categories, values, strict=True))
    pairs: Pairs = [(rng.choice(READ_VALUE).format(label), plain(value)) for label, value in rng.sample(table, 2)]
    label, value = rng.choice(table)
    owner = rng.choice((f"Which {spec.noun} has {{}}?", f"{{}} is the value of which {spec.noun}?"))
    pairs.append((owner.format(spec.printed(value)), label))
    top, low = max(table, key=lambda one: one[1]), min(table, key=lambda one: one[1])
    pairs += [
        (_extreme(rng, spec, MOST), top[0]),
        (_extreme(rng, spec, LEAST), low[0]),
        (rng.choice(READ_EXTREME).format(rng.choice(MOST)), plain(top[1])),
        (rng.choice(READ_EXTREME).format(rng.choice(LEAST)), plain(low[1])),
    ]
    for _ in range(2):
        pairs += _compared(rng, table, "")
    pairs += _against_level(rng, spec, table, "")
    paints = list(zip(spec.categories, spec.category_paints, strict=False))
    for label, paint in rng.sample(paints, min(2, len(paints))):
        pairs.append((rng.choice(COLOUR_OF).format(label), paint.name))
    for label, paint in rng.sample(paints, min(2, len(paints))):
        pairs.append((rng.choice((f"Which {spec.noun} is {paint.name}?", f"What is {paint.name}?")), label))
    return pairs


def _compared(rng: Random, table: Sequence[tuple[str, float]], where: str) -> Pairs:
    """Two questions that compare two values; `where` ends them: " in May" or nothing."""
    (one, first), (other, second) = rng.sample(table, 2)
    larger, smaller = (one, other) if first > second else (other, one)
    exceeds = rng.choice(("Does {} exceed {}{}?", "Is {} greater than {}{}?", "Is {} above {}{}?"))
    pairs = [(exceeds.format(one, other, where), "Yes" if larger == one else "No")]
    if rng.random() < 0.5:
        return [*pairs, (rng.choice(MORE_OF).format(one, other, where), larger)]
    return [*pairs, (rng.choice(LESS_OF).format(one, other, where), smaller)]


def _against_level(rng: Random, spec: ChartSpec, table: Sequence[tuple[str, float]], where: str) -> Pairs:
    """Is one value beyond a level, and how many are."""
    label, value = rng.choice(table)
    level, over = rng.choice(table)[1], rng.random() < 0.5
    word, printed = rng.choice(("over", "higher than") if over else ("lower than", "smaller than")), spec.printed(level)
    count = sum(one > level if over else one < level for _, one in table)
    return [
        (f"Is {label} {word} {printed}{where}?", "Yes" if (value > level if over else value < level) else "No"),
        (f"Count the {spec.plural} {word} {printed}{where}.", str(count)),
    ]


def _extreme(rng: Random, spec: ChartSpec, words: Sequence[str]) -> str:
    """Ask which category is the largest, or the smallest."""
    form = rng.choice(("{word} {noun}?", "Name the {noun} that has the {word} number.", "Which {noun} is the {word}?"))
    return form.format(noun=spec.noun, word=rng.choice(words)).capitalize()


def _several(rng: Random, spec: ChartSpec) -> Pairs:
    """Questions in our own words about a chart with several series."""
    pairs: Pairs = []
    for _ in range(3):
        series, index = rng.choice(spec.series), rng.randrange(len(spec.categories))
        asked = rng.choice(READ_CELL).format(series=series.name, label=spec.categories[index])
        pairs.append((asked, plain(series.values[index])))
    for series in spec.series:
        if series.paint is not None:
            pairs.append((rng.choice(COLOUR_OF).format(series.name), series.paint.name))
            whose = (f"Whose colour is {series.paint.name}?", f"What is {series.paint.name}?")
            pairs.append((rng.choice(whose), series.name))
    series = rng.choice(spec.series)
    table = list(zip(spec.categories, series.values, strict=True))
    where = f", {series.name}"
    top, low = max(table, key=lambda one: one[1]), min(table, key=lambda one: one[1])
    pairs += [
        (f"Where does {series.name} peak?", top[0]),
        (f"Where is {series.name} at its least?", low[0]),
        (f"Read the {rng.choice(MOST)} value of {series.name}.", plain(top[1])),
        (f"Read the {rng.choice(LEAST)} value of {series.name}.", plain(low[1])),
        *_compared(rng, table, where),
        *_against_level(rng, spec, table, where),
    ]
    for index in rng.sample(range(len(spec.categories)), 2):
        column = [(one.name, one.values[index]) for one in spec.series]
        pairs += _compared(rng, column, f", {spec.categories[index]}")
    entries = "How many entries has the legend?" if spec.legend != "none" else "How many columns of numbers?"
    return [*pairs, (entries, str(len(spec.series)))]


def _structure(rng: Random, spec: ChartSpec) -> Pairs:
    pairs = [
        (rng.choice((f"Count the {spec.plural}.", f"How many {spec.plural} do you see?")), str(len(spec.categories))),
        (rng.choice((f"Name the first {spec.noun}.", f"Which {spec.noun} comes first?")), spec.categories[0]),
        (rng.choice((f"Name the last {spec.noun}.", f"Which {spec.noun} comes last?")), spec.categories[-1]),
        (f"List every {spec.noun}.", " ".join(spec.categories)),
    ]
    if spec.title:
        pairs.append((rng.choice(("Read the title.", "What is written above the chart?")), spec.title))
    return pairs
