"""The predictions of a page as JSON that its script reads.

Every text is data to the script, which only ever sets it as text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from vlm_sft.common.formats import shorten
from vlm_sft.report.pictures import Album, thumbnail
from vlm_sft.report.predictions import NEAR, Answer, Prediction, choose, showcase
from vlm_sft.report.records import RunReport

ROWS = 20_000  # predictions of one page, shared out between its runs
ROWS_AT_LEAST = 100  # of each run
CARDS = 12  # shown without the script, and on paper


@dataclass(frozen=True, slots=True)
class Card:
    """One prediction that the page shows without its script: its picture as a data address, or "" and why not."""

    run: str
    prediction: Prediction
    picture: str
    reason: str


@dataclass(frozen=True, slots=True)
class Browser:
    """What the page's list of predictions needs.

    Attributes:
        data: JSON for a script element.
        held, total: predictions in the page, and in the runs.
        pictures: how many are embedded.
        unpictured: questions that are shown without one, by reason.
        cards: a fixed choice from every outcome and benchmark.
        highlights: a smaller one with pictures, for the head of a page about one run; empty for several.
    """

    data: str
    held: int
    total: int
    pictures: int
    unpictured: dict[str, int]
    cards: list[Card]
    highlights: list[Card]


def browser(runs: Sequence[RunReport]) -> Browser:
    """Gather the predictions of all runs.

    Questions and pictures that runs share are held once. Where there are more predictions than a page can hold, each
    run keeps a sample that is drawn by a hash of the id, so that runs keep the same questions.
    """
    limit = max(ROWS_AT_LEAST, ROWS // len(runs))
    chosen = [choose(run.predictions, max(1, CARDS // len(runs))) for run in runs]
    kept = [_ordered(run.predictions, first, limit) for run, first in zip(runs, chosen, strict=True)]
    album = Album(one.image for turn in zip_longest(*kept) for one in turn if one is not None)
    questions: dict[tuple[Any, ...], int] = {}
    listed = []
    for run, rows in zip(runs, kept, strict=True):
        answers = [
            [questions.setdefault(_question(one, album), len(questions)), _answer(one.base), _answer(one.tuned)]
            for one in rows
        ]
        listed.append({"name": run.name, "rows": answers})
    cards = [_card(run.name, one, album) for run, rows in zip(runs, chosen, strict=True) for one in rows]
    first = showcase(runs[0].predictions) if len(runs) == 1 else []
    highlights = [_card(runs[0].name, one, album) for one in first]
    reasons = (album.reason(album.number(one.image)).partition(":")[0] for rows in kept for one in rows)
    unpictured = Counter(reason for reason in reasons if reason)
    data = {"runs": listed, "questions": list(questions), "pictures": album.addresses, "unpictured": album.reasons}
    data["near"] = NEAR
    return Browser(
        as_data(data),
        sum(map(len, kept)),
        sum(len(run.predictions) for run in runs),
        len(album.addresses),
        dict(unpictured.most_common()),
        cards[:CARDS],
        [card for card in highlights if card.picture],
    )


def _ordered(predictions: Sequence[Prediction], first: Sequence[Prediction], limit: int) -> list[Prediction]:
    """At most `limit` predictions: the chosen ones, then the others in the order of a hash of benchmark and id.

    So the first ones show a bit of everything, and so do those that are kept and those whose pictures are embedded.
    """
    shown = {(one.benchmark, one.id) for one in first}
    others = sorted((one for one in predictions if (one.benchmark, one.id) not in shown), key=_rank)
    return [*first, *others][:limit]


def _rank(one: Prediction) -> tuple[bool, bytes]:
    """Those whose picture was kept first: which they are does not depend on any answer."""
    pictured = one.image is not None and one.image.is_file()
    return not pictured, hashlib.sha256(f"{one.benchmark}\n{one.id}".encode("utf-8", "surrogatepass")).digest()


def _card(run: str, one: Prediction, album: Album) -> Card:
    number = album.number(one.image)
    if number < 0 or one.image is None:
        return Card(run, one, "", album.reason(number))
    return Card(run, one, thumbnail(one.image), "")


def _question(one: Prediction, album: Album) -> tuple[Any, ...]:
    """What the answers of several models to one question share."""
    references = tuple((shorten(text), n) for text, n in one.references[:4])
    return (
        one.benchmark,
        shorten(one.id, 120),
        album.number(one.image),
        shorten(one.question),
        references,
        max(0, len(one.references) - len(references)),
        one.split,
        shorten(one.question_type, 60),
    )


def _answer(answer: Answer | None) -> list[Any] | None:
    """Text, score, and where one of them holds: cut, right by a tolerance alone."""
    if answer is None:
        return None
    marks = [int(answer.cut), int(answer.near)] if answer.near else [1] if answer.cut else []
    return [shorten(answer.text), round(answer.score, 4), *marks]


def as_data(value: Any) -> str:
    """JSON that nothing in it can end or leave a script element: no angle bracket, no ampersand, ASCII only."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
