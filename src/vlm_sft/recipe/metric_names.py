"""What an evaluation during a training measures, by name."""

from __future__ import annotations

LOSS = "eval_loss"
SET_LOSS = f"{LOSS}_NAME"  # of one data set among several; a choice that ends in NAME stands for any name
OWN_FUNCTION = "module:function"  # stands for any function of the user's
# All but the first are the metrics of the benchmarks (evaluate/metrics.py has their rules) and of own data
# (evaluate/own_metrics.py: RULES), and more of them is better.
EVALUATION_METRICS = (
    LOSS,
    "chartqa_relaxed_accuracy",
    "textvqa_accuracy",
    "docvqa_anls",
    "infographicvqa_anls",
    "ocrvqa_accuracy",
    "chartqapro_relaxed_accuracy",
    "ai2d_accuracy",
    "charxiv_judged",
    "chartmuseum_judged",
    "realworldqa_accuracy",
    "ocrbench_accuracy",
    "mmmu_accuracy",
    "easy_vqa_accuracy",
    "demo_charts_relaxed_accuracy",
    "demo_text_accuracy",
    "multiple_choice",
    "squad_f1",
    "exact_match",
    "relaxed_accuracy",
    "vqa_accuracy",
    "anls",
    "contains",
    "relaxed_anls",
    "cider",
    "bleu4",
    "rouge_l",
    "judge",
)


def is_loss(metric: str) -> bool:
    """Whether a metric is an evaluation loss: over everything, or of one data set."""
    return metric == LOSS or bool(loss_set(metric))


def loss_set(metric: str) -> str:
    """The data set whose evaluation loss a metric is; "" for any other metric."""
    start = SET_LOSS.removesuffix("NAME")
    return metric.removeprefix(start) if metric.startswith(start) else ""
