"""Questions that stand in a data set more than once, with the same answer or with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.data.sample import Sample

DUPLICATE, CONTRADICTION = "duplicate", "contradiction"


@dataclass(frozen=True, slots=True)
class Repeat:
    """A question that was asked before of the same images, in the same words but for case and spaces.

    Attributes:
        kind: `DUPLICATE` where the answer is the earlier one's, `CONTRADICTION` where no answer of the two is the same.
        sample, earlier: both questions.
    """

    kind: str
    sample: Sample
    earlier: Sample

    def __str__(self) -> str:
        """One line for people."""
        places = [str(one.metadata.get("where", one.id)) for one in (self.sample, self.earlier)]
        answers = " and ".join(f'"{one.target[:60]}"' for one in (self.earlier, self.sample))
        differing = f"; answers: {answers}" if self.kind == CONTRADICTION else ""
        return f'{places[0]} asks what {places[1]} asks: "{self.sample.shown_question[:80]}"{differing}'

    def to_json(self) -> dict[str, Any]:
        """A line of repeats.jsonl."""
        return {
            "kind": self.kind,
            "id": self.sample.id,
            "earlier": self.earlier.id,
            "question": self.sample.shown_question,
            "answers": list(self.sample.answers),
            "earlier_answers": list(self.earlier.answers),
        }


def find_repeats(samples: Sequence[Sample]) -> list[Repeat]:
    """Find the questions that come again, each against the first one that it repeats or contradicts.

    Two of them whose answers overlap without the same target (two people named different ones of several right
    answers) are neither.
    """
    found: list[Repeat] = []
    by_question: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        context = (sample.subject, sample.system, sample.history, sample.places)
        before = by_question.setdefault((*context, _plain(sample.question)), [])
        same = next((one for one in before if _plain(one.target) == _plain(sample.target)), None)
        other = next((one for one in before if _accepted(one).isdisjoint(_accepted(sample))), None)
        if same is not None:
            found.append(Repeat(DUPLICATE, sample, same))
            continue
        if other is not None:
            found.append(Repeat(CONTRADICTION, sample, other))
        before.append(sample)
    return found


def _accepted(sample: Sample) -> set[str]:
    return {_plain(answer) for answer in (sample.target, *sample.answers)} - {""}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
