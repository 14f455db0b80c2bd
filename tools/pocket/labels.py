"""What the labels of a picture teach: their facts, and where to look for one.

The facts of a label are its values as they are written (of every series), the ranks of these values, its colour, its
order among the categories, its place in the legend, and how it is spelled: a question finds a label by its letters,
and these lie differently on the tokens of every picture. The ends of bars and the printed values have facts too: what
belongs to a label is seen there first. A question looks for up to three labels, the first category that it names, the
first series, and the second of either kind; and then for the marks where these meet.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_sft.data.demo.vocabulary import COLOURS

UNKNOWN = 255  # in a map of slots or facts: not recorded, nothing is learned from it
VALUE_CHARACTERS = string.digits + ".,:%$-"
VALUES_OF_LABEL = 3
VALUE_LENGTH = 6
SPELLED_FIRST, SPELLED_LAST = 5, 3  # characters of a label that are facts
SPELLING_CHARACTERS = VALUE_CHARACTERS + string.ascii_lowercase + " "
# Classes of one fact: of a character 0 is the end of the text, the last any other one; others are numbers from 0 on.
FACT_CLASSES = 2 + len(SPELLING_CHARACTERS)
# Rows of facts: characters of the values, colour, place, ranks of the values, order, characters of the label.
COLOUR_FACT = VALUES_OF_LABEL * VALUE_LENGTH
PLACE_FACT = COLOUR_FACT + 1
RANK_FACTS = PLACE_FACT + 1
ORDER_FACT = RANK_FACTS + VALUES_OF_LABEL
SPELLING_FACTS = ORDER_FACT + 1
FACTS = SPELLING_FACTS + SPELLED_FIRST + SPELLED_LAST
LOOKS = 5  # what one question looks for: three labels and two marks
SOUGHT = ("category", "series")
_NOT_A_VALUE = re.compile(r"how many|count\b|for how many|.*: count\?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Label:
    """A text or a mark of a picture that facts belong to.

    Attributes:
        text: as written; "" for a mark.
        kind: "category", "series" or "value", the last for one mark or its printed value; a question looks for the
            first two.
        values: as answers give them, one for each series; those beyond VALUES_OF_LABEL are not taught.
        colour: name of the colour of its mark; "" where it has none.
        place: of a series among several, from 0 on; None where there is one.
        ranks: of each value among those of its series, 0 for the largest.
        order: of a category among all, from 0 on, and of its marks; None for a series.
    """

    text: str
    kind: str = "category"
    values: Sequence[str] = ()
    colour: str = ""
    place: int | None = None
    ranks: Sequence[int] = ()
    order: int | None = None


def rank(value: float, values: Sequence[float]) -> int:
    """How many of the values are larger."""
    return sum(other > value for other in values)


def label_targets(
    shown: np.ndarray, labels: Sequence[Label], questions: Sequence[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """What a picture of labels teaches besides its answers, by the names of `Picture`.

    Args:
        shown: (rows, columns) see `labels_of_tokens`.
        labels: number 1, 2 and so on.
        questions: pairs of question and answer.
    """
    return {"facts": facts_of_labels(shown, labels), "sought": places_of_labels(shown, labels, questions)}


def labels_of_tokens(slots: np.ndarray) -> np.ndarray:
    """The number of the label that each visual token shows.

    Args:
        slots: (height / 8, width / 4) the number of the label in each slot, 0 for none.

    Returns:
        (height / 16, width / 16) uint8; 0 where a token shows no label, or two.
    """
    tokens = slots.reshape(slots.shape[0] // 2, 2, slots.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    most, least = tokens.max((2, 3)), np.where(tokens == 0, 255, tokens).min((2, 3))
    return np.where(most == least, most, 0)


def facts_of_labels(shown: np.ndarray, labels: Sequence[Label]) -> np.ndarray:
    """The facts about the label under every visual token.

    Args:
        shown: (rows, columns) see `labels_of_tokens`.
        labels: number 1, 2 and so on.

    Returns:
        (FACTS, rows, columns) uint8 classes; UNKNOWN where there is no such fact, after the end of a text, and under
            tokens without a label.
    """
    facts = np.full((1 + len(labels), FACTS), UNKNOWN, np.uint8)
    for row, label in zip(facts[1:], labels, strict=True):
        for number, text in enumerate(label.values[:VALUES_OF_LABEL]):
            spelled = _spelled(text, VALUE_LENGTH)
            row[number * VALUE_LENGTH :][: len(spelled)] = spelled
        if label.colour:
            row[COLOUR_FACT] = list(COLOURS).index(label.colour)
        if label.place is not None:
            row[PLACE_FACT] = label.place
        ranks = label.ranks[:VALUES_OF_LABEL]
        row[RANK_FACTS:][: len(ranks)] = ranks
        if label.order is not None:
            row[ORDER_FACT] = label.order
        if label.text:
            forwards, backwards = _spelled(label.text, SPELLED_FIRST), _spelled(label.text[::-1], SPELLED_LAST)
            row[SPELLING_FACTS:][: len(forwards)] = forwards
            row[SPELLING_FACTS + SPELLED_FIRST :][: len(backwards)] = backwards
    return facts[shown].transpose(2, 0, 1)


def _spelled(text: str, length: int) -> list[int]:
    """The classes of the first characters of a text and of its end, letter case aside, at most `length`."""
    places = (SPELLING_CHARACTERS.find(one) for one in text.lower())
    return [*(1 + place if place >= 0 else FACT_CLASSES - 1 for place in places), 0][:length]


def places_of_labels(shown: np.ndarray, labels: Sequence[Label], questions: Sequence[tuple[str, str]]) -> np.ndarray:
    """Where one has to look for the answer of every question, as far as labels tell.

    Args:
        shown: (rows, columns) see `labels_of_tokens`.
        labels: number 1, 2 and so on.
        questions: pairs of question and answer.

    Returns:
        (LOOKS, questions, rows, columns) bool: the visual tokens that show what is sought; none where there is none.
    """
    wanted = np.array([_wanted(labels, *pair) for pair in questions], np.int64).reshape(-1, LOOKS).T
    return (shown == wanted[:, :, None, None]) & (wanted > 0)[:, :, None, None]


def _wanted(labels: Sequence[Label], question: str, answer: str) -> tuple[int, ...]:
    """The numbers of the labels and marks that a question looks for, 0 for none.

    They are the first category that it mentions, or else the one that is the answer or has it as its only value of
    that kind; the first series that it mentions, or else the one that is the answer; the second category or series;
    the mark of the first category and series; and the mark that the second of either kind has instead.
    """
    numbers = {kind: [n for n, label in enumerate(labels, start=1) if label.kind == kind] for kind in SOUGHT}
    categories, series = (_mentioned(labels, group, question) for group in numbers.values())
    if not series:
        series = [n for n in numbers["series"] if labels[n - 1].text == answer][:1]
    if not categories:
        categories = [n for n in numbers["category"] if labels[n - 1].text == answer][:1]
    if not categories and not _NOT_A_VALUE.match(question) and (series or not numbers["series"]):
        place = (labels[series[0] - 1].place or 0) if series else 0
        owners = [n for n in numbers["category"] if [answer] == list(labels[n - 1].values[place : place + 1])]
        categories = owners if len(owners) == 1 else []
    marks = {(label.order, label.place): n for n, label in enumerate(labels, start=1) if label.kind == "value"}
    orders = [labels[n - 1].order for n in categories[:2]]
    places = [labels[n - 1].place for n in series[:2]] or [None]
    met = [marks.get((order, place), 0) for order in orders for place in places]
    return tuple((group + [0])[0] for group in (categories, series, categories[1:] or series[1:], met, met[1:]))


def _mentioned(labels: Sequence[Label], numbers: Sequence[int], question: str) -> list[int]:
    """Those labels that a question mentions as a whole, in its order."""
    spots = []
    for number in numbers:
        match = re.search(rf"(?<!\w){re.escape(labels[number - 1].text)}(?!\w)", question)
        if match:
            spots.append((match.start(), number))
    return [number for _, number in sorted(spots)]
