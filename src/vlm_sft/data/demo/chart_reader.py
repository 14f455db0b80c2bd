"""Draws the parts of questions about a synthetic chart: values, names, phrasings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from vlm_sft.data.demo.spec import ChartSpec, Series

NAMED_PARTS = {
    "bar": "bar",
    "horizontal_bar": "bar",
    "grouped_bar": "bar",
    "line": "line",
    "pie": "slice",
    "table": "row",
}


@dataclass(frozen=True, slots=True)
class ChartQuestion:
    """A question with its one right answer.

    Attributes:
        question_type: "retrieval", "comparison", "arithmetic", "counting", "extreme", "yes/no", "colour" or
            "structure".
        answer_type: "number", "text" or "yes/no".
        split: "augmented" for retrieval, "human" for everything else.
    """

    text: str
    answer: str
    question_type: str
    answer_type: str

    @property
    def split(self) -> str:
        """The split of ChartQA that asks questions of this kind."""
        return "augmented" if self.question_type == "retrieval" else "human"


def plain(value: float) -> str:
    """A number as an answer: no unit, at most two decimals, no trailing zeros."""
    rounded = round(value, 2)
    return str(int(rounded)) if rounded == int(rounded) else f"{rounded:.2f}".rstrip("0")


def make_question(question_type: str, text: str, answer: str | float | bool) -> ChartQuestion:
    """A question whose answer is written, and sorted, by its Python type."""
    if isinstance(answer, bool):
        return ChartQuestion(text, "Yes" if answer else "No", question_type, "yes/no")
    if isinstance(answer, str):
        return ChartQuestion(text, answer, question_type, "text")
    return ChartQuestion(text, plain(answer), question_type, "number")


def drawn_parts(spec: ChartSpec) -> int:
    """How many bars, lines, slices or rows a chart has."""
    if spec.chart_type == "line":
        return len(spec.series)
    return len(spec.categories) * (1 if spec.chart_type == "table" else len(spec.series))


class ChartReader:
    """Draws from a chart what a question is about, and how it is put."""

    def __init__(self, spec: ChartSpec, rng: Random) -> None:
        self.spec = spec
        self.rng = rng
        self.part = NAMED_PARTS[spec.chart_type]
        self.single = len(spec.series) == 1

    def where(self, category: str) -> str:
        """A category with its preposition: "in March"."""
        return f"{self.spec.preposition} {category}"

    def text(self, *templates: str, **words: object) -> str:
        """One of the phrasings, filled in."""
        chosen = self.rng.choice(templates)
        return chosen.format(noun=self.spec.noun, plural=self.spec.plural, part=self.part, **words)

    def series(self) -> tuple[Series, str]:
        """A series, and " for NAME" (or " for the COLOUR bars") where there are several."""
        one = self.rng.choice(self.spec.series)
        if self.single:
            return one, ""
        if one.paint is not None and self.rng.random() < 0.3:
            return one, f" for the {one.paint.name} {self.part}{'' if self.part == 'line' else 's'}"
        return one, f" for {one.name}"

    def row(self) -> tuple[dict[str, float], str]:
        """Values by category of one series, and the words that name the series."""
        one, suffix = self.series()
        return dict(zip(self.spec.categories, one.values, strict=True)), suffix

    def pair(self) -> list[str]:
        """Two different categories."""
        return self.rng.sample(self.spec.categories, 2)

    def threshold(self, values: list[float]) -> float | None:
        """A round number between the smallest and the largest value that equals none of them, or None.

        Without value labels it is a tick: only there a reader can tell on which side a value lies.
        """
        steps = (100, 50, 20, 10, 5, 2, 1) if self.spec.value_labels else (self.spec.tick_step,)
        for step in steps:
            first, last = int(min(values) // step) + 1, int(max(values) // step)
            choices = [level * step for level in range(first, last + 1) if level * step not in values]
            if choices:
                return self.rng.choice(choices)
        return None

    def level(self, value: float) -> str:
        """A threshold as a question prints it."""
        return plain(value) + self.spec.unit


Maker = Callable[[ChartReader], ChartQuestion | None]  # None where the chart has nothing of the kind
