"""Compares runs on the same items, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.data.sources.spec import is_own
from vlm_sft.evaluate import statistics
from vlm_sft.evaluate.metrics import BENCHMARKS, Benchmark
from vlm_sft.evaluate.own_metrics import judged_by, parse_metrics
from vlm_sft.evaluate.scoring import score_item, score_rows

TOO_FEW = "too few to judge"
NO_DIFFERENCE = "no significant difference"
_EXAMPLES = 3  # of what differs, in an error

Row = dict[str, Any]
Rows = dict[Any, Row]


def locate_predictions(run: str | Path) -> dict[str, Path]:
    """Find the predictions of a run.

    Args:
        run: a training run (its `evaluation/tuned` is taken), or a folder that holds `<benchmark>/predictions.jsonl`:
            the output of an evaluation, or `evaluation/base` of a training run.

    Returns:
        Benchmark name -> file, in alphabetical order.

    Raises:
        EvaluationError: there are none.
    """
    run = Path(run)
    for folder in (run / artifacts.EVALUATION_FOLDER / "tuned", run):
        found = {path.parent.name: path for path in sorted(folder.glob(f"*/{artifacts.PREDICTIONS}"))}
        if found:
            return found
    raise EvaluationError(
        f"{run} holds no predictions (<benchmark>/{artifacts.PREDICTIONS}, there or under evaluation/tuned)",
        "pass the folder of a finished training run or of `vlm-sft eval`",
    )


def load_scored(benchmark: str | Benchmark, path: Path) -> Rows:
    """Read a predictions file and score each row by the benchmark's rule.

    Args:
        benchmark: it, or its name; for the name of own data the recorded scores are taken.
        path: a `predictions.jsonl`.

    Returns:
        Rows by id, each with its `score`.

    Raises:
        EvaluationError: the file is empty or unreadable, a row cannot be scored, or an id comes twice.
        RunError: a line is not JSON.
    """
    rows: Rows = {}
    try:
        for row in artifacts.read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("id"), int | str):
                raise EvaluationError(f"{path}: a row has no id", "write the predictions again")
            if row["id"] in rows:
                raise EvaluationError(f"{path}: id {quoted(row['id'])} comes twice", "write the predictions again")
            rows[row["id"]] = row if isinstance(benchmark, Benchmark) else row | {"score": score_item(benchmark, row)}
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}", "write the predictions again") from error
    if not rows:
        raise EvaluationError(f"{path} is empty", "finish the evaluation first")
    if isinstance(benchmark, Benchmark):
        scores = score_rows(benchmark, list(rows.values()))
        return {key: rows[key] | {"score": score} for key, score in zip(rows, scores, strict=True)}
    return rows


def _examples(ids: Sequence[Any]) -> str:
    return ", ".join(map(quoted, ids[:_EXAMPLES])) + (", ..." if len(ids) > _EXAMPLES else "")


def _why_unpaired(base: Rows, tuned: Rows) -> str:
    """Say in which items two sets of rows differ; "" when every item of one is in the other, with the same question."""
    parts = []
    for name, ids in (
        ("only in the first", [key for key in base if key not in tuned]),
        ("only in the second", [key for key in tuned if key not in base]),
        (
            "with another question or other answers",
            [
                key
                for key, row in base.items()
                if key in tuned and any(row.get(part) != tuned[key].get(part) for part in ("question", "answers"))
            ],
        ),
    ):
        if ids:
            parts.append(f"{len(ids):,} {name} ({_examples(ids)})")
    return f"{len(base):,} and {len(tuned):,} items: " + "; ".join(parts) if parts else ""


def _by_id(rows: Iterable[Row]) -> Rows:
    listed = list(rows)
    found = {row["id"]: row for row in listed}
    if len(found) != len(listed):
        raise EvaluationError(f"{len(listed) - len(found)} ids come twice", "score every item once")
    return found


def _verdict(found: statistics.PairedResult) -> str:
    """Say "better", "worse", that there is no significant difference, or that nothing can be said."""
    if found.p_value < statistics.LEVEL:
        return "better" if found.difference > 0 else "worse"
    return TOO_FEW if found.too_few else NO_DIFFERENCE


def _needed(found: statistics.PairedResult, discordance: float, n: int) -> dict[str, int]:
    """How many questions and images would show a difference like this one, or one that nobody would call small."""
    questions = statistics.items_needed(max(abs(found.difference), statistics.UNCLEAR), discordance)
    clusters = max(statistics.FEWEST_CLUSTERS, math.ceil(questions * found.clusters / n))
    return {"questions_needed": max(questions, clusters), "clusters_needed": clusters}


def compare_rows(base_rows: Iterable[Row], tuned_rows: Iterable[Row]) -> dict[str, Any]:
    """Compare two sets of scored rows of one benchmark, paired by id and clustered by image.

    Args:
        base_rows: objects with `id`, `score`, and where known `image`, `question`, `answers`.
        tuned_rows: the same items, in any order, answered by the other model.

    Returns:
        JSON values: `n`, `clusters` (independent images), `difference` (tuned minus base, 0.01 is one point),
        `interval` ([low, high], 95 %), `p_value`, `test`, `verdict` (of this comparison alone),
        `smallest_detectable_difference` (with 80 % power), `questions_needed` and `clusters_needed` (for the observed
        difference, or 10 points where it is smaller), and the ids of the items whose score fell (`lost`: right to
        wrong) and rose (`gained`).

    Raises:
        EvaluationError: the two do not hold the same items, an id comes twice, or there are no rows.
    """
    base, tuned = _by_id(base_rows), _by_id(tuned_rows)
    reason = _why_unpaired(base, tuned)
    if reason:
        raise EvaluationError(f"the two hold different items: {reason}", "evaluate both on the same items")
    clusters = [statistics.cluster_of(row) for row in base.values()]
    before = [row["score"] for row in base.values()]
    after = [tuned[key]["score"] for key in base]
    paired = statistics.paired_test(before, after, clusters)
    alone = paired.clusters == len(before) and set(before) | set(after) <= {0.0, 1.0}
    discordance = statistics.discordance(before, after, clusters)
    changes = list(zip(base, before, after, strict=True))
    return {
        "n": len(before),
        "clusters": paired.clusters,
        "difference": paired.difference,
        "interval": [paired.low, paired.high],
        "p_value": paired.p_value,
        "test": "McNemar exact" if alone else "sign flips by image",
        "verdict": _verdict(paired),
        "smallest_detectable_difference": statistics.smallest_detectable_difference(
            len(before), discordance, paired.clusters
        ),
        **_needed(paired, discordance, len(before)),
        "lost": [key for key, old, new in changes if new < old],
        "gained": [key for key, old, new in changes if new > old],
    }


def _change(base: Row, tuned: Row) -> Row:
    """What a person needs in order to judge one changed item."""
    return {
        "id": base["id"],
        "image": base.get("image"),
        "question": base.get("question"),
        "answers": base.get("answers"),
        "baseline_prediction": base.get("prediction"),
        "prediction": tuned.get("prediction"),
        "baseline_score": base["score"],
        "score": tuned["score"],
    }


def _accuracy(rows: Rows) -> tuple[float, list[float]]:
    scores = [row["score"] for row in rows.values()]
    clusters = [statistics.cluster_of(row) for row in rows.values()]
    return sum(scores) / len(scores), list(statistics.mean_interval(scores, clusters))


def _cut(rows: Rows) -> int:
    """Answers that the limit of tokens ended."""
    return sum(row.get("cut") is True for row in rows.values())


def _rules_of(names: Iterable[str], metric: str | None) -> dict[str, Benchmark]:
    """The rules that score answers anew: those of published benchmarks, and of own data where `metric` says one."""
    published = {name: BENCHMARKS[name] for name in names if name in BENCHMARKS and not is_own(name)}
    anew = {name: rules for name, rules in published.items() if rules.grading is None}
    return anew | judged_by(None, parse_metrics(metric, [name for name in names if name not in published]))


def _metric_of(rules: Benchmark | None, predictions: Path) -> tuple[str, str]:
    """The metric of some scores, and the fingerprint of the user's; "score" and "" where nothing tells."""
    if rules is not None:
        return rules.metric_name, rules.source
    path = predictions.with_name(artifacts.RESULTS)
    results = artifacts.read_json(path) if path.is_file() else {}
    return str(results.get("metric", "score")), str(results.get("metric_sha256", ""))


