"""What an evaluation during a training measures, by name."""

from __future__ import annotations

LOSS = "eval_loss"
SET_LOSS = f"{LOSS}_NAME"  # of one data set among several; a choice that ends in NAME stands for any name
# All but the first are the metrics of the benchmarks (evaluate/metrics.py has their rules), and more of them is better.
EVALUATION_METRICS = (
    LOSS,
    "chartqa_relaxed_accuracy",
    "textvqa_accuracy",
    "docvqa_anls",
    "infographicvqa_anls",
    "ocrvqa_accuracy",
    "chartqapro_relaxed_accuracy",
    "ai2d_accuracy",
    "realworldqa_accuracy",
    "ocrbench_accuracy",
    "easy_vqa_accuracy",
    "demo_charts_relaxed_accuracy",
    "demo_text_accuracy",
    "multiple_choice_accuracy",
    "squad_f1",
    "exact_match",
)


def is_loss(metric: str) -> bool:
    """Whether a metric is an evaluation loss: over everything, or of one data set."""
    return metric == LOSS or bool(loss_set(metric))


def loss_set(metric: str) -> str:
    """The data set whose evaluation loss a metric is; "" for any other metric."""
    start = SET_LOSS.removesuffix("NAME")
    return metric.removeprefix(start) if metric.startswith(start) else ""
