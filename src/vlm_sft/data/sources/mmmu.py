"""MMMU: college questions of thirty subjects about one to seven images, multiple choice and open.

Yue et al. 2024, "MMMU", arXiv 2311.16502. Schema of MMMU/MMMU, where every subject is a configuration; scores are those
of validation, since the answers of test are not public.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping
from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.prompt import SHORT_ANSWER_TEMPLATE
from vlm_sft.data.sample import ImageRef, Place, Sample
from vlm_sft.data.sources.hub import TableSource
from vlm_sft.data.sources.rows import RowProblem, clean_text

PHRASE = SHORT_ANSWER_TEMPLATE.partition("\n")[2]
LETTER = "Answer with the option's letter from the given choices directly."
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECTS = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
MULTIPLE_CHOICE = "multiple-choice"
_MARK = re.compile(r"<image ([1-7])>")
_ID = re.compile(r"[a-z]+_(\w+)_\d+")  # validation_Art_Theory_7


def _listed(value: Any) -> list[str]:
    """A list of texts, which the table writes as Python does; a text that is no list is one of them."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            value = [value]
    return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]


def image_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the images that a question and its options name, in their order; the first without any."""
    text = "\n".join([str(row["question"]), *_listed(row["options"])])
    return tuple(f"image_{number}" for number in dict.fromkeys(_MARK.findall(text))) or ("image_1",)


def _placed(text: str) -> tuple[str, tuple[Place, ...]]:
    """A text without the first mark of each image, and where these stood; a mark that comes again stays a word."""
    kept, end, seen, places = "", 0, set(), []
    for mark in _MARK.finditer(text):
        kept, end = kept + text[end : mark.start()], mark.end()
        if mark[1] in seen:
            kept += mark[0]
        else:
            seen.add(mark[1])
            places.append(Place(0, len(kept)))
    return kept + text[end:], tuple(places)


def to_samples(row: Mapping[str, Any], images: tuple[ImageRef, ...], sample_id: str) -> list[Sample | RowProblem]:
    """Turn one row into a sample, reported by discipline; its images stand where its texts name them.

    Raises:
        RowProblem: no question or answer, or a multiple choice without its options or the right letter.
    """
    question, options = clean_text(row["question"], "question"), _listed(row["options"])
    answers = tuple(clean_text(answer, "answer") for answer in _listed(row["answer"]))
    if not answers:
        raise RowProblem("empty answer", "there is no answer")
    kind = str(row["question_type"])
    if kind == MULTIPLE_CHOICE:
        options = [clean_text(option, "option") for option in options]
        letters = string.ascii_uppercase[: len(options)]
        if answers[0] not in tuple(letters):
            what = f"answer is {quoted(answers[0])}, and there are {len(options)} options"
            raise RowProblem("no such option", what)
        listed = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=True)]
        question = "\n".join([question, *listed, LETTER])
    else:
        question = f"{question}\n{PHRASE}"
    named = _ID.fullmatch(str(row["id"]))
    discipline = SUBJECTS.get(named[1], "") if named else ""
    metadata = {"question_type": kind} | ({"options": options} if kind == MULTIPLE_CHOICE else {})
    question, places = _placed(question)
    if places and len(places) != len(images):
        raise RowProblem("image without a place", f"{len(images)} images are named, {len(places)} in what is asked")
    return [
        Sample(sample_id, "mmmu", discipline, images, question, answers[0], answers, metadata=metadata, places=places)
    ]


SOURCE = TableSource(
    name="mmmu",
    title="MMMU",
    hub_ids=("MMMU/MMMU",),
    official={"validation": "validation"},
    roles={"validation": "validation"},
    columns=("id", "question", "options", "answer", "question_type"),
    hold_out_fraction=0.05,
    to_samples=to_samples,
    config=tuple(SUBJECTS),
    image_columns=tuple(f"image_{number}" for number in range(1, 8)),
    images_of=image_columns,
    passed_over=("dev-",),  # five examples a subject, for prompts
)
