"""The names of the metrics that an evaluation during training writes; a best checkpoint is chosen by these only."""

from __future__ import annotations

import re

# All but the first are the metrics of the benchmarks (evaluate/metrics.py has their rules) and of own data
# (evaluate/own_metrics.py: RULES), and more of them is better.
EVALUATION_METRICS = (
    "eval_loss",
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
    "multiple_choice",
    "squad_f1",
    "exact_match",
    "relaxed_accuracy",
    "vqa_accuracy",
    "anls",
    "contains",
    "relaxed_anls",
)

OWN_METRIC = re.compile(r"\w+(\.\w+)*:\w+")  # a function of the user's, module:function, measures by this name too
