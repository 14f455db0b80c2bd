"""TextVQA: questions about text in photographs, ten human answers each.

Singh et al. 2019, "Towards VQA Models That Can Read", arXiv 1904.08920. Schema of lmms-lab/textvqa.
"""

from __future__ import annotations

from typing import Any

from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.hub import TableSource, load_table, one_question
from vlm_sft.data.sources.rows import RowProblem, clean_text, most_common
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import LoadedSplit

ANSWERS = 10


def to_sample(row: dict[str, Any], image: ImageRef, sample_id: str) -> Sample:
    """Turn one row into a sample: the most common non-empty answer is the target, all ten are kept for the metric.

    Raises:
        RowProblem: no question, not ten answers (the metric is defined for ten), or only empty ones.
    """
    question = clean_text(row["question"], "question")
    answers = tuple(row["answers"] or ())
    if len(answers) != ANSWERS:
        raise RowProblem("not ten answers", f"{len(answers)} answers, the VQA metric needs {ANSWERS}")
    given = [answer.strip() for answer in answers if answer and answer.strip()]
    target = clean_text(most_common(given) if given else "", "answer")
    metadata = {"question_id": row["question_id"], "image_id": row["image_id"]}
    return Sample(
        sample_id,
        "textvqa",
        "",
        (image,),
        question,
        target,
        tuple(answer or "" for answer in answers),
        metadata=metadata,
    )


SOURCE = TableSource(
    name="textvqa",
    title="TextVQA",
    hub_ids=("lmms-lab/textvqa", "facebook/textvqa"),
    # The official test set has no public answers: scores are reported on validation, as in the literature, and
    # evaluation during training uses a part held out of train.
    official={"train": "train", "test": "validation"},
    roles={"train": "train", "validation": "test"},
    columns=("question", "answers", "question_id", "image_id"),
    hold_out_fraction=0.03,
    to_samples=one_question(to_sample),
)


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of TextVQA; see `load_table`. "test" is the official validation set."""
    return load_table(SOURCE, spec, split)
