"""Published sets of questions about documents, charts, diagrams and photographs, in the schemas of the Hub."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.sample import ImageRef, Sample, Turn
from vlm_sft.data.sources import mmmu
from vlm_sft.data.sources.hub import TableSource, ToSamples, load_table, one_question
from vlm_sft.data.sources.mmmu import LETTER
from vlm_sft.data.sources.rows import RowProblem, clean_text, most_common, texts_of
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import LoadedSplit

HOLD_OUT = 0.05  # of the images, where a set has no part for validation

_Row = Mapping[str, Any]
_OPTION = re.compile(r"^([A-Z])\.[ \t]+(\S.*)$", re.MULTILINE)


def _document(name: str, kinds: str, row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of DocVQA or InfographicVQA; `kinds` is the column of what a question is about."""
    answers = texts_of(row["answers"], "answer")
    kind = " / ".join(sorted(map(str, row[kinds] or ())))
    question = clean_text(row["question"], "question")
    return Sample(
        sample_id,
        name,
        "",
        (image,),
        question,
        most_common([answer.strip() for answer in answers]),
        answers,
        metadata={"question_type": kind},
    )


def _chartqapro(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of ChartQAPro: the last of its questions, with the turns before it; its paragraph stands before it."""
    questions, answers = [texts_of(row[key], "answer") for key in ("Question", "Answer")]
    if len(questions) != len(answers):
        raise RowProblem("no answer to each question", f"{len(questions)} questions, {len(answers)} answers")
    questions = tuple(question.strip() for question in questions)
    turns = [
        (Turn("user", asked), Turn("assistant", told.strip())) for asked, told in zip(questions, answers, strict=True)
    ]
    paragraph = (row["Paragraph"] or "").strip()
    question = f"{paragraph}\n{questions[-1]}" if paragraph else questions[-1]
    kind = clean_text(row["Question Type"], "question type")
    metadata = {"question_type": kind, "year": [str(flag) for flag in row["Year"] or ()]}
    history = tuple(turn for pair in turns[:-1] for turn in pair)
    return Sample(
        sample_id,
        "chartqapro",
        kind,
        (image,),
        question,
        answers[-1].strip(),
        (answers[-1],),
        history,
        metadata=metadata,
    )


def _ai2d(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of AI2D: the options below the question, the letter of the right one to be answered."""
    options = [clean_text(option, "option") for option in row["options"] or ()]
    place = str(row["answer"]).strip()
    if not place.isdigit() or int(place) >= len(options):
        raise RowProblem("no such option", f"answer is {quoted(row['answer'])}, and there are {len(options)} options")
    letter = string.ascii_uppercase[int(place)]
    listed = [f"{name}. {text}" for name, text in zip(string.ascii_uppercase, options, strict=False)]
    question = "\n".join([clean_text(row["question"], "question"), *listed, LETTER])
    return Sample(sample_id, "ai2d", "", (image,), question, letter, (letter,), metadata={"options": options})


def _plain(name: str, row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row with a question and an answer."""
    answers = texts_of(row["answer"], "answer")
    return Sample(sample_id, name, "", (image,), clean_text(row["question"], "question"), answers[0].strip(), answers)


def _realworldqa(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of RealWorldQA; the options of a multiple choice stand in its question, one a line."""
    sample = _plain("realworldqa", row, image, sample_id)
    letters, texts = (
        zip(*_OPTION.findall(sample.question), strict=True) if _OPTION.search(sample.question) else ((), ())
    )
    if sample.target in letters and "".join(letters) == string.ascii_uppercase[: len(letters)]:
        sample.metadata["options"] = [text.strip() for text in texts]
    return sample


def _ocrbench(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of OCRBench; it is reported by kind of question."""
    sample = _plain("ocrbench", row, image, sample_id)
    sample.metadata.update(question_type=str(row["question_type"]), dataset=str(row["dataset"]))
    return sample


def _ocrvqa(row: _Row, images: tuple[ImageRef, ...], sample_id: str) -> list[Sample | RowProblem]:
    """A row of OCR-VQA: a book cover with several questions, each with one answer.

    Mishra et al. 2019, "OCR-VQA: Visual Question Answering by Reading Text in Images" (ICDAR).
    """
    questions, answers = list(row["questions"] or ()), list(row["answers"] or ())
    if len(questions) != len(answers) or not questions:
        raise RowProblem("no answer to each question", f"{len(questions)} questions, {len(answers)} answers")
    samples: list[Sample | RowProblem] = []
    for number, (asked, told) in enumerate(zip(questions, answers, strict=True)):
        try:
            question, answer = clean_text(asked, "question"), clean_text(told, "answer")
            samples.append(Sample(f"{sample_id}/{number}", "ocrvqa", "", images, question, answer, (answer,)))
        except RowProblem as problem:
            samples.append(problem)
    return samples


CHARXIV_KINDS = {1: "text in chart", 2: "text in general", 3: "number in chart", 4: "number in general"}
_CHARXIV_FORMS = {
    1: "Answer with text that is written in the chart; separate several terms with commas.",
    2: "Answer with one of the options if the question has some, else with a short phrase.",
    3: "Answer with a number that is written in the chart.",
}


def _charxiv(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A reasoning question of CharXiv, with the form of its answer behind it, in words of ours."""
    answer = clean_text(row["reasoning_a"], "answer")
    kind = row["reasoning_a_type"]
    if kind not in CHARXIV_KINDS:
        raise RowProblem("unknown kind of answer", f"reasoning_a_type is {quoted(kind)}, not 1 to 4")
    places = len(answer.partition(".")[2])
    number = f"Answer with a number with {places} decimal places." if places else "Answer with a whole number."
    question = f"{clean_text(row['reasoning_q'], 'question')}\n{_CHARXIV_FORMS.get(kind, number)}"
    metadata = {"question_type": CHARXIV_KINDS[kind]}
    return Sample(sample_id, "charxiv", "", (image,), question, answer, (answer,), metadata=metadata)


def _chartmuseum(row: _Row, image: ImageRef, sample_id: str) -> Sample:
    """A row of ChartMuseum; it is reported by kind of reasoning."""
    sample = _plain("chartmuseum", row, image, sample_id)
    sample.metadata["question_type"] = str(row["reasoning_type"])
    return sample


def _source(
    name: str,
    title: str,
    hub_id: str,
    splits: Mapping[str, str],
    columns: Sequence[str],
    to_samples: ToSamples,
    config: str | None = None,
) -> TableSource:
    """A table; `splits` gives for each split of ours its name on the Hub."""
    roles = {ours: ours for ours in splits}
    return TableSource(name, title, (hub_id,), splits, roles, tuple(columns), HOLD_OUT, to_samples, config)


# Test sets without public answers are not in these tables: where there is no other, scores are those of validation.
SOURCES = {
    source.name: source
    for source in (
        _source(
            "docvqa",
            "DocVQA",
            "lmms-lab/DocVQA",
            {"validation": "validation"},
            ("question", "answers", "question_types"),
            one_question(partial(_document, "docvqa", "question_types")),
            "DocVQA",
        ),
        _source(
            "infographicvqa",
            "InfographicVQA",
            "lmms-lab/DocVQA",
            {"validation": "validation"},
            ("question", "answers", "answer_type"),
            one_question(partial(_document, "infographicvqa", "answer_type")),
            "InfographicVQA",
        ),
        _source(
            "chartqapro",
            "ChartQAPro",
            "ahmed-masry/ChartQAPro",
            {"test": "test"},
            ("Question", "Answer", "Question Type", "Year", "Paragraph"),
            one_question(_chartqapro),
        ),
        _source(
            "ai2d", "AI2D", "lmms-lab/ai2d", {"test": "test"}, ("question", "options", "answer"), one_question(_ai2d)
        ),
        _source(
            "realworldqa",
            "RealWorldQA",
            "lmms-lab/RealWorldQA",
            {"test": "test"},
            ("question", "answer"),
            one_question(_realworldqa),
        ),
        _source(
            "ocrbench",
            "OCRBench",
            "echo840/OCRBench",
            {"test": "test"},
            ("dataset", "question", "question_type", "answer"),
            one_question(_ocrbench),
        ),
        _source(
            "ocrvqa",
            "OCR-VQA",
            "howard-hou/OCR-VQA",
            {"train": "train", "validation": "validation", "test": "test"},
            ("questions", "answers"),
            _ocrvqa,
        ),
        mmmu.SOURCE,
        _source(
            "charxiv",
            "CharXiv",
            "princeton-nlp/CharXiv",
            {"validation": "validation"},
            ("reasoning_q", "reasoning_a", "reasoning_a_type"),
            one_question(_charxiv),
        ),
        _source(
            "chartmuseum",
            "ChartMuseum",
            "lytang/ChartMuseum",
            {"validation": "dev", "test": "test"},
            ("question", "answer", "reasoning_type"),
            one_question(_chartmuseum),
        ),
    )
}


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of one of these sets; see `load_table`."""
    return load_table(SOURCES[spec.name], spec, split)
