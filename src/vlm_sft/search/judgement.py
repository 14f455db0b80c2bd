"""Which setting of a sweep to take: paired differences, the luck of the winner, and the cheapest that is as good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from vlm_sft.common import artifacts
from vlm_sft.common.formats import duration, number, p_value, percent, percent_interval, points
from vlm_sft.evaluate.compare import NO_DIFFERENCE, TOO_FEW, Rows, compare_loaded, load_scored
from vlm_sft.evaluate.selection import score_of_chosen
from vlm_sft.evaluate.statistics import LEVEL, UNCLEAR, cluster_of, holm, mean_interval
from vlm_sft.forecast.pareto import cheapest_not_worse
from vlm_sft.search.trials import kept_step

SAVING = 0.95  # a setting whose forecast time is no smaller share of the best one's is not called cheaper
WORSE, BEST = "worse", "best"


@dataclass(frozen=True)
class Measured:
    """A setting whose trainings have all come to their end.

    Attributes:
        label: the setting.
        folders: of its trainings, one a seed, the same seeds in the same order for all settings.
        values: their metric.
        seconds: mean time of a training.
        cost: forecast time of a training, which no busy machine distorts.
    """

    label: str
    folders: tuple[Path, ...]
    values: tuple[float, ...]
    seconds: float
    cost: float


@dataclass(frozen=True)
class Standing:
    """One setting beside the best.

    Attributes:
        label, seconds, cost: as of `Measured`.
        seeds: trainings.
        value: mean of the metric over them.
        interval: 95 %, over questions, or over seeds of a loss; None where it cannot be told.
        spread: standard deviation over the seeds; None with one.
        difference, difference_interval: to the best, in the metric's units, paired; None of the best itself.
        p_value, p_holm: of no difference, and corrected for the number of comparisons.
        verdict: "best", "worse", or as of a comparison of runs.
    """

    label: str
    seconds: float
    cost: float
    seeds: int
    value: float
    interval: tuple[float, float] | None
    spread: float | None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str = BEST


@dataclass(frozen=True)
class Judgement:
    """What a sweep found.

    Attributes:
        standings: of all settings, the best first.
        recommended: label of the setting to take.
        expected: `value`, `low`, `high` of the best setting on other questions, and `method`; None where unknown.
        questions: on which the settings were compared; 0 of a loss.
        reasons: sentences for the user.
    """

    standings: tuple[Standing, ...]
    recommended: str
    expected: dict[str, Any] | None
    questions: int
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """What the trainings of one setting answered.

    Attributes:
        rows: the mean over the seeds as the score of a question, at the step that each training kept.
        steps: of each training (S, N): scores after each evaluation that could have been kept.
    """

    rows: Rows
    steps: list[np.ndarray]


def judge(measured: Sequence[Measured], metric: str, greater: bool) -> Judgement:
    """Compare settings that were trained with the same seeds, and choose one.

    Args:
        measured: at least one setting.
        metric: what was measured.
        greater: whether more of it is better.

    Raises:
        EvaluationError: the settings answered different questions.
    """
    answers = dict(zip(measured, _answers(measured, metric), strict=False))

    def rank(one: Measured) -> tuple[float, float]:
        value = _mean_score(answers[one]) if answers else fmean(one.values)
        return (-value if greater else value), one.cost

    ordered = sorted(measured, key=rank)
    found = [answers[one] for one in ordered] if answers else []
    standings = _by_questions(ordered, found) if found else _by_seeds(ordered)
    expected = _expected(ordered, found, greater)
    chosen = _cheapest_as_good(standings, bool(found))
    questions = len(found[0].rows) if found else 0
    reasons = _reasons(standings, chosen, expected, questions)
    return Judgement(tuple(standings), chosen.label, expected, questions, tuple(reasons))


def _answers(measured: Sequence[Measured], metric: str) -> list[_Answers]:
    """The validation answers of each setting; [] where the metric is a loss, which has none."""
    found = [[_answered(folder, metric) for folder in one.folders] for one in measured]
    evaluations = [set(rows) for runs in found for run in runs for rows in run.values()]
    tasks = sorted(set.intersection(*evaluations)) if evaluations else []
    return [_mean_answers(one, runs, tasks) for one, runs in zip(measured, found, strict=True)] if tasks else []


def _mean_score(answers: _Answers) -> float:
    return fmean(row["score"] for row in answers.rows.values())


def _answered(folder: Path, metric: str) -> dict[int, dict[str, Rows]]:
    """By step and by benchmark of this metric: the questions that a training answered on validation."""
    steps: dict[int, dict[str, Rows]] = {}
    for path in sorted(folder.glob(f"{artifacts.VALIDATION_FOLDER}/step-*/*/{artifacts.RESULTS}")):
        if artifacts.read_json(path).get("metric") == metric:
            step, task = int(path.parent.parent.name.removeprefix("step-")), path.parent.name
            steps.setdefault(step, {})[task] = load_scored(task, path.with_name(artifacts.PREDICTIONS))
    return steps


def _mean_answers(one: Measured, runs: Sequence[dict[int, dict[str, Rows]]], tasks: Sequence[str]) -> _Answers:
    """Put the trainings of a setting together."""
    kept_rows, by_step = [], []
    for folder, run in zip(one.folders, runs, strict=True):
        flat = {
            step: {f"{task}/{key}": row for task in tasks for key, row in found[task].items()}
            for step, found in run.items()
        }
        kept = kept_step(folder)
        last = max(flat)
        kept_rows.append(flat[last if kept is None else kept])
        ids = list(kept_rows[0])
        steps = [last] if kept is None else sorted(flat)
        by_step.append(np.array([[flat[step][key]["score"] for key in ids] for step in steps], dtype=float))
    rows = {
        key: row | {"id": key, "score": fmean(found[key]["score"] for found in kept_rows)}
        for key, row in kept_rows[0].items()
    }
    return _Answers(rows, by_step)


def _standing(one: Measured, interval: tuple[float, float] | None) -> Standing:
    spread = stdev(one.values) if len(one.values) > 1 else None
    return Standing(one.label, one.seconds, one.cost, len(one.values), fmean(one.values), interval, spread)


def _by_questions(ordered: Sequence[Measured], answers: Sequence[_Answers]) -> list[Standing]:
    """Compare by the questions: paired, clustered by image, with the mean over the seeds as a question's score.

    A difference that the test finds, but that has the other sign for one of the seeds, is not called one.
    """
    clusters = [cluster_of(row) for row in answers[0].rows.values()]
    scored = {one.label: {"validation": found.rows} for one, found in zip(ordered, answers, strict=True)}
    entries: dict[str, Any] = {}
    if len(ordered) > 1:
        compared = compare_loaded(scored, ordered[0].label)["comparisons"]
        entries = {entry["run"]: entry for entry in compared}
    found = []
    for one, answer in zip(ordered, answers, strict=True):
        scores = [row["score"] for row in answer.rows.values()]
        standing = _standing(one, mean_interval(scores, clusters))
        fields: dict[str, Any] = {"value": fmean(scores)}
        if entry := entries.get(one.label):
            same = {value > best for value, best in zip(one.values, ordered[0].values, strict=True)}
            verdict = entry["verdict"] if len(same) == 1 or entry["verdict"] == TOO_FEW else NO_DIFFERENCE
            fields |= {
                "difference": entry["difference"],
                "difference_interval": tuple(entry["interval"]),
                "p_value": entry["p_value"],
                "p_holm": entry["p_holm"],
                "verdict": verdict,
            }
        found.append(replace(standing, **fields))
    return found


def _by_seeds(ordered: Sequence[Measured]) -> list[Standing]:
    """Compare by the seeds, with Student's paired test: all that a loss offers."""
    tests = [paired_by_seed(ordered[0].values, one.values) for one in ordered[1:]]
    adjusted = holm([p for *_, p in tests])
    found = [_standing(ordered[0], _over_seeds(ordered[0].values))]
    for one, (difference, low, high, p), corrected in zip(ordered[1:], tests, adjusted, strict=True):
        verdict = TOO_FEW if len(one.values) < 2 else WORSE if corrected < LEVEL else NO_DIFFERENCE
        standing = _standing(one, _over_seeds(one.values))
        interval = (low, high) if math.isfinite(low) else None
        more: dict[str, Any] = {
            "difference": difference,
            "difference_interval": interval,
            "p_value": p,
            "p_holm": corrected,
        }
        found.append(replace(standing, **more, verdict=verdict))
    return found


