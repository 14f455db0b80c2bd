"""What the labels of pocket's pictures teach: facts under them, and where a question has to look."""

from __future__ import annotations

from random import Random

import numpy as np

from tools.pocket.canvas import Canvas
from tools.pocket.chart_lessons import chart, chart_labels, chart_marks
from tools.pocket.labels import (
    COLOUR_FACT,
    FACTS,
    LOOKS,
    ORDER_FACT,
    PLACE_FACT,
    RANK_FACTS,
    SPELLED_FIRST,
    SPELLING_CHARACTERS,
    SPELLING_FACTS,
    UNKNOWN,
    VALUE_CHARACTERS,
    VALUE_LENGTH,
    VALUES_OF_LABEL,
    Label,
    facts_of_labels,
    labels_of_tokens,
    places_of_labels,
)
from vlm_sft.data.demo.charts import random_chart
from vlm_sft.data.demo.spec import CHART_TYPES, ChartSpec
from vlm_sft.data.demo.vocabulary import COLOURS


def _values(facts: np.ndarray) -> list[str]:
    """The values that the facts of one token spell."""
    rows = [row[row != UNKNOWN] for row in facts[:COLOUR_FACT].reshape(VALUES_OF_LABEL, VALUE_LENGTH)]
    return ["".join(VALUE_CHARACTERS[one - 1] for one in row if one) for row in rows if len(row)]


def test_the_facts_of_a_label_are_known_under_its_text_and_nowhere_else() -> None:
    canvas = Canvas(96, 32, (255, 255, 255))
    canvas.text(2, 12, "Oak", "sans", 12, (0, 0, 0), label=1)
    canvas.text(60, 12, "17", "sans", 12, (0, 0, 0))
    canvas.text(0, 30, "mi", "sans", 12, (0, 0, 0), label=2)
    canvas.text(20, 30, "x", "sans", 12, (0, 0, 0), label=1)
    oak, mi = ["17"], ["3.5%", "1,024"]
    labels = [Label("Oak", values=oak, colour="red", order=3), Label("mi", values=mi, place=1, ranks=(2, 0))]
    facts = facts_of_labels(canvas.labels(), labels)
    assert facts.shape == (FACTS, 2, 6)
    assert _values(facts[:, 0, 0]) == _values(facts[:, 0, 1]) == ["17"]
    assert _values(facts[:, 1, 0]) == ["3.5%", "1,024"]
    assert (facts[:, 0, 2:] == UNKNOWN).all() and (facts[:, 1, 4] == UNKNOWN).all()
    assert facts[COLOUR_FACT, 0, 0] == list(COLOURS).index("red") and facts[COLOUR_FACT, 1, 0] == UNKNOWN
    assert facts[PLACE_FACT, 1, 0] == 1 and facts[PLACE_FACT, 0, 0] == UNKNOWN
    assert facts[RANK_FACTS:ORDER_FACT, 1, 0].tolist() == [2, 0, UNKNOWN]
    assert facts[ORDER_FACT, 0, 0] == 3 and facts[ORDER_FACT, 1, 0] == UNKNOWN


def test_a_label_knows_its_first_and_last_letters_wherever_they_are_drawn() -> None:
    texts = ["Oak", "Under 40", "R\u00e9union"]
    facts = facts_of_labels(np.array([[1, 2, 3, 4]]), [*map(Label, texts), Label("", "value", ["5"])])
    spelled = facts[SPELLING_FACTS:, 0].T
    assert _letters(spelled[0, :SPELLED_FIRST]) == "oak." and _letters(spelled[0, SPELLED_FIRST:]) == "kao"
    assert _letters(spelled[1, :SPELLED_FIRST]) == "under" and _letters(spelled[1, SPELLED_FIRST:]) == "04 "
    assert _letters(spelled[2, :SPELLED_FIRST]) == "r?uni"
    assert (spelled[3] == UNKNOWN).all()


def _letters(row: np.ndarray) -> str:
    """What one token's facts spell: a dot for the end, a question mark for characters that have no class."""
    alphabet = "." + SPELLING_CHARACTERS + "?"
    return "".join(alphabet[one] for one in row if one != UNKNOWN)


def test_nothing_is_learned_after_the_end_of_a_value_or_of_a_value_that_is_too_long() -> None:
    facts = facts_of_labels(np.array([[1]]), [Label("Oak", values=["17", "1234567"])])[:COLOUR_FACT, 0, 0]
    short, long = facts[:VALUE_LENGTH], facts[VALUE_LENGTH : 2 * VALUE_LENGTH]
    assert short.tolist() == [2, 8, 0, UNKNOWN, UNKNOWN, UNKNOWN]
    assert long.tolist() == [2, 3, 4, 5, 6, 7]


def test_a_token_with_two_labels_shows_none() -> None:
    slots = np.zeros((2, 8), np.uint8)
    slots[:, 1], slots[:, 2], slots[:, 4:] = 1, 2, 2
    assert labels_of_tokens(slots).tolist() == [[0, 2]]


