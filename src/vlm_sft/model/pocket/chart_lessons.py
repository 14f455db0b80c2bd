"""The lessons of pocket on the drawings of the demo sets. Imports data.demo, canvas.

Most questions are worded in our own way. Of those that the demo sets ask, pocket meets the ones that need nothing but
reading: all of signs, and of charts a value or an extreme. To compare, count, add, and to speak of colours, order and
structure in those words is left to fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from vlm_sft.data.demo.asking import plain
from vlm_sft.data.demo.chart_questions import chart_questions
from vlm_sft.data.demo.charts import SIZES, random_chart
from vlm_sft.data.demo.drawing import draw_chart
from vlm_sft.data.demo.sign_drawing import draw_sign
from vlm_sft.data.demo.sign_questions import sign_questions
from vlm_sft.data.demo.signs import SIGN_TYPES, random_sign
from vlm_sft.data.demo.signs import SIZES as SIGN_SIZES
from vlm_sft.data.demo.spec import ChartSpec
from vlm_sft.model.pocket.canvas import Picture, Record, label_targets

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
PRACTISED = ("retrieval", "extreme")  # types of the demo charts' questions that pocket meets
ASKED_CHARTS, ASKED_SIGNS = 8, 4  # questions drawn in the demo sets' words; of charts about five are practised
MOST = ("highest", "largest", "greatest", "biggest")
READ_EXTREME = ("The {} value?", "Read the {} value.", "How much is the {} one?")
LEAST = ("lowest", "smallest", "least", "minimum")
READ_ROLE = ("Read the {}.", "What {} is written?", "Which {} do you see?", "Give the {}.", "Tell the {}.")


def chart(rng: Random, size: tuple[int, int]) -> Picture:
    """A chart of one size with up to ten questions: values, labels, extremes, legend, title, structure."""
    spec = random_chart(rng)
    while (spec.width, spec.height) != size:
        spec = random_chart(rng)
    pairs = _single(rng, spec) if len(spec.series) == 1 else _several(rng, spec)
    pairs += _structure(rng, spec)
    asked = chart_questions(spec, rng, ASKED_CHARTS)
    record = Record(spec.width, spec.height, {label: index for index, label in enumerate(spec.categories, start=1)})
    pixels = np.asarray(draw_chart(spec, record.pen))
    questions = _chosen(rng, [(one.text, one.answer) for one in asked if one.question_type in PRACTISED], pairs)
    values = [[plain(one.values[index]) for one in spec.series] for index in range(len(spec.categories))]
    targets = label_targets(record.labels(), spec.categories, values, questions)
    return Picture("chart", pixels, questions, record.slots(), **targets)


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
    values = spec.series[0].values
    table = list(zip(spec.categories, values, strict=True))
    pairs: Pairs = []
    for label, value in table:
        pairs.append((rng.choice(READ_VALUE).format(label), plain(value)))
    label, value = rng.choice(table)
    pairs.append(
        (
            rng.choice((f"Which {spec.noun} has {{}}?", f"{{}} is the value of which {spec.noun}?")).format(
                spec.printed(value)
            ),
            label,
        )
    )
    top, low = max(table, key=lambda one: one[1]), min(table, key=lambda one: one[1])
    pairs += [
        (_extreme(rng, spec, MOST), top[0]),
        (_extreme(rng, spec, LEAST), low[0]),
        (rng.choice(READ_EXTREME).format(rng.choice(MOST)), plain(top[1])),
        (rng.choice(READ_EXTREME).format(rng.choice(LEAST)), plain(low[1])),
    ]
    (one, first), (other, second) = rng.sample(table, 2)
    pairs.append(
        (
            rng.choice((f"Does {one} exceed {other}?", f"Is {one} greater than {other}?", f"Is {one} above {other}?")),
            "Yes" if first > second else "No",
        )
    )
    pairs.append(
        (
            rng.choice((f"Which has more, {one} or {other}?", f"Larger: {one} or {other}?")),
            max((first, one), (second, other))[1],
        )
    )
    label, value = rng.choice(table)
    level = rng.choice(values)
    over = rng.random() < 0.5
    word = rng.choice(("over", "higher than") if over else ("lower than", "smaller than"))
    pairs += [
        (f"Is {label} {word} {spec.printed(level)}?", "Yes" if (value > level if over else value < level) else "No"),
        (
            f"Count the {spec.plural} {word} {spec.printed(level)}.",
            str(sum((one > level) if over else (one < level) for one in values)),
        ),
    ]
    for label, paint in zip(spec.categories, spec.category_paints, strict=False):
        pairs.append((rng.choice((f"Colour of {label}?", f"What colour has {label}?")), paint.name))
        pairs.append((rng.choice((f"Which {spec.noun} is {paint.name}?", f"What is {paint.name}?")), label))
    return pairs


def _extreme(rng: Random, spec: ChartSpec, words: Sequence[str]) -> str:
    """Ask which category is the largest, or the smallest."""
    form = rng.choice(("{word} {noun}?", "Name the {noun} that has the {word} number.", "Which {noun} is the {word}?"))
    return form.format(noun=spec.noun, word=rng.choice(words)).capitalize()


def _several(rng: Random, spec: ChartSpec) -> Pairs:
    pairs: Pairs = []
    for series in spec.series:
        for label, value in zip(spec.categories, series.values, strict=True):
            pairs.append((rng.choice(READ_CELL).format(series=series.name, label=label), plain(value)))
        if series.paint is not None:
            pairs.append(
                (
                    rng.choice((f"Colour of {series.name}?", f"In which color is {series.name} drawn?")),
                    series.paint.name,
                )
            )
            pairs.append((f"Whose colour is {series.paint.name}?", series.name))
        pairs.append((f"Where does {series.name} peak?", spec.categories[series.values.index(max(series.values))]))
    pairs.append(
        (
            "How many entries has the legend?" if spec.legend != "none" else "How many columns of numbers?",
            str(len(spec.series)),
        )
    )
    return pairs


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
