"""The rules by which an answer is right, and the benchmarks using them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import EvaluationError, nearest, quoted
from vlm_sft.evaluate.answer_rules import (
    chartqapro,
    choice_or_word,
    edit_distance,
    multiple_choice,
    ocrbench,
    squad_exact,
    squad_f1,
)
from vlm_sft.evaluate.grading import chartmuseum_grading, charxiv_grading
from vlm_sft.evaluate.mmmu_rule import mmmu
from vlm_sft.evaluate.vqa_rule import VQA_ANSWERS, vqa_accuracy

Metric = Callable[..., float]  # (prediction, answers), and by name what `Benchmark.needs` says

RELATIVE_TOLERANCE = 0.05

_YEAR = re.compile(r"(?:1[89]|20)[0-9]{2}|2100")


def as_number(text: str) -> float | None:
    """Read a number as ChartQA's rule does: a trailing `%` divides by 100, everything else is what `float` accepts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_correctness(prediction: str, gold: str) -> bool:
    """Decide ChartQA's relaxed correctness: numbers within 5 %, everything else equal but for case.

    Source: Masry et al. 2022 (ChartQA, arXiv 2203.10244, section 5.1), after Methani et al. 2020 (PlotQA); in the form
    of `relaxed_correctness` of pix2struct (`pix2struct/metrics.py`), which lmms-eval and VLMEvalKit share. As in
    VLMEvalKit, the prediction is stripped; of several labels any will do.

    Rule, on `prediction.strip()` and the label as it stands:
      1. `62%` is 0.62; otherwise a number is what `float` accepts (`1e3`, `1_000`; not `1,000` or `$5`).
      2. When both are numbers and the gold is not 0: |prediction - gold| / |gold| <= 0.05 in float64, with no epsilon.
         NaN and infinity are numbers that match nothing.
      3. Otherwise the two texts must be equal, ignoring case. A gold of `0` therefore needs `0` exactly.

    Args:
        prediction: the model's answer.
        gold: the label; a list in ChartQA is one string such as `[2013, 2014]`.

    Returns:
        True when the prediction counts as right.
    """
    prediction = prediction.strip()
    predicted_number, gold_number = as_number(prediction), as_number(gold)
    if predicted_number is not None and gold_number:
        return abs(predicted_number - gold_number) / abs(gold_number) <= RELATIVE_TOLERANCE
    return prediction.lower() == gold.lower()


def relaxed_correctness_strict_years(prediction: str, gold: str) -> bool:
    """Decide relaxed correctness, except that a year must match exactly.

    Source: a secondary measure of ours. Five percent of 2015 is a century, so the relaxed rule takes 1990 for 2015.

    Rule: a gold of four digits from 1800 to 2100 is taken for a year, and `prediction.strip()` must be the same four
    characters; every other gold follows `relaxed_correctness`. A value that happens to look like a year is judged
    strictly too, so this measure is a lower bound.

    Args:
        prediction: the model's answer.
        gold: the label.

    Returns:
        True when the prediction counts as right.
    """
    if _YEAR.fullmatch(gold.strip()):
        return prediction.strip() == gold.strip()
    return relaxed_correctness(prediction, gold)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Score 1 when the prediction equals one of the answers, ignoring case and surrounding white space.

    Source: the plain accuracy of OCR-VQA, as in VLMEvalKit (`vlmeval/dataset/utils/vqa_eval.py`, "accuracy"); easy-VQA
    and ChartQA's secondary measure use it too.

    Args:
        prediction: the model's answer.
        answers: every accepted answer.

    Returns:
        1.0 or 0.0.
    """
    prediction = prediction.strip().lower()
    return float(any(prediction == answer.strip().lower() for answer in answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Score the average normalised Levenshtein similarity (ANLS) of one question.

    Source: Biten et al. 2019 (Scene Text VQA, arXiv 1905.13648, section 5); DocVQA (Mathew et al. 2021) and
    InfographicVQA use it in the form of the Robust Reading Competition's script (`evaluate_method` of InfographicVQA,
    https://rrc.cvc.uab.es), which lmms-eval and VLMEvalKit share.

    Rule: case is ignored, white space stripped and runs of it made one space; similarity is
    1 - edit distance / length of the longer text. The length is that of the texts as they stand, in upper case: outer
    and double spaces count, and `ß` counts twice. The best over the answers counts, and 0 when it is below the
    threshold. A similarity equal to the threshold counts, as in the script; the paper's formula would drop it.

    Args:
        prediction: the model's answer.
        answers: every accepted answer, at least one.
        threshold: similarity below which an answer is taken for another text rather than a misread one.

    Returns:
        0, or a number from `threshold` to 1.

    Raises:
        EvaluationError: there is no answer.
    """
    if not answers:
        raise EvaluationError("ANLS needs at least one answer", "remove questions without an answer")
    given = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        expected = " ".join(answer.lower().split())
        length = max(len(prediction.upper()), len(answer.upper()))
        if length == 0:
            best = 1.0
        # The distance is at least the difference of the lengths: a rambling prediction need not be aligned at all.
        elif 1 - abs(len(given) - len(expected)) / length >= max(threshold, best):
            best = max(best, 1 - edit_distance(given, expected) / length)
    return best if best >= threshold else 0.0


