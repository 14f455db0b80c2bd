"""The evaluated questions of a run, base and tuned answers side by side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.evaluate.metrics import RELATIVE_TOLERANCE, as_number
from vlm_sft.report.fields import Fields

SIDES = ("base", "tuned")
NEAR = f"right within {100 * RELATIVE_TOLERANCE:.0f} %"
# The most telling first: pictures are chosen in turn from these groups.
OUTCOMES = (
    "wrong → right",
    "right → wrong",
    "both wrong",
    "both right",
    "base only: wrong",
    "base only: right",
    "tuned only: wrong",
    "tuned only: right",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model answered.

    Attributes:
        text: the answer.
        score: between 0 and 1.
        cut: the limit of tokens ended it.
        near: a number that counts as right by the benchmark's tolerance and equals no reference.
    """

    text: str
    score: float
    cut: bool = False
    near: bool = False

    @property
    def verdict(self) -> str:
        """`right` from half of the score on: partial scores exist in TextVQA."""
        return "right" if self.score >= 0.5 else "wrong"

    @property
    def label(self) -> str:
        """The verdict as a reader needs it: 1995 where 1994 was expected is not simply right."""
        return NEAR if self.near else self.verdict


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question with its picture, references, and the answers of base and tuned model (None: not evaluated).

    Questions of equal `cluster` hang together; "" stands alone.
    """

    benchmark: str
    id: str
    image: Path | None
    question: str
    answers: tuple[str, ...]
    split: str
    question_type: str
    base: Answer | None
    tuned: Answer | None
    cluster: str = ""

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        if self.base and self.tuned:
            if self.base.verdict == self.tuned.verdict:
                return f"both {self.base.verdict}"
            return f"{self.base.verdict} → {self.tuned.verdict}"
        side, answer = ("base", self.base) if self.base else ("tuned", self.tuned)
        return f"{side} only: {answer.verdict if answer else 'wrong'}"

    @property
    def is_near(self) -> bool:
        """Whether one of the answers is right by a tolerance alone."""
        return any(answer is not None and answer.near for answer in (self.base, self.tuned))

    @property
    def references(self) -> tuple[tuple[str, int], ...]:
        """The distinct reference answers with how often each was given, the most frequent first."""
        return tuple(Counter(self.answers).most_common())


def read_predictions(folder: Path, problems: list[str]) -> tuple[Prediction, ...]:
    """Read all predictions of a run, in the order of the benchmark names and of the files.

    Args:
        folder: the run folder.
        problems: receives a message for every file that cannot be read.
    """
    evaluation = folder / artifacts.EVALUATION_FOLDER
    names = {path.parent.name for side in SIDES for path in evaluation.glob(f"{side}/*/{artifacts.PREDICTIONS}")}
    return tuple(prediction for name in sorted(names) for prediction in _read_benchmark(evaluation, name, problems))


def _read_benchmark(evaluation: Path, name: str, problems: list[str]) -> Iterable[Prediction]:
    return read_pairs(evaluation / "base" / name, evaluation / "tuned" / name, evaluation, problems)


def read_pairs(before: Path, after: Path, pictures: Path, problems: list[str]) -> Iterable[Prediction]:
    """Read the answers of two models, or of two moments of a training, to the questions of one benchmark.

    Args:
        before, after: folders of predictions, named as the benchmark; either may be missing.
        pictures: what the names of pictures are relative to; one that leads out of it is not followed.
        problems: receives a message for every file that cannot be read.
    """
    name = after.name
    rows = {"base": _read_rows(before / artifacts.PREDICTIONS, problems)}
    rows["tuned"] = _read_rows(after / artifacts.PREDICTIONS, problems)
    for identity in dict.fromkeys([*rows["base"], *rows["tuned"]]):
        base, tuned = rows["base"].get(identity), rows["tuned"].get(identity)
        either = tuned or base
        if either is None:
            continue
        image = _image_path(pictures, either.text("image"))
        foreign = f"{name}: names of pictures that lead out of {pictures.name}/ are not followed"
        if image is None and either.text("image") and foreign not in problems:
            problems.append(foreign)
        yield Prediction(
            benchmark=name,
            id=identity,
            image=image,
            question=either.text("question"),
            answers=either.texts("answers"),
            split=either.text("split"),
            question_type=either.text("question_type"),
            base=_answer(base, either.texts("answers")),
            tuned=_answer(tuned, either.texts("answers")),
            cluster=either.text("cluster") or either.text("image"),
        )


def _read_rows(path: Path, problems: list[str]) -> dict[str, Fields]:
    """Rows by id; an evaluation that is still being written may end in a torn line, which is passed over."""
    if not path.is_file():
        return {}
    place = "/".join(path.parts[-4:])
    rows: dict[str, Fields] = {}
    try:
        for number, row in enumerate(artifacts.read_jsonl(path), start=1):
            fields = Fields(row, f"{place} row {number}", problems)
            if fields.given("id"):
                rows[fields.text("id")] = fields
    except (RunError, OSError, UnicodeDecodeError) as error:
        problems.append(f"{place}: {getattr(error, 'what', error)}")
    return rows


def _answer(row: Fields | None, references: Sequence[str]) -> Answer | None:
    if row is None:
        return None
    text, score = row.text("prediction"), row.number("score") or 0.0
    return Answer(text, score, row.flag("cut") is True, score == 1 and _other_number(text, references))


def _other_number(text: str, references: Sequence[str]) -> bool:
    """Whether an answer is a number, and all its references are other numbers: only a tolerance makes it right."""
    value = as_number(text.strip())
    expected = [as_number(reference.strip()) for reference in references]
    return value is not None and bool(expected) and all(one is not None and one != value for one in expected)


def _image_path(evaluation: Path, relative: str) -> Path | None:
    """The picture's path, or None when none is named or the name leads out of the evaluation folder."""
    if not relative or "\0" in relative:
        return None
    path = evaluation / relative
    return path if path.resolve().is_relative_to(evaluation.resolve()) else None


