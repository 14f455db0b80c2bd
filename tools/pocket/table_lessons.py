"""The lessons of pocket on small tables: find, compare, add.

In charts these skills are needed together with many others; by itself, on a picture with nothing else, one is learned
in a tenth of the time, and it carries over.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random

from tools.pocket import words
from tools.pocket.canvas import Canvas, Picture
from tools.pocket.chart_lessons import READ_CELL, READ_VALUE, Pairs, added, against_level, compared, pick, wins
from tools.pocket.labels import Label, label_targets, rank
from vlm_sft.data.demo.chart_reader import plain
from vlm_sft.data.demo.charts import LABEL_FONTS
from vlm_sft.data.demo.fonts import text_width

INK = (17, 17, 17)
Size = tuple[int, int]


def lookup(rng: Random, size: Size) -> Picture:
    """A few short labels, each beside or below its value, and nothing else: to find the one is to answer by the other.

    In charts that skill is needed together with many others; by itself it is learned first.
    """
    canvas, labels, values = small_table(rng, size)
    pairs = [(rng.choice(READ_VALUE).format(label), value) for label, value in zip(labels, values, strict=True)]
    pairs += [(f"Owner of {value}?", label) for label, value in zip(labels, values, strict=True)]
    return labelled("lookup", canvas, pick(rng, pairs, 6), labels, values)


def compare(rng: Random, size: Size) -> Picture:
    """The same pictures, and questions that compare two values, or all of them with a level."""
    canvas, labels, values = small_table(rng, size)
    table = [(label, float(value)) for label, value in zip(labels, values, strict=True)]
    pairs: Pairs = []
    for _ in range(4):
        pairs += compared(rng, table, "")
    for _ in range(2):
        pairs += against_level(rng, "labels", plain, table, "")
    return labelled("compare", canvas, pick(rng, pairs, 12), labels, values)


def add(rng: Random, size: Size) -> Picture:
    """The same pictures with values of one or two digits, and their sums and differences."""
    canvas, labels, values = small_table(rng, size, 2)
    table = [(label, float(value)) for label, value in zip(labels, values, strict=True)]
    pairs = [pair for _ in range(12) for pair in added(rng, table, "")]
    return labelled("add", canvas, pick(rng, list(dict.fromkeys(pairs)), 12), labels, values)


def grid(rng: Random, size: Size) -> Picture:
    """Numbers in rows and columns that both have names: one of them, two in a row or a column, a whole column."""
    font, height = rng.choice(LABEL_FONTS)
    columns, rows = rng.randint(2, size[0] // 32), rng.randint(2, size[1] // 16 - 1)
    wide, high = size[0] / (columns + 1), size[1] / (rows + 1)
    names = different(rng, columns + rows, lambda: _short(rng, font, height, wide - 4))
    heads, sides = names[:columns], names[columns:]
    longest = rng.randint(2, 3)
    values = [int(text) for text in different(rng, columns * rows, lambda: str(rng.randrange(10**longest)))]
    table = [values[place * rows :][:rows] for place in range(columns)]
    labels = [Label(head, "series", place=place) for place, head in enumerate(heads)]
    for order, side in enumerate(sides):
        row = [column[order] for column in table]
        ranks = [rank(value, column) for value, column in zip(row, table, strict=True)]
        labels.append(Label(side, "category", [str(value) for value in row], ranks=ranks, order=order))
        labels += [
            Label(str(value), "value", [str(value)], "", place, [own], order)
            for place, (value, own) in enumerate(zip(row, ranks, strict=True))
        ]
    canvas = Canvas(*size, (255, 255, 255))
    for number, label in enumerate(labels, start=1):
        across, down = (0 if place is None else place + 1 for place in (label.place, label.order))
        x = 2 if across == 0 else (across + 0.5) * wide - text_width(font, height, label.text) / 2
        y = (down + 0.5) * high + height * 0.36
        canvas.text(round(x), round(y), label.text, font, height, INK, "black", number)
    questions = pick(rng, _grid_questions(rng, heads, sides, table), 12)
    targets = label_targets(canvas.labels(), labels, questions)
    return Picture("grid", canvas.pixels(), questions, canvas.slots(), **targets)


def _grid_questions(rng: Random, heads: Sequence[str], sides: Sequence[str], table: Sequence[Sequence[float]]) -> Pairs:
    """Questions about `table`, a list of values for every head; the words are those of charts with several series."""
    pairs: Pairs = []
    for _ in range(4):
        place, order = rng.randrange(len(heads)), rng.randrange(len(sides))
        form = rng.choice(READ_CELL)
        pairs.append((form.format(label=sides[order], series=heads[place]), plain(table[place][order])))
        column = list(zip(sides, table[place], strict=True))
        row = list(zip(heads, (one[order] for one in table), strict=True))
        pairs += [*compared(rng, column, f", {heads[place]}"), *compared(rng, row, f", {sides[order]}")]
    pairs += added(rng, column, f", {heads[place]}") + added(rng, row, f", {sides[order]}")
    pairs += against_level(rng, "labels", plain, column, f", {heads[place]}")
    return list(dict.fromkeys([*pairs, *wins(rng, list(zip(heads, table, strict=True)))]))


def small_table(rng: Random, size: Size, longest: int = 3) -> tuple[Canvas, list[str], list[str]]:
    """The drawing of `lookup`, with its labels and its values of up to `longest` digits."""
    beside = size[0] > size[1] and rng.random() < 0.5
    font, height = rng.choice(LABEL_FONTS)
    count = rng.randint(2, size[1] // 16) if beside else rng.randint(2, min(5, size[0] // 24))
    room = (size[0] - 6) / 2 if beside else size[0] / count - 3
    labels = different(rng, count, lambda: _short(rng, font, height, room))
    values = different(rng, count, lambda: str(rng.randrange(10 ** rng.randint(1, longest))))
    canvas = Canvas(*size, (255, 255, 255))
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        if beside:
            spots = [(2, (place + 0.5) * size[1] / count), (size[0] / 2 + 4, (place + 0.5) * size[1] / count)]
        else:
            middle, top = (place + 0.5) * size[0] / count, rng.uniform(0.2, 0.6) * size[1]
            spots = [
                (middle - text_width(font, height, label) / 2, size[1] - height * 0.7),
                (middle - text_width(font, height, value) / 2, top),
            ]
        for number, (text, (x, y)) in enumerate(zip((label, value), spots, strict=True)):
            owner = number * count + place + 1
            canvas.text(x, round(y + height * 0.36), text, font, height, INK, "black", owner)
    return canvas, labels, values


def labelled(
    task: str, canvas: Canvas, questions: tuple[tuple[str, str], ...], labels: Sequence[str], values: Sequence[str]
) -> Picture:
    """A picture of labels with one value each; on the canvas the numbers of the values follow those of the labels."""
    ranks: list[tuple[int, ...]] = [()] * len(labels)
    if all(value.isdigit() for value in values):
        numbers = [int(value) for value in values]
        ranks = [(rank(number, numbers),) for number in numbers]
    rows = list(zip(labels, values, ranks, strict=True))
    owned = [Label(label, values=(value,), ranks=own, order=order) for order, (label, value, own) in enumerate(rows)]
    owned += [Label(value, "value", (value,), ranks=own, order=order) for order, (_, value, own) in enumerate(rows)]
    targets = label_targets(canvas.labels(), owned, questions)
    return Picture(task, canvas.pixels(), questions, canvas.slots(), **targets)


def _short(rng: Random, font: str, height: int, room: float) -> str:
    """A label that fits `room` px: one or two letters, or the beginning of a word."""
    if rng.random() < 0.4:
        text = "".join(rng.choices(string.ascii_uppercase, k=rng.choice((1, 1, 2))))
    else:
        text = words.word(rng, 0.2)
    while len(text) > 1 and text_width(font, height, text) > room:
        text = text[:-1]
    return text.strip()


def different(rng: Random, count: int, make: Callable[[], str]) -> list[str]:
    """`count` different strings."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)