def _metric_among(
    scored_by: Mapping[str, Mapping[str, tuple[str, str]]] | None, run: str, benchmark: str
) -> tuple[str, str]:
    """The metric of a run's scores, as of `_metric_of`; by the benchmark alone where `scored_by` is None."""
    if scored_by is not None:
        return scored_by[run][benchmark]
    return (BENCHMARKS[benchmark].metric_name if benchmark in BENCHMARKS else "score"), ""


def _why_other_metric(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Say why the recorded scores of two runs cannot be compared; "" where they can."""
    if first == second or "score" in (first[0], second[0]):
        return ""
    if first[0] == second[0]:
        return f"scores of {first[0]} by different versions of its source"
    return f"scores of different metrics: {first[0]} and {second[0]}"


def _comparison(benchmark: str, metric: str, run: str, base: Rows, tuned: Rows) -> dict[str, Any]:
    """One line of the table, before the correction for several comparisons."""
    result = compare_rows(base.values(), tuned.values())
    before, before_interval = _accuracy(base)
    after, after_interval = _accuracy(tuned)
    return {
        "benchmark": benchmark,
        "metric": metric,
        "run": run,
        "baseline_accuracy": before,
        "baseline_interval": before_interval,
        "accuracy": after,
        "accuracy_interval": after_interval,
        "baseline_cut": _cut(base),
        "cut": _cut(tuned),
        **result,
        "lost": [_change(base[key], tuned[key]) for key in result["lost"]],
        "gained": [_change(base[key], tuned[key]) for key in result["gained"]],
    }


def _choose_baseline(runs: Sequence[Path], baseline: Path | None) -> tuple[Path, list[Path]]:
    """Return the baseline and the other runs, each once."""
    runs = list({run.resolve(): run for run in runs}.values())
    if baseline is None and len(runs) == 1:
        own = runs[0] / artifacts.EVALUATION_FOLDER / "base"
        if own.is_dir():
            return own, runs
    if baseline is None and runs:
        baseline, runs = runs[0], runs[1:]
    others = [run for run in runs if baseline is not None and run.resolve() != baseline.resolve()]
    if baseline is None or not others:
        raise EvaluationError(
            "there is only one run to compare",
            "pass another one, or a training run that holds evaluation/base and evaluation/tuned",
        )
    return baseline, others


def compare_runs(
    runs: Sequence[str | Path], baseline: str | Path | None = None, metric: str | None = None
) -> dict[str, Any]:
    """Compare runs with a baseline on every benchmark they share, corrected for the number of comparisons.

    Args:
        runs: folders as `locate_predictions` takes them. A single training run is compared with its own base model.
        baseline: the run to compare with; the first of `runs` by default.
        metric: as of `parse_metrics`: scores the answers to own data anew; None takes the recorded scores.

    Returns:
        The content of `compare.json`: `baseline`, `confidence`, `correction`, `comparisons` (what `compare_rows`
        returns with the verdict after Holm's correction, `p_holm`, both accuracies with intervals, how many answers the
        limit of tokens ended, and the changed items in full) and `not_compared` (what only one side of a pair
        evaluated).

    Raises:
        EvaluationError: nothing to compare, different items, or scores of different metrics or versions of one; all
            such pairs are named together.
        RunError: a file is damaged.
    """
    first, others = _choose_baseline([Path(run) for run in runs], Path(baseline) if baseline is not None else None)
    files = {str(run): locate_predictions(run) for run in (first, *others)}
    rules = _rules_of(files[str(first)], metric)
    loaded = {
        run: {name: load_scored(rules.get(name, name), path) for name, path in found.items()}
        for run, found in files.items()
    }
    scored_by = {
        run: {name: _metric_of(rules.get(name), path) for name, path in found.items()} for run, found in files.items()
    }
    return compare_loaded(loaded, str(first), scored_by)


def compare_loaded(
    runs: Mapping[str, Mapping[str, Rows]],
    first: str,
    scored_by: Mapping[str, Mapping[str, tuple[str, str]]] | None = None,
) -> dict[str, Any]:
    """Compare scored answers with those of a baseline; `compare_runs` without its reading.

    Args:
        runs: by name of the run: for each benchmark its rows by id, as `load_scored` returns them.
        first: the baseline's name.
        scored_by: in the same order the metric and the fingerprint of its source; None where all are scored alike.

    Raises:
        EvaluationError: as of `compare_runs`.
    """
    base_rows = runs[first]
    comparisons, not_compared, mistakes = [], [], []
    for run, found in runs.items():
        for name in sorted(base_rows.keys() | found.keys()) if run != first else ():
            if name not in found or name not in base_rows:
                not_compared.append({"benchmark": name, "missing_in": first if name in found else run})
                continue
            metrics = [_metric_among(scored_by, one, name) for one in (first, run)]
            reason = _why_unpaired(base_rows[name], found[name]) or _why_other_metric(*metrics)
            if reason:
                mistakes.append(f"  {name}: {first} and {run} hold {reason}")
            else:
                comparisons.append(_comparison(name, metrics[0][0], run, base_rows[name], found[name]))
    if mistakes:
        raise EvaluationError(
            "\n".join(["different items or metrics cannot be compared", *mistakes]),
            "evaluate the runs on the same items: same data, same --limit, same seed; --metric RULE scores answers to "
            "your own data anew",
        )
    if not comparisons:
        raise EvaluationError(f"the other runs evaluated no benchmark of {first}", "evaluate the same benchmarks")
    for entry, adjusted in zip(comparisons, statistics.holm([c["p_value"] for c in comparisons]), strict=True):
        significant = entry["p_value"] < statistics.LEVEL
        entry |= {"p_holm": adjusted}
        if significant and adjusted >= statistics.LEVEL:
            entry["verdict"] = NO_DIFFERENCE
    return {
        "baseline": first,
        "confidence": 1 - statistics.LEVEL,
        "correction": "Holm",
        "comparisons": comparisons,
        "not_compared": not_compared,
    }


def few_line(name: str, n: int, clusters: int, difference: float, needed: tuple[int, int]) -> str:
    """Say that a comparison cannot be judged, and what it would take.

    Args:
        name: of the benchmark.
        n: its questions.
        clusters: its independent images.
        difference: the observed one, in score units.
        needed: questions and independent images that would show it, or one that nobody would call small.
    """
    return (
        f"{name}: {n:,} questions on {clusters:,} independent images are {TOO_FEW}; about {needed[0]:,} on "
        f"{needed[1]:,} would show a difference of {100 * max(abs(difference), statistics.UNCLEAR):.0f} points"
    )
