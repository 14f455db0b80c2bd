"""What a checkpoint may lose elsewhere: the `--guard` argument, its test, the trade-off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.data.sources.spec import DatasetSpec, parse_beside
from vlm_sft.evaluate import statistics
from vlm_sft.evaluate.compare import TOO_FEW
from vlm_sft.evaluate.tasks import names_of

LEVEL = 0.05  # of the one-sided test
FEWEST_IMAGES = 5  # with fewer, 0.5**images is not below LEVEL: no loss whatever could be told from chance
GRAMMAR = "write BENCHMARK:POINTS, comma separated, e.g. textvqa:2.0,demo_text:1.5"


@dataclass(frozen=True, slots=True)
class Guard:
    """A benchmark that the training must not forget.

    Attributes:
        name: the benchmark.
        source: where its questions come from, in the grammar of `--benchmark`.
        allowed: what its mean score may fall below the base's, in score units (0.02 is two points).
    """

    name: str
    source: str
    allowed: float


def parse_guards(text: str, specs: Sequence[DatasetSpec] = ()) -> list[Guard]:
    """Parse `--guard`, e.g. `textvqa:2.0` or `chartqa@/data/chartqa:1.5,demo_text:0`.

    Args:
        text: comma-separated `BENCHMARK[@PATH]:POINTS`; points of 100 that may be lost, from 0.

    Raises:
        EvaluationError: every mistake of the argument together.
        DataError: an unknown benchmark.
    """
    guards: list[Guard] = []
    mistakes = []
    for entry in (part.strip() for part in text.split(",")):
        source, colon, points = entry.rpartition(":")
        try:
            allowed = float(points) / 100 if colon and source else math.nan
        except ValueError:
            allowed = math.nan
        if not 0 <= allowed <= 1:
            mistakes.append(f"{quoted(entry)} does not say how many points may be lost (0 to 100)")
            continue
        if source.startswith("eval_"):
            mistakes.append(
                f"{quoted(source)} is not a benchmark: a guard tests answers; a loss goes to metric_for_best_model"
            )
            continue
        guards += [
            Guard(name, source if name in source else name, allowed) for name in names_of(parse_beside(source, specs))
        ]
    names = [guard.name for guard in guards]
    mistakes += [f"{quoted(name)} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if mistakes:
        raise EvaluationError(f"--guard {text}: {'; '.join(mistakes)}", GRAMMAR)
    return guards


def judge(guard: Guard, base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Test whether a checkpoint lost more on a guarded benchmark than it may.

    Args:
        guard: the benchmark and what may be lost.
        base, tuned: lines of predictions.jsonl of the base and of the checkpoint: the same questions in the same order.

    Returns:
        JSON values: `benchmark`, `n`, `base`, `score` (0 to 1), `lost_points` and `allowed_points` (of 100), `p_value`
        (one-sided, paired, clustered by image), `qualifies` (False when the loss is larger than allowed at the 5 %
        level), `too_few` (the loss is larger, and no loss on so few images could be told from chance).
    """
    assert [row["id"] for row in base] == [row["id"] for row in tuned], "a guard compares the same questions"
    before, after = ([float(row["score"]) for row in rows] for rows in (base, tuned))
    clusters = [statistics.cluster_of(row) for row in base]
    p_value = statistics.loss_exceeds(before, after, guard.allowed, clusters)
    lost = sum(before) / len(before) - sum(after) / len(after)
    return {
        "benchmark": guard.name,
        "n": len(before),
        "base": sum(before) / len(before),
        "score": sum(after) / len(after),
        "lost_points": 100 * lost,
        "allowed_points": 100 * guard.allowed,
        "p_value": p_value,
        "qualifies": not (lost > guard.allowed and p_value < LEVEL),
        "too_few": lost > guard.allowed and len(set(clusters)) < FEWEST_IMAGES,
    }


def tradeoff(metric: str, evaluations: Sequence[dict[str, Any]], best_step: int | None) -> str:
    """Lay out what each evaluated step gained and lost, as a Markdown table that reads well in a terminal.

    Args:
        metric: what chooses the best checkpoint.
        evaluations: entries of guard.json: `step`, `value`, `guards` (from `judge`), `qualifies`.
        best_step: the chosen step, or None.
    """
    guarded = [entry["benchmark"] for entry in evaluations[0]["guards"]] if evaluations else []
    header = ["step", metric, *(f"{name} (lost, p)" for name in guarded), ""]
    rows = [header]
    for entry in evaluations:
        kept = TOO_FEW if any(one.get("too_few") for one in entry["guards"]) else ""
        note = "best" if entry["step"] == best_step else kept if entry["qualifies"] else "lost too much"
        losses = [
            f"{100 * one['score']:.1f} ({one['lost_points']:+.1f}, {one['p_value']:.3f})" for one in entry["guards"]
        ]
        rows.append([str(entry["step"]), f"{entry['value']:.4f}", *losses, note])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
