"""The lessons of pocket: drawings, questions, right answers.

Everything follows from (seed, step): the pictures of a step are the same on every machine with the same versions of
Pillow and matplotlib's fonts. Questions are worded unlike those of easy-VQA, and unlike a part of those of the demo
sets (see chart_lessons), so that fine-tuning has something to teach. Test pictures use seeds from `HELD_OUT_SEED` on,
training refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from tools.pocket import words
from tools.pocket.canvas import KINDS, Canvas, Colour, Picture
from tools.pocket.chart_lessons import BOARD_SIZES, CHART_SIZES, Pairs, board, chart, pick, series_chart, view
from tools.pocket.table_lessons import Size, add, compare, different, grid, labelled, lookup
from vlm_sft.data.demo.charts import LABEL_FONTS
from vlm_sft.data.demo.fonts import fonts, text_width
from vlm_sft.data.demo.vocabulary import COLOURS

HELD_OUT_SEED = 1_000_000
TOKEN_AREA_PX = 16 * 16
TINY_SIZES = ((128, 112), (160, 96), (144, 112))  # of charts: smaller than in the demo set
Drawn = tuple[str, str, float, float]  # kind, colour, middle x and y in pixels

READ_LINE = ("Read this.", "Read the text.", "What is written?", "Which word or number is this?")
SHAPES = KINDS[1:]


def _rgb(shade: str) -> Colour:
    return int(shade[1:3], 16), int(shade[3:5], 16), int(shade[5:7], 16)


def _paint(rng: Random, excluded: Sequence[str] = ()) -> tuple[str, Colour]:
    """A colour by a name that a person would give it, somewhat off its shade."""
    name = rng.choice([name for name in COLOURS if name not in excluded])
    red, green, blue = (min(255, max(0, part + rng.randint(-12, 12))) for part in _rgb(rng.choice(COLOURS[name])))
    return name, (red, green, blue)


def _paper(rng: Random) -> Colour:
    """White, or a pale tint."""
    if rng.random() < 0.5:
        return 255, 255, 255
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def _inks(rng: Random) -> tuple[Colour, Colour, str | None]:
    """Paper, ink and the name of the ink: dark or coloured on pale paper, or white on a coloured board (no name)."""
    form = rng.random()
    if form < 0.25:
        return _paint(rng, ("yellow", "pink", "cyan", "gray"))[1], (255, 255, 255), None
    if form < 0.75:
        dark = rng.randrange(60)
        return _paper(rng), (dark, dark, dark), "black"
    name, ink = _paint(rng, ("yellow", "pink", "cyan", "gray", "black"))
    return _paper(rng), ink, name


def _fitting_size(font: str, text: str, width: int, wanted: int) -> int:
    """The largest font size of at most `wanted` px at which the text fits, at least 9."""
    while wanted > 9 and text_width(font, wanted, text) > width:
        wanted -= 1
    return wanted


def page(rng: Random, size: Size) -> Picture:
    """A page full of text, without questions: only the vision tower learns from it.

    Three of four look like the labels of charts, small and dark on white: a short training learns first what it needs
    most.
    """
    plain = rng.random() < 0.75
    paper, ink, name = ((255, 255, 255), (17, 17, 17), "black") if plain else _inks(rng)
    canvas = Canvas(*size, paper)
    baseline = rng.randint(0, 6)
    while True:
        font, height = (
            rng.choice(LABEL_FONTS) if plain else (rng.choice(fonts()), rng.choice((10, 11, 12, 14, 16, 18, 22)))
        )
        baseline += height + rng.randint(0, 5)
        if baseline > size[1] - 2:
            break
        x = rng.randint(1, 8)
        while x < size[0] - 2 * height:
            piece = words.number(rng) if rng.random() < 0.4 else words.word(rng)
            canvas.text(x, baseline, piece, font, height, ink, name)
            x += text_width(font, height, piece) + rng.randint(4, 14)
    return Picture("page", canvas.pixels(), (), canvas.slots())


def line(rng: Random, size: Size) -> Picture:
    """One word or number, and questions on what it says, its letters and its colour."""
    paper, ink, name = _inks(rng)
    text, font = words.text(rng), rng.choice(fonts())
    height = _fitting_size(font, text, size[0] - 6, rng.randint(10, 26))
    canvas = Canvas(*size, paper)
    room = max(1, size[0] - 3 - text_width(font, height, text))
    canvas.text(
        rng.randint(1, room), rng.randint(height, max(height, size[1] - height // 3)), text, font, height, ink, name
    )
    read = rng.choice(READ_LINE)
    pairs = [
        (rng.choice(("First letter or digit?", "Which character is the first?")), text[0]),
        (rng.choice(("Last letter or digit?", "Which character is the last?")), text[-1]),
        ("How many characters?", str(len(text.replace(" ", "")))),
    ]
    if name:
        pairs.append((rng.choice(("Colour of the text?", "Name the color of the letters.")), name))
    return Picture("line", canvas.pixels(), ((read, text), *pick(rng, pairs, 1)), canvas.slots())


def sign(rng: Random, size: Size) -> Picture:
    """Two to four lines on a board: read all, the top, the bottom, the number."""
    paper, ink, name = _inks(rng)
    canvas, font = Canvas(*size, paper), rng.choice(fonts())
    count = rng.randint(2, max(2, min(4, size[1] // 20)))
    lines = [words.text(rng) if rng.random() < 0.8 else f"{words.word(rng)} {words.word(rng)}" for _ in range(count)]
    band = size[1] / count
    for place, text in enumerate(lines):
        height = _fitting_size(font, text, size[0] - 8, rng.randint(10, max(10, min(24, int(band) - 4))))
        left = 4 if rng.random() < 0.3 else max(2, (size[0] - text_width(font, height, text)) // 2)
        canvas.text(left, round(band * (place + 0.5) + height * 0.36), text, font, height, ink, name)
    if rng.random() < 0.3:
        canvas.rotate(rng.uniform(-5, 5))
    pairs = [
        (rng.choice(("Read the top line.", "What is written at the top?", "Top line?")), lines[0]),
        (rng.choice(("Read the bottom line.", "What is written at the bottom?", "Bottom line?")), lines[-1]),
        (rng.choice(("Read everything.", "What does it say?", "Give the whole text.")), " ".join(lines)),
        (rng.choice(("Name the first word.", "Which word or number is the first?")), " ".join(lines).split()[0]),
        (rng.choice(("Name the last word.", "Which word or number is the last?")), " ".join(lines).split()[-1]),
        ("How many lines of text?", str(count)),
    ]
    numbers = [text for text in lines if text[0].isdigit()]
    if len(numbers) == 1:
        pairs.append((rng.choice(("Which number is on it?", "Read the number.")), numbers[0]))
    prices = [text for text in lines if text[0] == "$"]
    if len(prices) == 1:
        pairs.append(("Read the price.", prices[0]))
    return Picture("sign", canvas.pixels(), pick(rng, pairs, 4), canvas.slots())


def listing(rng: Random, size: Size) -> Picture:
    """Rows of a label and a number: find the number of a label, and the label of a number."""
    paper, ink, name = _inks(rng)
    canvas, font, height = Canvas(*size, paper), rng.choice(fonts()), rng.choice((10, 11, 12, 13))
    count = max(2, min(rng.randint(2, 6), size[1] // (height + 4)))
    labels = different(rng, count, lambda: words.word(rng)[:8].strip())
    values = different(rng, count, lambda: words.number(rng))
    while height > 9 and _row_width(font, height, labels) + _row_width(font, height, values) > size[0] - 12:
        height -= 1
    column = 8 + _row_width(font, height, labels)
    column = rng.randint(column, max(column, size[0] - _row_width(font, height, values) - 2))
    band = size[1] / count
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        baseline = round(band * (place + 0.5) + height * 0.36)
        canvas.text(3, baseline, label, font, height, ink, name, place + 1)
        canvas.text(column, baseline, value, font, height, ink, name, count + place + 1)
    pairs: Pairs = [("How many rows?", str(count)), ("Read the first row.", f"{labels[0]} {values[0]}")]
    for label, value in zip(labels, values, strict=True):
        pairs.append(
            (rng.choice(("Which number stands beside {}?", "Read the value of {}.", "{}?")).format(label), value)
        )
        pairs.append((rng.choice(("Which label has {}?", "Whose number is {}?")).format(value), label))
    chosen = pick(rng, pairs, 8)
    return labelled("listing", canvas, chosen, labels, values)


def _row_width(font: str, height: int, texts: Sequence[str]) -> int:
    """Width in pixels of the widest text."""
    return max(text_width(font, height, text) for text in texts)


def shapes(rng: Random, size: Size) -> Picture:
    """One to three coloured shapes on pale paper: kinds, colours, places, counts, yes and no."""
    canvas = Canvas(*size, _paper(rng))
    count = rng.choice((1, 1, 2, 3))
    taken: list[tuple[int, int, int, int]] = []
    drawn: list[Drawn] = []
    for _ in range(40):
        if len(drawn) == count:
            break
        wide, high = rng.randint(8, 30), rng.randint(8, 30)
        kind, (name, paint) = rng.choice(SHAPES), _paint(rng)
        high = high if kind == "rectangle" else round(wide * (1 if kind == "circle" else 0.9))
        x, y = rng.randint(0, size[0] - wide - 1), rng.randint(0, size[1] - high - 1)
        if any(x < box[2] + 2 and box[0] < x + wide + 2 and y < box[3] + 2 and box[1] < y + high + 2 for box in taken):
            continue
        taken.append((x, y, x + wide, y + high))
        drawn.append((kind, name, x + wide / 2, y + high / 2))
        canvas.shape(kind, taken[-1], paint, name)
    return Picture("shapes", canvas.pixels(), pick(rng, _shape_questions(rng, drawn, size), 6), canvas.slots())


def _shape_questions(rng: Random, drawn: list[Drawn], size: Size) -> Pairs:
    kinds, names = [one[0] for one in drawn], [one[1] for one in drawn]
    kind, name = rng.choice(SHAPES), rng.choice(names if rng.random() < 0.5 else list(COLOURS))
    pairs = [
        ("How many shapes are drawn?", str(len(drawn))),
        (f"Count every {kind}.", str(kinds.count(kind))),
        (rng.choice((f"Do you see a {kind}?", f"Any {kind} here?")), "yes" if kind in kinds else "no"),
        (rng.choice((f"Do you see something {name}?", f"Anything {name} here?")), "yes" if name in names else "no"),
        (f"Is it free of any {kind}?", "no" if kind in kinds else "yes"),
        (f"Is a {name} {kind} drawn?", "yes" if (kind, name) in {one[:2] for one in drawn} else "no"),
    ]
    for kind, name, x, y in drawn:
        if kinds.count(kind) == 1:
            pairs.append((rng.choice((f"Name the colour of the {kind}.", f"Color of the {kind}?")), name))
            pairs.append((f"Does the {kind} lie left or right?", "left" if x < size[0] / 2 else "right"))
            pairs.append((f"Does the {kind} lie high or low?", "high" if y < size[1] / 2 else "low"))
        if names.count(name) == 1:
            pairs.append((rng.choice((f"Name the shape that is {name}.", f"Something is {name}: which shape?")), kind))
    if len(drawn) == 1:
        pairs.append((rng.choice(("Name the shape.", "Which shape do you see?")), kinds[0]))
        pairs.append((rng.choice(("Name the colour.", "Which colour do you see?")), names[0]))
    return pairs


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task with the sizes of its pictures.

    Attributes:
        draw: makes one picture of a size.
        sizes: (width, height) in pixels; all pictures of a step have one of them.
        area: visual tokens of a whole batch, about: it sets how many pictures a step has.
    """

    draw: Callable[[Random, Size], Picture]
    sizes: tuple[Size, ...]
    area: int


