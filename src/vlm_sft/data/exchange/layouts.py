"""The record layouts of TRL, LLaMA-Factory, ms-swift and CSV.

In: a record becomes one that `records.questions_of` cuts into questions. Out: one question becomes one record.
TRL: "Dataset formats" (`prompt`, `completion`, `messages`, `images`); LLaMA-Factory: data/README (alpaca, sharegpt,
dataset_info.json); ms-swift: "Custom dataset" (`messages`, `images`, `query`, `response`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import DataError
from vlm_sft.data.sample import ABSOLUTE, IMAGE_MARK, Sample, pieces, placed_turns, with_marks
from vlm_sft.data.sources.records import Question, questions_of
from vlm_sft.data.sources.refusals import refuse
from vlm_sft.data.sources.rows import RowProblem

FORMATS = ("trl", "llamafactory", "msswift", "csv", "jsonl")
MARK_IN_TEXT = "text holds the image mark"
SUPERVISED_NOTE = "LLaMA-Factory also learns the earlier answers of a conversation, unless mask_history: true"


def layout_of(source: Path) -> str:
    """The layout that the name of a file says, or that it has as the kind of data that it is.

    Raises:
        DataError: neither.
    """
    from vlm_sft.data.sources.files import TABLES, data_files, is_pattern, kind_of, saved_folder

    if kind_of(source) in TABLES:
        return "csv"
    if saved_folder(source) or kind_of(source) in (".tar", ".arrow"):
        return "jsonl"
    if source.is_dir() or is_pattern(str(source)):
        files = [file for paths in data_files(source).values() for file in paths]
        kinds = {kind_of(file) for file in files}
        if kinds <= {".tar"} or all(file.name.startswith("metadata.") for file in files):
            return "jsonl"
        if kinds <= set(TABLES):
            return "csv"
    raise DataError(f"--format is missing, and the name of {source} says none", f"pass one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Names:
    """What the keys of a record are called, where a dataset_info.json or the command line says so.

    Attributes:
        columns: our name of a column to the one in the file.
        tags: LLaMA-Factory's names inside of a message.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def read_record(record: Any, layout: str, names: Names) -> list[Question]:
    """Cut one record of a layout into questions.

    Args:
        record: one JSON value.
        layout: one of `FORMATS`.
        names: how its keys are called.

    Returns:
        One question for each answer that is learned there; a turn that cannot be used carries its problem.

    Raises:
        RowProblem: the whole record cannot be used here.
    """
    if not isinstance(record, dict):
        raise RowProblem("not a record", f"a JSON object is needed, not {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None}
    refuse(record, names.columns)
    if layout == "llamafactory":
        record = _from_llamafactory(record, names)
    elif layout == "msswift":
        record = _from_msswift(record)
    return questions_of(record)


def _from_llamafactory(record: dict[str, Any], names: Names) -> dict[str, Any]:
    """Alpaca or sharegpt records; an image list may have a name of its own."""
    columns = names.columns
    images = record.get(columns.get("images", "images"), record.get("image", []))
    system = record.get(columns.get("system", "system"), "")
    messages_key = columns.get("messages", "conversations")
    if messages_key not in record and "messages" in record:
        messages_key = "messages"
    if messages_key in record:
        messages = _retagged(record[messages_key], names.tags)
    else:
        messages = _from_alpaca(record, columns)
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    kept = {key: record[key] for key in ("id", "split", "answers", "boxes") if key in record}
    return kept | {"messages": messages, "images": images}


def _from_alpaca(record: dict[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    prompt, response = columns.get("prompt", "instruction"), columns.get("response", "output")
    missing = [key for key in (prompt, response) if key not in record]
    if missing:
        raise RowProblem("missing key", f"no {' nor '.join(missing)}; its keys are: {', '.join(map(str, record))}")
    parts = [record[prompt], record.get(columns.get("query", "input"), "")]
    if not all(isinstance(part, str) for part in parts):
        raise RowProblem("question is not text")
    pairs = record.get(columns.get("history", "history")) or []
    messages = _pairs(pairs)
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    return [*messages, {"role": "assistant", "content": record[response]}]


def _pairs(pairs: Any) -> list[dict[str, Any]]:
    """Messages of a history in pairs of question and answer."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowProblem("history is not pairs", "history must be a list of [question, answer]")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _retagged(messages: Any, tags: Mapping[str, str]) -> Any:
    """Messages under the names that dataset_info.json gives; without it both usual ways are understood."""
    if not tags or not isinstance(messages, list):
        return messages
    roles = {
        tags.get(f"{role}_tag", usual): role
        for role, usual in (("user", "human"), ("assistant", "gpt"), ("system", "system"))
    }
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    return [
        {
            "role": roles.get(str(message.get(role_key)), message.get(role_key)),
            "content": message.get(content_key),
            **({"loss": message["loss"]} if "loss" in message else {}),
        }
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _from_msswift(record: dict[str, Any]) -> dict[str, Any]:
    """Messages, or query and response."""
    if "messages" not in record and "response" in record:
        history = _pairs(record.get("history") or [])
        turn = [{"role": "user", "content": record.get("query", "")}]
        record = record | {"messages": [*history, *turn, {"role": "assistant", "content": record["response"]}]}
    if record.get("system") and isinstance(record.get("messages"), list):
        record = record | {"messages": [{"role": "system", "content": record["system"]}, *record["messages"]]}
    return record


def row_of(question: Question, images: list[str], sample_id: str, split: str) -> dict[str, Any]:
    """One question as a line of our own JSONL: a plain record, or messages where an image stands behind words.

    Args:
        question: the question.
        images: its images, relative to the file.
        sample_id: unique in the data set.
        split: the part that is reported separately; "" for none.

    Raises:
        RowProblem: it cannot be said: it holds the image mark as a word, and shows no image.
    """
    row: dict[str, Any] = {"id": sample_id}
    plain = row | ({"image": images[0]} if len(images) == 1 else {"images": images} if images else {})
    plain |= {"question": question.question, "answer": question.target}
    if question.history:
        plain["history"] = [{"role": turn.role, "content": turn.text} for turn in question.history]
    plain |= {"system": question.system} if question.system else {}
    said = not question.places and (IMAGE_MARK not in question.question or _reads_as(question, plain))
    row = plain if said else row | {"messages": _with_parts(question, images)}
    if not (said or images):
        raise RowProblem(MARK_IN_TEXT, f"a text row cannot hold {IMAGE_MARK} as a word in its question")
    if question.answers != (question.target,):
        row["answers"] = list(question.answers)
    row |= {} if question.weight == 1 else {"weight": question.weight}
    row |= {"boxes": ABSOLUTE} if question.boxes else {}
    return row | ({"split": split} if split else {})


def _reads_as(question: Question, row: dict[str, Any]) -> bool:
    """Whether a plain record is read as a question without places."""
    try:
        read = questions_of(row)[0]
    except RowProblem:
        return False
    return (read.question, read.places) == (question.question, ())


def _with_parts(question: Question, images: list[str]) -> list[dict[str, Any]]:
    """A conversation whose images are parts of their turns, which hold no marks then."""
    names = iter(images)
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    for role, text, places in placed_turns(question.history, question.question, len(images), question.places):
        content = [
            {"type": "image", "image": next(names)} if piece is None else {"type": "text", "text": piece}
            for piece in pieces(text, places)
        ]
        messages.append({"role": role, "content": content} | ({"loss": False} if role == "assistant" else {}))
    return [*messages, {"role": "assistant", "content": question.target}]


def write_record(sample: Sample, images: list[str], layout: str, style: str) -> dict[str, Any]:
    """One question as a record of a layout.

    Args:
        sample: the question.
        images: its images, relative to the file.
        layout: one of `FORMATS`.
        style: of LLaMA-Factory: "sharegpt" or "alpaca".

    Raises:
        RowProblem: the layout cannot say this.
    """
    if layout in ("llamafactory", "msswift") and any(IMAGE_MARK in text for text in sample.texts):
        raise RowProblem(MARK_IN_TEXT, f"a text holds {IMAGE_MARK}, which means an image there")
    own_id = sample.id.removeprefix(f"{sample.dataset}/")
    record = _WRITERS[layout](sample, images, style)
    extra: dict[str, Any] = {"id": own_id}
    if sample.answers != (sample.target,) and layout not in ("csv", "jsonl"):
        extra["answers"] = list(sample.answers)
    if sample.split and layout != "jsonl":
        extra["split"] = sample.split
    if sample.boxes is not None:
        extra["boxes"] = ABSOLUTE
    return extra | record


def _messages(
    sample: Sample, role: str = "role", content: str = "content", names: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The whole conversation with a mark for each image; earlier answers are not learned."""
    named = names or {}
    messages = [
        {role: named.get(who, who), content: with_marks(text, places)} | ({"loss": False} if who == "assistant" else {})
        for who, text, places in sample.turns()
    ]
    return [*messages, {role: named.get("assistant", "assistant"), content: sample.target}]


def _to_msswift(sample: Sample, images: list[str], style: str) -> dict[str, Any]:
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    return {"messages": [*system, *_messages(sample)], "images": images}


def _to_llamafactory(sample: Sample, images: list[str], style: str) -> dict[str, Any]:
    system = {"system": sample.system} if sample.system else {}
    if style == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": _messages(sample, "from", "value", names), "images": images} | system
    if sample.history:
        raise RowProblem("conversation", "an alpaca record cannot say that earlier answers are context only")
    ((_, text, places),) = sample.turns()
    return {"instruction": with_marks(text, places), "input": "", "output": sample.target, "images": images} | system


def _to_trl(sample: Sample, images: list[str], style: str) -> dict[str, Any]:
    """Prompt and completion: TRL learns the completion only."""
    system = [("system", sample.system, ())] if sample.system else []
    prompt = [
        {
            "role": role,
            "content": [_part("image") if piece is None else _part("text", piece) for piece in pieces(text, places)],
        }
        for role, text, places in [*system, *sample.turns()]
    ]
    return {
        "images": images,
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": [_part("text", sample.target)]}],
    }


def _part(kind: str, text: str | None = None) -> dict[str, Any]:
    return {"type": kind, "text": text}


def _to_csv(sample: Sample, images: list[str], style: str) -> dict[str, Any]:
    if len(images) != 1:
        raise RowProblem("several images", f"a row of a CSV holds one image, not {len(images)}")
    if sample.history or sample.system:
        raise RowProblem("conversation", "a row of a CSV holds neither earlier turns nor a system text")
    if sample.boxes is not None:
        raise RowProblem("boxes", "a row of a CSV cannot declare boxes")
    if set(sample.answers) != {sample.target}:
        raise RowProblem("several answers", f"a row of a CSV holds one answer, not {len(set(sample.answers))}")
    if sample.places or "question" not in _to_jsonl(sample, images, style):
        raise RowProblem(MARK_IN_TEXT, f"a row of a CSV says of its image and of {IMAGE_MARK} only what stands first")
    return {"image": images[0], "question": sample.question, "answer": sample.target, "split": sample.split}


def _to_jsonl(sample: Sample, images: list[str], style: str) -> dict[str, Any]:
    texts = (sample.question, sample.target, sample.answers, sample.history, sample.system)
    question = Question((), *texts, weight=sample.weight, places=sample.places, boxes=sample.boxes is not None)
    own_id = sample.id.removeprefix(f"{sample.dataset}/")
    return row_of(question, images, own_id, sample.split)


_WRITERS: dict[str, Callable[[Sample, list[str], str], dict[str, Any]]] = {
    "trl": _to_trl,
    "llamafactory": _to_llamafactory,
    "msswift": _to_msswift,
    "csv": _to_csv,
    "jsonl": _to_jsonl,
}
