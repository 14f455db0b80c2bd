"""The evaluated questions of a run, base and tuned answers side by side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.report.fields import Fields

SIDES = ("base", "tuned")
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
    """What one model answered, its score between 0 and 1, and whether the limit of tokens ended the answer."""

    text: str
    score: float
    cut: bool = False

    @property
    def verdict(self) -> str:
        """`right` from half of the score on: partial scores exist in TextVQA."""
        return "right" if self.score >= 0.5 else "wrong"


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
    rows = {side: _read_rows(evaluation / side / name / artifacts.PREDICTIONS, problems) for side in SIDES}
    for identity in dict.fromkeys([*rows["base"], *rows["tuned"]]):
        base, tuned = rows["base"].get(identity), rows["tuned"].get(identity)
        either = tuned or base
        if either is None:
            continue
        image = _image_path(evaluation, either.text("image"))
        foreign = f"{name}: names of pictures that lead out of evaluation/ are not followed"
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
            base=_answer(base),
            tuned=_answer(tuned),
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


def _answer(row: Fields | None) -> Answer | None:
    if row is None:
        return None
    return Answer(row.text("prediction"), row.number("score") or 0.0, row.flag("cut") is True)


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


def choose(predictions: Iterable[Prediction], limit: int = 12) -> list[Prediction]:
    """Choose a mix of outcomes across benchmarks: the same predictions always give the same choice.

    Outcomes take turns, and within an outcome the benchmark shown least so far. Within both, the order is that of a
    hash of the id, which favours no part of a file; predictions whose picture was saved go first, and among them
    pictures not shown yet.

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


def _rank(one: Prediction) -> tuple[bool, bytes, str]:
    """The order of choice within one outcome and benchmark."""
    pictured = one.image is not None and one.image.is_file()
    return not pictured, hashlib.sha256(_encoded(one.id)).digest(), one.id


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