def test_a_question_looks_for_what_it_mentions_or_else_for_its_answer() -> None:
    labels = [
        Label("Oak", values=["7"], order=0),
        Label("Elm", values=["9"], order=1),
        Label("A.B", values=["9"], order=2),
        Label("7", "value", order=0),
        Label("9", "value", order=1),
    ]
    _expect(
        labels,
        {
            ("Read the value of Oak.", "7"): (1, 0, 0, 4, 0),
            ("Which label has 7?", "Elm"): (2, 0, 0, 5, 0),
            ("Elm or Oak, which is more?", "Oak"): (2, 0, 1, 5, 4),
            ("Oaks?", "3"): (0, 0, 0, 0, 0),
            ("A.B?", "4"): (3, 0, 0, 0, 0),
            ("The highest value?", "7"): (1, 0, 0, 4, 0),
            ("The lowest value?", "9"): (0, 0, 0, 0, 0),
            ("How many trees?", "7"): (0, 0, 0, 0, 0),
            ("Trees: count?", "7"): (0, 0, 0, 0, 0),
        },
    )


def test_a_question_about_several_series_looks_for_the_mark_of_its_category_and_series() -> None:
    labels = [
        Label("Oak", values=["7", "5"], order=0),
        Label("Elm", values=["9", "7"], order=1),
        Label("Men", "series", place=0),
        Label("Women", "series", place=1),
        Label("", "value", ["7"], place=0, order=0),
        Label("", "value", ["5"], place=1, order=0),
        Label("", "value", ["9"], place=0, order=1),
        Label("", "value", ["7"], place=1, order=1),
    ]
    _expect(
        labels,
        {
            ("Women in Elm?", "7"): (2, 4, 0, 8, 0),
            ("Does Oak exceed Elm, Women?", "Yes"): (1, 4, 2, 6, 8),
            ("In Elm: Women or Men?", "Men"): (2, 4, 3, 8, 7),
            ("Which is red?", "Men"): (0, 3, 0, 0, 0),
            ("The highest value of Women?", "7"): (2, 4, 0, 8, 0),
            ("The highest value?", "9"): (0, 0, 0, 0, 0),
            ("Where does Men peak?", "Elm"): (2, 3, 0, 7, 0),
        },
    )


def _expect(labels: list[Label], expected: dict[tuple[str, str], tuple[int, ...]]) -> None:
    """Check the labels that questions look for by their numbers, in a picture that shows each once."""
    shown = np.arange(10).reshape(2, 5)
    sought = places_of_labels(shown, labels, list(expected))
    assert sought.shape == (LOOKS, len(expected), 2, 5)
    for number, (question, wanted) in enumerate(expected.items()):
        for look, label in enumerate(wanted):
            assert (sought[look, number] == ((shown == label) & (label > 0))).all(), (question, look)


def _charts(count: int) -> list[ChartSpec]:
    return [random_chart(Random(f"labels/{number}")) for number in range(count)]


def test_the_labels_of_a_chart_say_what_its_table_says() -> None:
    kinds, several = set(), 0
    for spec in _charts(60):
        labels = {label.text: label for label in chart_labels(spec) if label.kind != "value"}
        for index, category in enumerate(spec.categories):
            assert [float(value) for value in labels[category].values] == [one.values[index] for one in spec.series]
        for place, one in enumerate(spec.series):
            falling = sorted(spec.categories, key=lambda name: -float(labels[name].values[place]))
            assert [labels[name].ranks[place] for name in falling] == list(range(len(one.values)))
        for paint, category in zip(spec.category_paints, spec.categories, strict=False):
            assert labels[category].colour == paint.name
        for place, one in enumerate(spec.series if len(spec.series) > 1 else ()):
            several += 1
            assert labels[one.name].place == place
            assert labels[one.name].colour == (one.paint.name if one.paint else "")
        kinds.add(spec.chart_type)
        printed = [label for label in chart_labels(spec) if label.kind == "value"]
        assert len({label.text for label in printed}) == len(printed)
        assert bool(printed) == (spec.chart_type in ("pie", "table"))
        assert all(label.text == spec.printed(float(label.values[0])) for label in printed)
        if spec.chart_type == "pie":
            assert {(label.order, label.colour, *label.values) for label in printed} == {
                (order, labels[category].colour, *labels[category].values)
                for order, category in enumerate(spec.categories)
            }
    assert several > 10 and kinds == set(CHART_TYPES)


def test_the_facts_of_a_mark_are_those_of_its_category_and_its_series() -> None:
    several = 0
    for spec in _charts(40):
        labels = {label.text: label for label in chart_labels(spec) if label.kind != "value"}
        marks = [label for _, label in chart_marks(spec)]
        if spec.chart_type in ("pie", "table"):
            assert not marks
            continue
        count = len(spec.categories)
        assert len(marks) == count * len(spec.series)
        for number, mark in enumerate(marks):
            place, category = number // count, labels[spec.categories[number % count]]
            assert list(mark.values) == [category.values[place]] and list(mark.ranks) == [category.ranks[place]]
            assert mark.order == category.order == number % count
            series = labels.get(spec.series[place].name)
            assert mark.place == (series.place if series else None)
            several += bool(series)
            assert not spec.category_paints or mark.colour == category.colour
            assert not series or mark.colour == series.colour
    assert several > 10


def test_the_facts_of_a_charts_labels_stand_where_the_labels_are_written() -> None:
    spec = _charts(1)[0]
    picture = chart(Random("labels/0"), (spec.width, spec.height))
    assert picture.facts is not None and picture.slots is not None
    named = (picture.facts != UNKNOWN).any(0)
    written = (picture.slots[0] != 0).reshape(named.shape[0], 2, named.shape[1], 4).any((1, 3))
    assert named.sum() >= 2 and (written & named).sum() >= 0.95 * named.sum()