def paired_by_seed(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """Student's paired test over seeds (Student 1908).

    Args:
        first, second: the metric of two settings, one a seed, the same seeds.

    Returns:
        Mean difference (second minus first), the ends of its 95 % interval, and the two-sided p-value; with one seed
        the interval is infinite and the p-value 1.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean, free = fmean(differences), len(differences) - 1
    if free < 1:
        return mean, -math.inf, math.inf, 1.0
    error = stdev(differences) / math.sqrt(len(differences))
    reach = float(stdtrit(free, 1 - LEVEL / 2)) * error
    p = (2 * float(stdtr(free, -abs(mean) / error))) if error else float(not mean)
    return mean, mean - reach, mean + reach, p


def _over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    mean, low, high, _ = paired_by_seed([0.0] * len(values), values)
    return (low, high) if math.isfinite(low) and mean == mean else None


def _expected(ordered: Sequence[Measured], answers: Sequence[_Answers], greater: bool) -> dict[str, Any] | None:
    """What the best setting is worth without the luck of having been chosen."""
    if answers:
        clusters = [cluster_of(row) for row in answers[0].rows.values()]
        found = score_of_chosen([answer.steps for answer in answers], clusters)
        if found is None:
            return None
        return {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "method": "bootstrap of the choice over images",
        }
    if len(ordered[0].values) < 2:
        return None
    held_out = [_held_out(ordered, seed, greater) for seed in range(len(ordered[0].values))]
    return {"value": fmean(held_out), "low": None, "high": None, "method": "chosen on the other seeds"}


def _held_out(ordered: Sequence[Measured], seed: int, greater: bool) -> float:
    """What the setting that is best on the other seeds has on one."""

    def others(one: Measured) -> float:
        return fmean(one.values[:seed] + one.values[seed + 1 :])

    return (max if greater else min)(ordered, key=others).values[seed]


def _cheapest_as_good(standings: Sequence[Standing], scored: bool) -> Standing:
    """The cheapest setting that is not significantly worse than the best, and cannot be much worse."""
    best = standings[0]

    def worse(one: Standing) -> bool:
        if one.verdict != NO_DIFFERENCE:
            return True
        return scored and (one.difference_interval is None or one.difference_interval[0] < -UNCLEAR)

    cheaper = [one for one in standings if one.cost < SAVING * best.cost]
    chosen = cheapest_not_worse(sorted(cheaper, key=lambda one: one.cost), best, worse)
    alike = [one for one in cheaper if one.cost * SAVING <= chosen.cost and not worse(one)]
    return chosen if chosen is best else alike[0]  # the best of those that cost about the same


def _reasons(
    standings: Sequence[Standing], chosen: Standing, expected: dict[str, Any] | None, questions: int
) -> list[str]:
    """The recommendation in words."""
    best, others = standings[0], standings[1:]
    show = percent if questions else number
    where = f" on {questions:,} validation questions" if questions else ""
    over = f", mean over {best.seeds} seeds" if best.seeds > 1 else ", one seed"
    lines = [f"{best.label} is best: {show(best.value)}{where}{over}."]
    if not others:
        return [*lines, "There is no other setting to compare it with."]
    if expected is not None:
        ends = f" {percent_interval((expected['low'], expected['high']))}" if questions else ""
        lines.append(
            f"The best of {len(standings)} is partly lucky: without the luck of being chosen it is worth about "
            f"{show(expected['value'])}{ends} ({expected['method']})."
        )
    told = [one for one in others if one.verdict == WORSE]
    open_ = [one for one in others if one.verdict != WORSE]
    if not told:
        lines.append("There is no significant difference between the best and any other setting.")
    elif open_:
        named = "; ".join(f"{one.label} ({_behind(one, questions)})" for one in open_)
        lines.append(f"Not significantly worse: {named}.")
    if any(one.verdict == TOO_FEW for one in others):
        why = "there are too few questions on different images" if questions else "a loss needs two seeds at least"
        lines.append(f"Some comparisons cannot be judged: {why}.")
    return [*lines, _recommended(standings, chosen, questions)]


def _recommended(standings: Sequence[Standing], chosen: Standing, questions: int) -> str:
    """What is recommended, and why not something cheaper."""
    best, cheaper = standings[0], [one for one in standings if one.cost < SAVING * standings[0].cost]
    if chosen is not best:
        return (
            f"Recommended is {chosen.label}: the cheapest that is not significantly worse "
            f"({_behind(chosen, questions)}), in {duration(chosen.cost)} instead of {duration(best.cost)} by the "
            "forecast."
        )
    if not cheaper:
        return f"Recommended is {best.label}: no other setting is cheaper by more than 5 %."
    if all(one.verdict == WORSE for one in cheaper):
        return f"Recommended is {best.label}: every cheaper setting is significantly worse."
    return (
        f"Recommended is {best.label}: cheaper settings are not shown to be as good; more validation questions "
        "(--eval_samples) or --seeds can tell."
    )


def _behind(one: Standing, questions: int) -> str:
    assert one.difference is not None
    difference = f"{points(one.difference)} points" if questions else f"{one.difference:+.4g}"
    return f"{difference}, {p_value(one.p_holm)}"