def tally(predictions: Iterable[Prediction]) -> dict[str, dict[str, int]]:
    """Count the outcomes of every benchmark: {benchmark: {outcome: n}}; outcomes that never occur are left out."""
    counted: dict[str, Counter[str]] = {}
    for prediction in predictions:
        counted.setdefault(prediction.benchmark, Counter())[prediction.outcome] += 1
    return {name: {key: counts[key] for key in OUTCOMES if counts[key]} for name, counts in counted.items()}


def tally_near(predictions: Iterable[Prediction]) -> dict[str, int]:
    """Count for every benchmark the questions in which a tuned answer is right by a tolerance alone."""
    return dict(Counter(one.benchmark for one in predictions if one.tuned is not None and one.tuned.near))


def choose(predictions: Iterable[Prediction], limit: int = 12) -> list[Prediction]:
    """Choose a mix of outcomes across benchmarks: the same predictions always give the same choice.

    Outcomes take turns, and within an outcome the benchmark shown least so far. Within both, the order is that of a
    hash of the id, which favours no part of a file; answers that only a tolerance makes right go last, predictions
    whose picture was saved first, and among them pictures not shown yet.

    Args:
        predictions: all predictions of a run.
        limit: how many to choose at most.

    Returns:
        The chosen ones, ordered by outcome, then benchmark.
    """
    groups: dict[str, dict[str, list[Prediction]]] = {outcome: {} for outcome in OUTCOMES}
    for prediction in sorted(predictions, key=_rank):
        groups[prediction.outcome].setdefault(prediction.benchmark, []).append(prediction)
    chosen: list[Prediction] = []
    shown_images: set[Path] = set()
    shown_benchmarks: Counter[str] = Counter()
    while len(chosen) < limit and any(groups.values()):
        for outcome in OUTCOMES:
            if len(chosen) == limit or not groups[outcome]:
                continue
            benchmark = min(groups[outcome], key=lambda name: (shown_benchmarks[name], name))
            queue = groups[outcome][benchmark]
            index = next((i for i, one in enumerate(queue) if one.image not in shown_images), 0)
            picked = queue.pop(index)
            if not queue:
                del groups[outcome][benchmark]
            shown_benchmarks[benchmark] += 1
            if picked.image is not None:
                shown_images.add(picked.image)
            chosen.append(picked)
    return sorted(chosen, key=lambda one: (OUTCOMES.index(one.outcome), one.benchmark))


def showcase(predictions: Sequence[Prediction], limit: int = 6) -> list[Prediction]:
    """Choose what a page begins with: half of it answers that came right, then those that did not."""
    improved = [one for one in predictions if one.outcome == OUTCOMES[0]]
    others = [one for one in predictions if one.outcome != OUTCOMES[0] and one.outcome != "both right"]
    rest = choose(others, limit // 2)
    return [*choose(improved, limit - len(rest)), *rest]


def _rank(one: Prediction) -> tuple[bool, bool, bytes, str]:
    """The order of choice within one outcome and benchmark."""
    pictured = one.image is not None and one.image.is_file()
    return one.is_near, not pictured, hashlib.sha256(_encoded(one.id)).digest(), one.id


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
