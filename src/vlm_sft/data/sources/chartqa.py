"""ChartQA: questions about charts, human-written and machine-made (augmented).

Masry et al. 2022, "ChartQA", arXiv 2203.10244. Schema of HuggingFaceM4/ChartQA.
"""

from __future__ import annotations

from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.hub import TableSource, load_table, one_question
from vlm_sft.data.sources.rows import RowProblem, clean_text, texts_of
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import LoadedSplit

PARTS = {0: "human", 1: "augmented"}


def to_sample(row: dict[str, Any], image: ImageRef, sample_id: str) -> Sample:
    """Turn one row into a sample: the first label is the target, all labels are answers.

    Raises:
        RowProblem: no question, no label, or an unknown part.
    """
    question = clean_text(row["query"], "question")
    answers = texts_of(row["label"], "answer")
    if row["human_or_machine"] not in PARTS:
        raise RowProblem("unknown part", f"human_or_machine is {quoted(row['human_or_machine'])}, not 0 or 1")
    return Sample(sample_id, "chartqa", PARTS[row["human_or_machine"]], (image,), question, answers[0].strip(), answers)


SOURCE = TableSource(
    name="chartqa",
    title="ChartQA",
    hub_ids=("HuggingFaceM4/ChartQA",),
    official={"train": "train", "validation": "val", "test": "test"},
    roles={"train": "train", "validation": "validation", "test": "test"},
    columns=("query", "label", "human_or_machine"),
    hold_out_fraction=0.05,
    to_samples=one_question(to_sample),
)


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of ChartQA; see `load_table`. A folder without test files falls back to validation."""
    return load_table(SOURCE, spec, split)
