"""Scores from Python: a model's answers to benchmarks, and any program's answers by a benchmark's rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_sft.api.keywords import columns_text
from vlm_sft.api.models import model_of
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument
from vlm_sft.api.training import free_folder
from vlm_sft.api.views import Comparison, Scores
from vlm_sft.common import artifacts
from vlm_sft.common.errors import EvaluationError, RunError, nearest
from vlm_sft.common.idle import given_names, refuse_idle
from vlm_sft.common.options import checked_options
from vlm_sft.data.engine_options import CacheOptions
from vlm_sft.evaluate.compare import compare_runs
from vlm_sft.evaluate.judge import parse_judge
from vlm_sft.evaluate.metrics import Metric, get_benchmark
from vlm_sft.evaluate.options import EvalOptions
from vlm_sft.evaluate.own_metrics import judged_by, metric_text, named, rule_of, with_secondary
from vlm_sft.evaluate.run import IDLE, evaluate
from vlm_sft.evaluate.scoring import score_file, summarise
from vlm_sft.model.saved_adapter import base_of_adapter

Metrics = Sequence[Metric] | Mapping[str, Metric]
Rule = str | Callable[..., float]
_CACHES = tuple(CacheOptions.__dataclass_fields__)


def evaluate_model(
    base_model: str | None = None,
    *,
    adapter: Any = None,
    benchmark: Any,
    output_dir: str | Path | None = None,
    metrics: Metrics = (),
    metric: Rule | None = None,
    **keywords: Any,
) -> Scores:
    """Answer benchmarks with a base model or an adapter, and score the answers.

    Args:
        base_model: "pocket", a folder or a Hub id; None for the one that the adapter names.
        adapter: a `Run`, or the folder of an adapter; None evaluates the base.
        benchmark: names and paths as of `vlm-sft eval --benchmark`, or rows as of `finetune`.
        output_dir: folder of the predictions; the next free outputs/eval-N by default. With a folder that holds
            answers of the same model, only the rest is asked.
        metrics: further scores, as of `finetune`.
        metric: the rule of own data, as of `finetune`.
        **keywords: the options of `vlm-sft eval`, with its names: `limit`, `split`, `max_new_tokens`, `backend`, ….

    Returns:
        A table of the scores.

    Raises:
        VlmSftError: a mistake in the data, model, folder, prompt or launch.

    Examples:
        >>> import vlm_sft
        >>> scores = vlm_sft.evaluate_model("pocket", benchmark="demo_charts", limit=4)
        evaluating pocket ...
        >>> scores["demo_charts"]["n"]
        4
    """
    unknown = [name for name in keywords if name not in {*EvalOptions.__dataclass_fields__, *_CACHES}]
    if unknown:
        meant = nearest(unknown[0], [*EvalOptions.__dataclass_fields__, *_CACHES])
        raise RunError(f"unknown option {unknown[0]}{meant}", "`vlm-sft eval --help` describes every option")
    about = SimpleNamespace(adapter=adapter, backend=keywords.get("backend", EvalOptions.backend))
    refuse_idle(about, IDLE, given_names(keywords))
    if base_model is None and adapter is None:
        raise RunError("nothing is said about which model answers", "pass base_model, adapter, or both")
    caches = checked_options(CacheOptions, {name: keywords.pop(name) for name in _CACHES if name in keywords})
    folder = Path(output_dir) if output_dir is not None else free_folder("eval")
    with restored():
        whole, place = model_of(adapter) if adapter is not None else (None, None)
        base = whole or (base_of_adapter(place, base_model) if place is not None else base_model)
        asked = dataset_argument(benchmark, folder / artifacts.ROWS_FOLDER)
        rule = None if metric is None else metric_text(metric)
        keywords |= columns_text(keywords)
        given = {"base_model": str(base), "benchmark": asked, "output_dir": folder, "caches": caches}
        options = checked_options(EvalOptions, keywords, **given, adapter=place, metric=rule)
        return Scores(evaluate(options, named(metrics)))


def score(
    benchmark: str | None,
    predictions: Sequence[str] | str | Path,
    answers: Sequence[str | Sequence[str]] | None = None,
    metrics: Metrics = (),
    metric: Rule | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
) -> Scores:
    """Score any predictions by a benchmark's rule, or by a rule alone.

    Args:
        benchmark: "chartqa", "textvqa", "docvqa", …; None where `metric` says the rule.
        predictions: one text a question; or a JSONL file of `id`, `prediction`, `answers`.
        answers: the accepted answer of each question, or a list of them (TextVQA: ten); not with a file.
        metrics: further scores, as of `finetune`; not with a file.
        metric: the rule alone: "anls", "relaxed_accuracy", "squad_f1", …, your own "module:function", or the function.
        judge, judge_model: who grades what a judge has to, as of `vlm-sft score`; with a file, which has the questions.

    Returns:
        A table of the scores; questions count as independent in the interval.

    Raises:
        EvaluationError: the benchmark is unknown, the lists differ in length, or an item cannot be scored.

    Examples:
        >>> import vlm_sft
        >>> vlm_sft.score("chartqa", ["12", "blue"], ["12.3", "red"])["chartqa"]["accuracy"]
        0.5
    """
    if (benchmark is None) == (metric is None):
        raise EvaluationError("it takes either a benchmark or a metric", "pass one of them; the benchmark may be None")
    rules = get_benchmark(str(benchmark)) if metric is None else rule_of(metric_text(metric))
    (rules,) = judged_by(parse_judge(judge, judge_model), {rules.name: rules}).values()
    if isinstance(predictions, str | Path):
        if answers is not None or metrics:
            raise EvaluationError(f"{predictions} is a file, which holds its answers", "pass lists, or the file alone")
        return Scores({rules.name: score_file(rules, predictions)})
    if answers is None or len(answers) != len(predictions):
        count = "no" if answers is None else f"{len(answers):,}"
        raise EvaluationError(f"{len(predictions):,} predictions and {count} answers", "pass one answer a prediction")
    rows = [
        {"id": number, "prediction": text, "answers": [accepted] if isinstance(accepted, str) else list(accepted)}
        for number, (text, accepted) in enumerate(zip(predictions, answers, strict=True))
    ]
    return Scores({rules.name: summarise(with_secondary(rules, named(metrics)), rows)})


def compare(runs: Sequence[Any], baseline: Any = None, metric: Rule | None = None) -> Comparison:
    """Compare runs on the questions that all of them answered, with tests.

    Args:
        runs: `Run` objects, run folders, or folders of predictions; one training run alone is compared with its base.
        baseline: the run to compare with; the first by default.
        metric: scores the answers to own data anew, as of `finetune`; None takes the recorded scores.

    Raises:
        EvaluationError: there is nothing to compare, or the questions differ.
    """
    rule = None if metric is None else metric_text(metric)
    return Comparison(compare_runs([Path(run) for run in runs], None if baseline is None else Path(baseline), rule))
