"""What trackers are told about a run: its recipe, its table, a few answered questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_sft.common import artifacts, formats
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.report.collect import parse_results
from vlm_sft.report.markdown import table, told
from vlm_sft.report.pictures import scaled
from vlm_sft.report.predictions import Answer, Prediction, choose, read_predictions
from vlm_sft.report.records import Benchmark
from vlm_sft.trackers.card import draw_card

SAMPLES = 8  # answered questions that are shown
TABLE = ("benchmark", "metric", "n", "base", "tuned", "difference", "verdict")
COLUMNS = ("benchmark", "question", "reference", "base", "tuned", "outcome", "id")


def recipe_texts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's keys with their values as JSON, but texts as they are: {"learning_rate": "0.0001", …}."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in recipe.items()}


def recipe_markdown(recipe: Mapping[str, Any]) -> str:
    """The recipe as a Markdown table of two columns."""
    return table([("key", "value"), *recipe_texts(recipe).items()])


@dataclass(frozen=True, slots=True)
class Shown:
    """One answered question.

    Attributes:
        picture: its image at most 480 pixels wide and high, RGB; None where none can be shown.
        values: its texts in the order of `COLUMNS`.
        card: the picture with these texts below it, for trackers that show pictures alone.
    """

    picture: Image.Image | None
    values: tuple[str, ...]
    card: Image.Image


class Outcome:
    """What a run came to, read from its files.

    Args:
        folder: the run's folder, after the final evaluation.

    Attributes:
        path: its results.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / artifacts.RESULTS

    @cached_property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The rows of the results table; none where results.json is missing or damaged."""
        try:
            return parse_results(artifacts.read_json(self.path))
        except RunError:
            return ()

    @cached_property
    def scores(self) -> dict[str, float]:
        """{"results/chartqa/base": 0.5, …} with base, tuned and difference: fractions from 0 to 1, and their change."""
        found = {}
        for one in self.benchmarks:
            sides = (("base", one.base), ("tuned", one.tuned))
            values = [(side, score.accuracy if score else None) for side, score in sides]
            for name, value in (*values, ("difference", one.difference)):
                if value is not None:
                    found[f"results/{one.name}/{name}"] = value
        return found

    @cached_property
    def rows(self) -> list[tuple[str, ...]]:
        """The results table as texts, in the order of `TABLE`: percent with 95 % intervals, percentage points."""
        return [
            (
                one.title,
                one.metric,
                formats.count(one.n),
                told(one.base),
                told(one.tuned),
                f"{formats.points(one.difference)} {formats.points_interval(one.difference_interval)}".strip(),
                one.verdict,
            )
            for one in self.benchmarks
        ]

    @cached_property
    def shown(self) -> list[Shown]:
        """A mix of right and wrong answers of base and tuned, the same for the same predictions."""
        return [_shown(one) for one in choose(read_predictions(self.folder, []), SAMPLES)]


def _shown(one: Prediction) -> Shown:
    try:
        picture = scaled(one.image) if one.image is not None else None
    except DataError:
        picture = None
    reference = ", ".join(text if count == 1 else f"{text} ({count})" for text, count in one.references)
    lines = [
        ("question", formats.shorten(one.question, 300), ""),
        ("reference", formats.shorten(reference, 200), ""),
        *((side, *_answer(answer)) for side, answer in (("base", one.base), ("tuned", one.tuned))),
    ]
    base, tuned = (_answer(answer)[0] for answer in (one.base, one.tuned))
    values = (one.benchmark, one.question, reference, base, tuned, one.outcome, one.id)
    return Shown(picture, values, draw_card(picture, lines))


def _answer(answer: Answer | None) -> tuple[str, str]:
    """What a model answered, and whether that was "right" or "wrong"; "" where it was not asked."""
    if answer is None:
        return formats.NOTHING, ""
    return formats.shorten(answer.text, 300) + (" [cut at the token limit]" if answer.cut else ""), answer.verdict
