"""Quality against time: which runs no other beats, and which one to take.

The base model takes part as a candidate that costs no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from vlm_sft.common import formats
from vlm_sft.evaluate.compare import TOO_FEW, compare_rows
from vlm_sft.evaluate.statistics import FEWEST_CLUSTERS, UNCLEAR
from vlm_sft.forecast.pareto import cheapest_not_worse, pareto_front
from vlm_sft.report.predictions import SIDES, Prediction
from vlm_sft.report.quality_figure import Candidate, quality_drawing
from vlm_sft.report.records import Benchmark, RunReport, Score
from vlm_sft.report.svg import Drawing

SHARED_AT_LEAST = 30  # questions that two candidates must share to be compared

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Quality against time on one benchmark.

    Attributes:
        benchmark: its name.
        synthetic: drawn by a generator.
        candidates: by rising cost.
        recommended: the cheapest one that is not significantly worse than the best; None where nothing can be told.
        best: the one with the highest accuracy.
        reasons: sentences that explain the recommendation.
        drawing: the figure.
    """

    benchmark: str
    synthetic: bool
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    best: Candidate | None
    reasons: tuple[str, ...]
    drawing: Drawing | None


def choices(runs: Sequence[RunReport], names: Sequence[str]) -> list[Choice]:
    """Judge all runs on each benchmark.

    Args:
        runs: with their predictions.
        names: the benchmarks.

    Returns:
        One choice a benchmark on which at least one finished training was measured.
    """
    found = []
    for number, name in enumerate(names, start=1):
        answers: dict[str, tuple[tuple[Prediction, ...], str]] = {}
        candidates = _candidates(runs, name, answers)
        if not any(not one.is_base for one in candidates):
            continue
        front = set(pareto_front([(one.seconds, one.accuracy) for one in candidates]))
        ordered = sorted(
            (replace(one, on_front=place in front) for place, one in enumerate(candidates)),
            key=lambda one: (one.seconds, -one.accuracy),
        )
        recommended, best, reasons = _recommend(name, ordered, answers)
        synthetic = any(row.synthetic for run in runs for row in run.benchmarks if row.name == name)
        drawing = quality_drawing(name, ordered, recommended, f"quality{number}")
        if len({run.record.device for run in runs if run.record and run.record.device}) > 1:
            reasons.append("The runs were trained on different devices: their times compare devices too.")
        found.append(Choice(name, synthetic, tuple(ordered), recommended, best, tuple(reasons), drawing))
    return found


def _candidates(
    runs: Sequence[RunReport], benchmark: str, answers: dict[str, tuple[tuple[Prediction, ...], str]]
) -> list[Candidate]:
    """Every run with a result and a time, and every base model; `answers` receives what each of them answered."""
    found: dict[str, Candidate] = {}
    for run in runs:
        row = next((one for one in run.benchmarks if one.name == benchmark), None)
        if row is None or run.record is None or run.is_evaluation:
            continue
        predictions = tuple(one for one in run.predictions if one.benchmark == benchmark)
        base = f"base model {run.record.base_model}".strip()
        seconds = run.record.training_seconds
        for name, score, cost in ((base, row.base, 0.0), (run.name, row.tuned, seconds)):
            candidate = _candidate(name, name is base, score, cost, row)
            if candidate is not None and name not in found:
                found[name] = candidate
                answers[name] = (predictions, SIDES[0] if name is base else SIDES[1])
    return list(found.values())


def _candidate(
    name: str, is_base: bool, score: Score | None, seconds: float | None, row: Benchmark
) -> Candidate | None:
    if score is None or score.accuracy is None or not 0 <= score.accuracy <= 1:
        return None
    if seconds is None or not 0 <= seconds < 1e9:
        return None
    return Candidate(name, is_base, seconds, score.accuracy, score.interval, row.n)


def _recommend(
    benchmark: str, ordered: Sequence[Candidate], answers: dict[str, tuple[tuple[Prediction, ...], str]]
) -> tuple[Candidate | None, Candidate, list[str]]:
    """The cheapest candidate of the front that the paired test does not find worse than the best, and why.

    None where the questions cannot tell whether a cheaper one is much worse.
    """
    best = max(ordered, key=lambda one: (one.accuracy, -one.seconds))
    after = _rows(*answers[best.name])
    results: dict[str, dict[str, Any] | None] = {}

    def worse(candidate: Candidate) -> bool:
        results[candidate.name] = result = _compared(_rows(*answers[candidate.name]), after)
        return result is None or result["verdict"] == "better"

    chosen = cheapest_not_worse((one for one in ordered if one.on_front), best, worse)
    result = results.pop(chosen.name, None)
    named = {one.name: one for one in ordered}
    skipped = [
        _skipped(named[name], other)
        for name, other in sorted(results.items(), key=lambda one: not named[one[0]].is_base)
    ]
    if result is None:
        recommended, reasons = _best(best, after, None not in results.values())
        return recommended, best, reasons + (skipped[:3] if recommended else [])
    if result["interval"][1] > UNCLEAR:
        return None, best, [_unclear(chosen, best, result), *skipped]
    return chosen, best, [*_good_enough(chosen, best, result), *skipped]