# The best over the answers, as pix2struct's `aggregate_metrics` has it; ChartQA itself has one label.
def _relaxed(prediction: str, answers: Sequence[str]) -> float:
    return float(any(relaxed_correctness(prediction, answer) for answer in answers))


def _relaxed_strict_years(prediction: str, answers: Sequence[str]) -> float:
    return float(any(relaxed_correctness_strict_years(prediction, answer) for answer in answers))


@dataclass(frozen=True, slots=True)
class Together:
    """How items are scored that cannot be scored one by one.

    Attributes:
        scores: (rows of predictions, file that keeps what was found out, or None) -> one score a row; NaN where a judge
            gave none.
        corpus: scores of all rows together by name: (rows) -> `n`, `accuracy`, `interval`.
    """

    scores: Callable[[Sequence[Mapping[str, Any]], Path | None], list[float]]
    corpus: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How the answers to one set of questions are scored.

    Attributes:
        name: what `--benchmark` takes; also the folder of its predictions.
        metric_name: what `metric_for_best_model` takes and tables show.
        metric: (prediction, answers) -> score from 0 to 1; `answers` holds at least one.
        description: one sentence for `--help` and reports.
        secondary: further scores by name, never used to choose a model.
        max_new_tokens: default limit of a generated answer, in tokens.
        answers_needed: how many answers each question must have; None for any number from one.
        needs: what else of a question the metric takes, by the name of its key; a question may lack it.
        source: SHA-256 of the source of the user's own metric, or of who judges; "" for a rule of ours.
        together: scores all items at once, in place of `metric`.
        grading: what a judge is asked about a row; the benchmark needs one.
    """

    name: str
    metric_name: str
    metric: Metric
    description: str
    secondary: Mapping[str, Metric] = field(default_factory=dict)
    max_new_tokens: int = 32
    answers_needed: int | None = None
    needs: tuple[str, ...] = ()
    source: str = ""
    together: Together | None = None
    grading: Callable[[Mapping[str, Any]], str] | None = None

    @property
    def own_function(self) -> bool:
        """Whether a function of the user's scores each item."""
        return bool(self.source) and self.together is None

    def score(self, prediction: str, answers: Sequence[str], question: Mapping[str, Any]) -> float:
        """Score one answer, from 0 to 1.

        Args:
            prediction: the model's answer.
            answers: the accepted answers.
            question: what is known of the question, by key.
        """
        if self.own_function:
            return scored(self.metric, prediction, answers, question)
        return self.metric(prediction, answers, **{key: question[key] for key in self.needs if question.get(key)})


def scored(metric: Metric, prediction: str, answers: Sequence[str], row: Mapping[str, Any]) -> float:
    """Score one answer; a metric of the user's gets all that is known of the question besides."""
    return metric(prediction, answers, row) if getattr(metric, "takes_row", False) else metric(prediction, answers)


