"""What one run brought: its headline, what improved by question type, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlm_sft.common import formats
from vlm_sft.evaluate.compare import TOO_FEW, compare_rows
from vlm_sft.report.predictions import Prediction
from vlm_sft.report.records import Benchmark, RunReport

TYPES_SHOWN = 12  # question types of a benchmark, those with the most questions
FEWEST = 10  # questions of a type that is called the weakest
FEW_STEPS = 50  # optimizer steps below which a recipe's learning rate has hardly been reached
CLAIMS = {
    "better": "Fine-tuning helped",
    "worse": "Fine-tuning made it worse",
    "same": "Fine-tuning made no clear difference",
    TOO_FEW: "Too few questions to judge",
}
ROSE = 0.02  # by which share the evaluation loss has to rise above its best to be called rising


@dataclass(frozen=True, slots=True)
class TypeScore:
    """One question type of a benchmark, answered by base and tuned model; accuracies and differences from 0 to 1."""

    name: str
    n: int
    base: float
    tuned: float
    interval: tuple[float, float]
    verdict: str

    @property
    def difference(self) -> float:
        """Tuned minus base."""
        return self.tuned - self.base

    @property
    def direction(self) -> str:
        """`better`, `worse` or `same`: the colour."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "same"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a page about one run begins with.

    Attributes:
        claims: what came of it, and the benchmarks it is true of, as `claims_of` says.
        cost: time of the training and how much was trained; "" where neither is recorded.
        types: benchmark to its question types, the largest gain first; benchmarks of one type are left out.
        more_types: benchmark to how many types are not shown.
        advice: sentences: what to do next, from this run's own curves and errors.
        commands: (what it does, the command line).
    """

    claims: tuple[tuple[str, str, str], ...]
    cost: str
    types: dict[str, list[TypeScore]]
    more_types: dict[str, int]
    advice: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]


def summarize(run: RunReport) -> RunSummary:
    """Sum one run up.

    Args:
        run: with its results and predictions, as far as there are any.
    """
    by_type = {name: rows for name, rows in _by_type(run.predictions).items() if len(rows) > 1}
    order = [one.name for one in run.benchmarks if one.name in by_type]
    types = {name: _type_scores(by_type[name]) for name in dict.fromkeys([*order, *by_type])}
    return RunSummary(
        claims=tuple(map(_accuracy, run.benchmarks)) if run.is_evaluation else claims_of(run.benchmarks),
        cost=_cost(run),
        types={name: rows for name, rows in types.items() if rows},
        more_types={name: len(rows) - TYPES_SHOWN for name, rows in by_type.items() if len(rows) > TYPES_SHOWN},
        advice=tuple([*_training_advice(run), *_worse(types), *_weakest(types)]),
        commands=tuple(_commands(run)),
    )


def claims_of(benchmarks: Iterable[Benchmark], of: str = "") -> tuple[tuple[str, str, str], ...]:
    """Whether fine-tuning helped, in plain words.

    Args:
        benchmarks: with base and tuned; others are passed over.
        of: the run that they are of, where it is not plain.

    Returns:
        (claim, its direction: `better`, `worse` or `same`, the benchmarks with their gains), good news first.
    """
    found: dict[str, list[str]] = {}
    for one in benchmarks:
        if line := gain(one):
            kind = TOO_FEW if one.verdict == TOO_FEW else one.direction
            found.setdefault(kind, []).append(line)
    named = f" ({of})" if of else ""
    return tuple(
        (claim + named, kind if kind in ("better", "worse") else "same", "; ".join(found[kind]))
        for kind, claim in CLAIMS.items()
        if kind in found
    )


def _accuracy(benchmark: Benchmark) -> tuple[str, str, str]:
    """The headline of one model on one benchmark."""
    score = benchmark.tuned or benchmark.base
    assert score is not None, "an evaluation is of one of them"
    return benchmark.name, "same", f"{score.told} of {formats.count(benchmark.n)} questions"


def gain(benchmark: Benchmark) -> str:
    """What one benchmark gained, in a line; "" where base or tuned was not evaluated."""
    base, tuned, name = benchmark.base, benchmark.tuned, benchmark.name
    if not (base and tuned) or base.accuracy is None or tuned.accuracy is None:
        return ""
    change = formats.typeset(formats.points(tuned.accuracy - base.accuracy))
    if benchmark.difference_interval is not None:
        low, high = benchmark.difference_interval
        change += f" ± {100 * (high - low) / 2:.1f}"
    return f"{name} {100 * base.accuracy:.1f} to {formats.percent(tuned.accuracy)} ({change})"


def _cost(run: RunReport) -> str:
    record = run.record
    if record is None:
        return ""
    if run.is_evaluation:
        return f"{formats.duration(record.wall_seconds)} of evaluation"
    parts = []
    so_far = " so far" if run.status == "running" else ""
    if (trained := record.seconds.get("train")) is not None:
        parts.append(f"{formats.duration(trained)} of training{so_far}")
    elif record.wall_seconds:
        parts.append(f"{formats.duration(record.wall_seconds)}{so_far or ' in all'}")
    if record.trainable_parameters:
        parts.append(f"{_rounded(record.trainable_parameters)} parameters trained")
    return ", ".join(parts)


def _rounded(number: int) -> str:
    """A number of parameters as one says it: "115 thousand", "40.4 million"."""
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return str(number)


def _by_type(predictions: Iterable[Prediction]) -> dict[str, dict[str, list[Prediction]]]:
    """Benchmark to question type to the questions that both models answered."""
    found: dict[str, dict[str, list[Prediction]]] = {}
    for one in predictions:
        if one.base is not None and one.tuned is not None and one.question_type:
            found.setdefault(one.benchmark, {}).setdefault(one.question_type, []).append(one)
    return found


def _type_scores(rows: dict[str, list[Prediction]]) -> list[TypeScore]:
    largest = sorted(rows, key=lambda name: (-len(rows[name]), name))[:TYPES_SHOWN]
    scores = [_type_score(name, rows[name]) for name in largest]
    return sorted(scores, key=lambda one: (-one.difference, one.name))


def _type_score(name: str, rows: Sequence[Prediction]) -> TypeScore:
    before, after = (
        [
            {"id": one.id, "score": answer.score, "cluster": one.cluster, "question": one.question}
            for one in rows
            if (answer := getattr(one, side)) is not None
        ]
        for side in ("base", "tuned")
    )
    result = compare_rows(before, after)
    base, tuned = (sum(float(row["score"]) for row in side) / len(rows) for side in (before, after))
    low, high = result["interval"]
    return TypeScore(name, len(rows), base, tuned, (low, high), result["verdict"])


def _training_advice(run: RunReport) -> list[str]:
    """What the curves say about more or less training."""
    record, losses = run.record, run.series.get("eval_loss", [])
    if record is None or run.status != "finished":
        return []
    lines = []
    if record.steps is not None and record.steps < FEW_STEPS:
        lines.append(
            f"The training ran only {record.steps:,} optimizer steps; fewer than about {FEW_STEPS} rarely teach much. "
            "Lower --global_batch_size or raise --num_train_epochs."
        )
    if len(losses) < 3:
        return lines
    (best_step, best), (last_step, last) = min(losses, key=lambda pair: pair[1]), losses[-1]
    if best_step == last_step:
        lines.append(
            "The evaluation loss was still falling at the last step: more epochs may help (--num_train_epochs)."
        )
    elif last > best * (1 + ROSE):
        kept = run.recipe.get("load_best_model_at_end", "").lower() == "true"
        lines.append(
            f"The evaluation loss was lowest at step {best_step:,} of {last_step:,} and rose afterwards: use more data "
            "or fewer epochs." + ("" if kept else " --load_best_model_at_end true keeps the best checkpoint.")
        )
    else:
        lines.append(
            f"The evaluation loss was flat from step {best_step:,} on: more epochs alone are unlikely to help; more or "
            "better data may."
        )
    return lines


def _worse(types: dict[str, list[TypeScore]]) -> list[str]:
    """The question types that the fine-tuned model answers worse than its base, beyond chance."""
    lines = []
    for benchmark, scores in types.items():
        lost = [one for one in scores if one.verdict == "worse"]
        if lost:
            told = ", ".join(f"{one.name} {100 * one.base:.1f} to {formats.percent(one.tuned)}" for one in lost)
            lines.append(f"{benchmark} got worse in {told}: train on more questions of that type, or for longer.")
    return lines


def _weakest(types: dict[str, list[TypeScore]]) -> list[str]:
    """The question type of each benchmark in which the most is left to gain."""
    lines = []
    for benchmark, scores in types.items():
        judged = [one for one in scores if one.n >= FEWEST]
        if not judged:
            continue
        worst = max(judged, key=lambda one: (one.n * (1 - one.tuned), one.name))
        wrong = worst.n * (1 - worst.tuned)
        if wrong < 1:
            continue
        lines.append(
            f"{benchmark} has the most to gain in questions of type {worst.name}: {formats.percent(worst.tuned)} of "
            f"{worst.n:,} are right. Filter the predictions below by this type, and train on more questions like them."
        )
    return lines


def _commands(run: RunReport) -> list[tuple[str, str]]:
    """Command lines for what comes next, with this run's own folder."""
    record = run.record
    if (
        record is None
        or run.status != "finished"
        or not (run.is_evaluation or any(one.tuned for one in run.benchmarks))
    ):
        return []
    folder = shlex.quote(record.output_dir or run.name)
    if run.is_evaluation:
        return [("Compare it with another evaluation", f"vlm-sft compare OTHER {folder} --baseline OTHER")]
    adapter = f"--adapter {folder}"
    return [
        ("Ask it about your own image", f'vlm-sft ask IMAGE "QUESTION" {adapter}'),
        ("Try it in the browser", f"vlm-sft demo {adapter}"),
        ("Compare it with another run", f"vlm-sft report {folder} OTHER_RUN --output comparison.html"),
        ("Merge it for transformers and vLLM", f"vlm-sft export {adapter} --merge --output_dir {folder}-merged"),
    ]