LESSONS = {
    "page": Lesson(page, ((128, 64), (160, 96)), 240),
    "line": Lesson(line, ((96, 32), (128, 32), (80, 32)), 200),
    "sign": Lesson(sign, ((96, 48), (128, 64), (160, 80), (192, 96)), 240),
    "listing": Lesson(listing, ((128, 64), (128, 96), (160, 112)), 240),
    "lookup": Lesson(lookup, ((48, 32), (64, 32), (64, 48), (96, 48), (128, 48)), 200),
    "compare": Lesson(compare, ((48, 32), (64, 32), (64, 48), (96, 48), (128, 48)), 200),
    "add": Lesson(add, ((48, 32), (64, 32), (64, 48), (96, 48)), 200),
    "grid": Lesson(grid, ((96, 48), (112, 64), (128, 64)), 240),
    "shapes": Lesson(shapes, ((64, 64),), 192),
    "tiny chart": Lesson(chart, TINY_SIZES, 400),
    "small chart": Lesson(chart, CHART_SIZES[:2], 400),
    "chart": Lesson(chart, CHART_SIZES, 400),
    "tiny series": Lesson(series_chart, TINY_SIZES, 400),
    "series": Lesson(series_chart, CHART_SIZES, 400),
    "tiny view": Lesson(view, TINY_SIZES, 600),
    "view": Lesson(view, CHART_SIZES, 500),
    "board": Lesson(board, BOARD_SIZES, 240),
}
# Questions again, after the tower has learned to see what they are about.
_ASKED_AGAIN = {
    "tiny view": 2,
    "view": 1,
    "tiny chart": 5,
    "chart": 3,
    "line": 1.5,
    "sign": 0.5,
    "board": 0.5,
    "shapes": 0.4,
    "listing": 0.3,
    "lookup": 0.5,
}
# From which step on, in thousands: how often each lesson comes.
STAGES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"page": 1.0}),
    (2.0, {"page": 2, "line": 5, "shapes": 1}),
    (3.4, {"page": 1, "line": 4, "shapes": 4}),
    (4.4, {"page": 0.7, "line": 3, "sign": 2, "listing": 2, "shapes": 2, "small chart": 1.5}),
    (5.2, {"page": 0.5, "line": 1.5, "sign": 2, "listing": 2, "shapes": 1.5, "small chart": 3}),
    (7.0, {"line": 1, "sign": 2, "listing": 1.5, "shapes": 1, "small chart": 1, "chart": 4}),
    (8.4, {"line": 1.5, "sign": 1.5, "listing": 1.5, "shapes": 0.5, "board": 2, "small chart": 2, "chart": 3}),
    (12.5, {"line": 1.5, "sign": 1.5, "listing": 1, "shapes": 0.3, "board": 1, "small chart": 2.5, "chart": 4}),
    (18.0, {"line": 2, "sign": 0.8, "listing": 0.5, "shapes": 0.3, "board": 3, "small chart": 2.5, "chart": 3.5}),
    (21.2, {"line": 1.5, "sign": 0.3, "listing": 2, "shapes": 0.3, "board": 1, "small chart": 4, "chart": 3.5}),
    (22.3, {"lookup": 5, "line": 1.2, "listing": 2, "shapes": 0.2, "board": 0.6, "small chart": 3, "chart": 2}),
    (24.4, {"lookup": 2, "line": 2, "listing": 1.5, "shapes": 0.3, "board": 1, "small chart": 3, "chart": 3}),
    (26.7, {"lookup": 4, "line": 1, "listing": 2, "shapes": 0.2, "board": 0.5, "small chart": 3, "chart": 2}),
    (29.3, {"lookup": 0.7, "line": 2, "listing": 1, "shapes": 0.3, "board": 0.8, "small chart": 3, "chart": 4}),
    (32.0, {"tiny view": 6, "view": 1.5, "tiny chart": 2, "chart": 0.5, "line": 1, "sign": 0.4, "board": 0.3}),
    (36.0, {"tiny view": 4, "view": 2, "tiny chart": 3, "chart": 1.5, "line": 1.5, "sign": 0.4, "board": 0.4}),
    (36.3, _ASKED_AGAIN),
    (38.0, _ASKED_AGAIN | {"tiny view": 1, "tiny chart": 3.5, "chart": 4, "line": 2.5, "board": 0.8}),
    (40.7, _ASKED_AGAIN | {"tiny view": 3, "view": 2, "tiny chart": 4, "listing": 1, "lookup": 1, "board": 0.6}),
    (42.5, _ASKED_AGAIN | {"tiny view": 0.7, "view": 0.7, "chart": 4, "line": 2.5, "board": 1, "listing": 0.8}),
    (60.0, {"compare": 9, "tiny chart": 3, "chart": 3, "line": 1.2, "board": 0.8, "tiny view": 0.7, "view": 0.7}),
    (62.4, {"compare": 2.5, "tiny chart": 4, "chart": 5, "line": 1.2, "board": 0.6, "tiny view": 0.4, "view": 0.4}),
    (
        65.8,
        {
            "add": 4,
            "grid": 4,
            "compare": 0.5,
            "tiny series": 2,
            "series": 1,
            "tiny chart": 1,
            "chart": 1,
            "line": 1.2,
            "sign": 0.5,
            "board": 0.4,
            "listing": 0.5,
            "shapes": 0.5,
        },
    ),
    (
        68.4,
        {
            "add": 1.5,
            "grid": 1.5,
            "compare": 0.4,
            "tiny series": 1.5,
            "series": 2,
            "tiny chart": 2,
            "chart": 3,
            "line": 2,
            "sign": 0.6,
            "board": 0.6,
            "listing": 0.6,
            "shapes": 0.7,
            "tiny view": 0.3,
            "view": 0.3,
        },
    ),
    (71.2, {"line": 8, "sign": 1, "grid": 1, "tiny series": 1, "series": 1.5, "chart": 3, "board": 1, "shapes": 0.5}),
)


