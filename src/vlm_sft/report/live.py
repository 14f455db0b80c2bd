"""What a page that follows a run shows first: stage, progress, time left, curves, the latest validation answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vlm_sft.common import artifacts
from vlm_sft.report.pictures import Album
from vlm_sft.report.predictions import Prediction, choose, read_pairs
from vlm_sft.report.records import RunReport
from vlm_sft.report.svg import Drawing

CARDS = 12  # answers with pictures
TOLD = ("loss", "eval_loss")


@dataclass(frozen=True, slots=True)
class LiveCard:
    """One validation question: its picture as a data address ("" without one, for the reason), and its answers."""

    prediction: Prediction
    picture: str
    reason: str


@dataclass(frozen=True, slots=True)
class LiveScore:
    """How many of a benchmark's validation questions are right now, and at the evaluation before (None: none was)."""

    benchmark: str
    n: int
    right: int
    before: int | None


@dataclass(frozen=True, slots=True)
class LiveView:
    """A run that goes on.

    Attributes:
        stage: what it does, in words.
        step, steps: optimizer steps done and of the whole training; None where they are not known yet.
        ends: when all of it should be over, in seconds since 1970; None where nothing tells.
        numbers: label and value of the newest numbers.
        curves: the figures of the training.
        answered: the step of the newest validation answers, and of those before; None without any.
        scores, cards: of these answers.
    """

    stage: str
    step: int | None
    steps: int | None
    ends: float | None
    numbers: list[tuple[str, float]]
    curves: list[Drawing]
    answered: tuple[int, int | None] | None
    scores: list[LiveScore]
    cards: list[LiveCard]


def live_view(run: RunReport, curves: list[Drawing]) -> LiveView:
    """Look at a run that goes on.

    Args:
        run: with the status "running".
        curves: its figures.
    """
    record = run.record
    steps = record.planned_steps if record else None
    newest = max((points[-1][0] for points in run.series.values() if points), default=None)
    answered, predictions = _answers(run.folder, run.problems)
    named = [(name, points) for name, points in run.series.items() if name in TOLD or name == "questions_per_second"]
    return LiveView(
        stage=_stage(run, newest, steps),
        step=newest,
        steps=steps,
        ends=_end(run, newest, steps),
        numbers=[(name, points[-1][1]) for name, points in named],
        curves=curves,
        answered=answered,
        scores=_scores(predictions, answered is not None and answered[1] is not None),
        cards=_cards(predictions),
    )


def _stage(run: RunReport, newest: int | None, steps: int | None) -> str:
    """What the run does, as its files tell."""
    done = run.record.seconds if run.record else {}
    if "data" not in done:
        return "reading the data"
    if "load" not in done:
        return "preparing questions and images"
    if newest is None:
        return "loading the model"
    if "train_loss" in run.series or (steps is not None and newest >= steps and "evaluate" not in done):
        return "final evaluation"
    return "training"


def _end(run: RunReport, newest: int | None, steps: int | None) -> float | None:
    """When the run should be over: from its own speed once it trains, from its forecast before."""
    record = run.record
    forecast = next((one for one in record.forecasts if one.quantity == "time_seconds"), None) if record else None
    if record is None or forecast is None or forecast.value is None:
        return None
    times = run.series.get("time", [])
    if newest is None or steps is None or not times:
        return _seconds(record.started) + forecast.value if record.started else None
    step, spent = times[-1]
    first, before = times[0] if len(times) > 1 and times[0][0] < step else (0, 0.0)
    left = (spent - before) / max(step - first, 1) * max(steps - step, 0)
    try:
        written = (run.folder / artifacts.METRICS).stat().st_mtime
    except OSError:
        return None
    return written + left + forecast.items.get("final evaluation", 0.0)


def _seconds(moment: str) -> float:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0


def _answers(folder: Path, problems: list[str]) -> tuple[tuple[int, int | None] | None, list[Prediction]]:
    """The newest validation answers beside those of the evaluation before; the base's where there is none."""
    place = folder / artifacts.VALIDATION_FOLDER
    found = {
        int(path.parent.parent.name.removeprefix("step-")): path.parent.parent
        for path in place.glob("step-*/*/results.json")
        if path.parent.parent.name.removeprefix("step-").isdecimal()
    }
    if not found:
        return None, []
    newest, *earlier = sorted(found, reverse=True)
    before = found[earlier[0]] if earlier else place / "base"
    names = sorted(path.parent.name for path in found[newest].glob(f"*/{artifacts.PREDICTIONS}"))
    rows = [one for name in names for one in read_pairs(before / name, found[newest] / name, place, problems)]
    return (newest, earlier[0] if earlier else None), rows


def _scores(predictions: Sequence[Prediction], earlier: bool) -> list[LiveScore]:
    asked = Counter(one.benchmark for one in predictions if one.tuned)
    right = Counter(one.benchmark for one in predictions if one.tuned and one.tuned.verdict == "right")
    before = Counter(one.benchmark for one in predictions if one.base and one.base.verdict == "right")
    return [LiveScore(name, n, right[name], before[name] if earlier else None) for name, n in asked.items()]


def _cards(predictions: Sequence[Prediction]) -> list[LiveCard]:
    """Some of the answers with their pictures: the most telling changes first, then what is wrong still."""
    pictured = [one for one in predictions if one.image is not None and one.image.is_file()]
    chosen = choose(pictured or predictions, CARDS)
    album = Album([one.image for one in chosen])
    numbers = [album.number(one.image) for one in chosen]
    return [
        LiveCard(one, album.addresses[number] if number >= 0 else "", album.reason(number))
        for one, number in zip(chosen, numbers, strict=True)
    ]