_CHART_SECONDARY: Mapping[str, Metric] = {"strict_year_accuracy": _relaxed_strict_years, "exact_match": exact_match}

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "chartqa",
            "chartqa_relaxed_accuracy",
            _relaxed,
            "ChartQA: relaxed accuracy (numbers within 5 %)",
            _CHART_SECONDARY,
        ),
        Benchmark(
            "textvqa",
            "textvqa_accuracy",
            vqa_accuracy,
            "TextVQA: VQA accuracy over exactly ten human answers",
            answers_needed=VQA_ANSWERS,
        ),
        Benchmark(
            "docvqa",
            "docvqa_anls",
            anls,
            "DocVQA: ANLS, the best over the answers",
            {"exact_match": exact_match},
            max_new_tokens=64,
        ),
        Benchmark(
            "infographicvqa",
            "infographicvqa_anls",
            anls,
            "InfographicVQA: ANLS, the best over the answers",
            {"exact_match": exact_match},
            max_new_tokens=64,
        ),
        Benchmark("ocrvqa", "ocrvqa_accuracy", exact_match, "OCR-VQA: exact match ignoring case"),
        Benchmark(
            "chartqapro",
            "chartqapro_relaxed_accuracy",
            chartqapro,
            "ChartQAPro: numbers within 5 %, years exactly, texts by ANLS, lists part by part",
            max_new_tokens=64,
            needs=("year", "question_type"),
        ),
        Benchmark(
            "ai2d",
            "ai2d_accuracy",
            multiple_choice,
            "AI2D: the right option, by its letter or its text",
            needs=("options",),
        ),
        Benchmark(
            "charxiv",
            "charxiv_judged",
            exact_match,
            "CharXiv: reasoning questions, graded by --judge",
            max_new_tokens=128,
            needs=("question_type",),
            grading=charxiv_grading,
        ),
        Benchmark(
            "chartmuseum",
            "chartmuseum_judged",
            exact_match,
            "ChartMuseum: graded by --judge",
            max_new_tokens=128,
            grading=chartmuseum_grading,
        ),
        Benchmark(
            "realworldqa",
            "realworldqa_accuracy",
            choice_or_word,
            "RealWorldQA: the right option, by its letter or its text, or the right word",
            needs=("options",),
        ),
        Benchmark(
            "ocrbench",
            "ocrbench_accuracy",
            ocrbench,
            "OCRBench: the answer contains an expected text",
            max_new_tokens=128,
            needs=("dataset", "question_type"),
        ),
        Benchmark(
            "mmmu",
            "mmmu_accuracy",
            mmmu,
            "MMMU: the option that is named, or an open answer that holds the right text or number",
            max_new_tokens=128,
            needs=("options", "question_type"),
        ),
        Benchmark("easy_vqa", "easy_vqa_accuracy", exact_match, "easy-VQA: exact match ignoring case"),
        Benchmark(
            "demo_charts",
            "demo_charts_relaxed_accuracy",
            _relaxed,
            "synthetic charts of the demo: ChartQA's relaxed accuracy",
            _CHART_SECONDARY,
        ),
        Benchmark(
            "demo_text",
            "demo_text_accuracy",
            vqa_accuracy,
            "synthetic signs of the demo: VQA accuracy over exactly ten answers",
            answers_needed=VQA_ANSWERS,
        ),
        Benchmark(
            "multiple_choice",
            "multiple_choice",
            multiple_choice,
            "your own multiple choice: the right option, by its letter or its text",
            needs=("options",),
        ),
        Benchmark("squad", "squad_f1", squad_f1, "your own open answers: SQuAD's F1", {"squad_exact": squad_exact}),
        Benchmark(
            "exact_match", "exact_match", exact_match, "your own data: equal to one of the answers, ignoring case"
        ),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """Look a benchmark up by its name.

    Raises:
        EvaluationError: no benchmark has that name; the message lists them and guesses the one meant.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    guess = nearest(name, BENCHMARKS, "did you mean {!r}? ")
    raise EvaluationError(f"there is no benchmark {quoted(name)}", f"{guess}known ones: {', '.join(BENCHMARKS)}")