def _best(best: Candidate, rows: Sequence[tuple[Any, ...]], compared: bool) -> tuple[Candidate | None, list[str]]:
    """The best candidate, or None on too few images, where nothing cheaper is as good; and why.

    `compared`: every cheaper one was; else the text claims nothing of them.
    """
    clusters = len({row[2] or row[0] for row in rows})
    if 0 < clusters < FEWEST_CLUSTERS:
        reason = f"{len(rows):,} questions on {clusters:,} independent images are too few to judge."
        return None, [f"{best.name} answers best ({formats.percent(best.accuracy)}), but {reason}"]
    right = formats.percent(best.accuracy)
    if best.is_base:
        return best, [f"Fine-tuning did not help: no run answers better than the {best.name} ({right})."]
    judged = "every run that costs less is significantly worse" if compared else "no cheaper one is known to be as good"
    return best, [f"{best.name} answers best ({right}), and {judged}."]


def _good_enough(candidate: Candidate, best: Candidate, result: dict[str, Any]) -> list[str]:
    """Why a cheaper candidate is taken instead of the best one."""
    highest, sure = formats.percent(best.accuracy), formats.p_value(result["p_value"])
    if candidate.is_base:
        reason = (
            f"Fine-tuning is not shown to help: {best.name} answers best ({highest}), but the {candidate.name} "
            f"({_difference(result)}, {sure}) is not significantly worse on the same {result['n']:,} questions."
        )
    else:
        reason = (
            f"{best.name} answers best ({highest}), but {candidate.name} ({_difference(result)}, {sure}) is not "
            f"significantly worse on the same {result['n']:,} questions and trains in "
            f"{formats.duration(candidate.seconds)} instead of {formats.duration(best.seconds)}."
        )
    reasons = [reason]
    smallest = result["smallest_detectable_difference"]
    if smallest:
        reasons.append(
            f"With {result['n']:,} questions only differences above about {100 * smallest:.1f} points can be detected."
        )
    return reasons


def _named(candidate: Candidate) -> str:
    """A candidate within a sentence."""
    return f"the {candidate.name}" if candidate.is_base else candidate.name


def _skipped(candidate: Candidate, result: dict[str, Any] | None) -> str:
    """Why a cheaper candidate is not taken."""
    if result is None:
        return f"{candidate.name} did not answer the same questions and could not be compared with it."
    behind = f"{_difference(result)}, {formats.p_value(result['p_value'])}"
    if candidate.is_base:
        return f"Fine-tuning helped: the {candidate.name} is significantly worse ({behind})."
    return f"{candidate.name} trained in {formats.duration(candidate.seconds)} and is significantly worse ({behind})."


def _difference(result: dict[str, Any]) -> str:
    """How many points a candidate is behind the best one."""
    return f"{formats.typeset(formats.points(-result['difference']))} points"


def _unclear(candidate: Candidate, best: Candidate, result: dict[str, Any]) -> str:
    """Why neither a cheaper candidate nor the best one can be recommended."""
    most = formats.points(result["interval"][1])[1:]
    judged = "are too few to judge" if result["verdict"] == TOO_FEW else "cannot tell them apart"
    return (
        f"{best.name} answers best ({formats.percent(best.accuracy)}); {_named(candidate)} ({_difference(result)}) is "
        f"cheaper and may be worse by up to {most}: {result['n']:,} questions on {result['clusters']:,} "
        f"independent images {judged}. About {result['questions_needed']:,} questions on "
        f"{result['clusters_needed']:,} images would."
    )


def _rows(predictions: tuple[Prediction, ...], side: str) -> tuple[tuple[str, float, str, str, tuple[str, ...]], ...]:
    """What a comparison needs of one side's predictions."""
    found = []
    for one in predictions:
        answer = one.base if side == SIDES[0] else one.tuned
        if answer is not None:
            found.append((one.id, answer.score, one.cluster, one.question, one.answers))
    return tuple(found)


@lru_cache(maxsize=128)
def _compared(before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[str, Any] | None:
    """The paired comparison on the questions that both answered; None when they are too few."""
    first, second = ({row[0]: row for row in rows} for rows in (before, after))
    shared = [key for key in first if key in second and first[key][3:] == second[key][3:]]
    if len(shared) < SHARED_AT_LEAST and not (shared and len(shared) == len(first) == len(second)):
        return None
    keys = ("id", "score", "cluster", "question", "answers")
    return compare_rows(
        [dict(zip(keys, first[key], strict=True)) for key in shared],
        [dict(zip(keys, second[key], strict=True)) for key in shared],
    )
