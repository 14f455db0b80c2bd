"""The lessons of pocket on small tables: find, compare. Imports chart_lessons, canvas, labels, words.

In charts these skills are needed together with many others; by itself, on a picture with nothing else, one is learned
in a tenth of the time, and it carries over.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random

from vlm_sft.data.demo.asking import plain
from vlm_sft.data.demo.charts import LABEL_FONTS
from vlm_sft.data.demo.fonts import text_width
from vlm_sft.model.pocket import words
from vlm_sft.model.pocket.canvas import Canvas, Picture
from vlm_sft.model.pocket.chart_lessons import (
    READ_VALUE,
    Pairs,
    against_level,
    compared,
    pick,
)
from vlm_sft.model.pocket.labels import Label, label_targets

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


def small_table(rng: Random, size: Size) -> tuple[Canvas, list[str], list[str]]:
    """The drawing of `lookup`, with its labels and values."""
    beside = size[0] > size[1] and rng.random() < 0.5
    font, height = rng.choice(LABEL_FONTS)
    count = rng.randint(2, size[1] // 16) if beside else rng.randint(2, min(5, size[0] // 24))
    room = (size[0] - 6) / 2 if beside else size[0] / count - 3
    labels = different(rng, count, lambda: _short(rng, font, height, room))
    values = different(rng, count, lambda: str(rng.randrange(10 ** rng.randint(1, 3))))
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
        ranks = [(sum(int(other) > int(value) for other in values),) for value in values]
    rows = list(zip(labels, values, ranks, strict=True))
    owned = [Label(label, values=(value,), ranks=rank, order=order) for order, (label, value, rank) in enumerate(rows)]
    owned += [Label(value, "value", (value,), ranks=rank, order=order) for order, (_, value, rank) in enumerate(rows)]
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