def lesson_weights(step: int) -> dict[str, float]:
    """How often each lesson comes at a step."""
    return [weights for start, weights in STAGES if step >= 1000 * start][-1]


def lesson_pictures(name: str, rng: Random) -> list[Picture]:
    """The pictures of one step of a lesson."""
    lesson = LESSONS[name]
    size = rng.choice(lesson.sizes)
    count = max(4, round(lesson.area / (size[0] * size[1] / TOKEN_AREA_PX)))
    return [_in_any_case(rng, lesson.draw(rng, size)) for _ in range(count)]


def _in_any_case(rng: Random, picture: Picture) -> Picture:
    """Let two of five questions begin with a small letter, as many people type them."""
    questions = tuple(
        (question[0].lower() + question[1:] if rng.random() < 0.4 else question, answer)
        for question, answer in picture.questions
    )
    return replace(picture, questions=questions)


def step_pictures(seed: int, step: int) -> list[Picture]:
    """The pictures of a training step; equal for equal arguments.

    Args:
        seed: below HELD_OUT_SEED.
        step: from 0 on.
    """
    assert 0 <= seed < HELD_OUT_SEED, "seeds from HELD_OUT_SEED on belong to the test pictures"
    rng = Random(f"pocket/{seed}/{step}")
    weights = lesson_weights(step)
    return lesson_pictures(rng.choices(list(weights), list(weights.values()))[0], rng)


def held_out_pictures(name: str, count: int, index: int = 0) -> list[Picture]:
    """Test pictures of a lesson: `count` or a few more, never seen in training; `index` numbers independent sets."""
    rng = Random(f"pocket/{HELD_OUT_SEED + index}/{name}")
    found: list[Picture] = []
    while len(found) < count:
        found += lesson_pictures(name, rng)
    return found
