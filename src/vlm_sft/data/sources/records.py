"""Recognises the JSON formats people have, record by record, and cuts them into questions.

Formats: `messages` (+ `images`), LLaVA/ShareGPT `conversations`, `prompt` + `completion`, and plain
`image` + `question` + `answer(s)`. Images stay as written here; the jsonl source reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.sample import Turn
from vlm_sft.data.sources.columns import flag_for
from vlm_sft.data.sources.locate import keys_of, likely_images, no_image
from vlm_sft.data.sources.refusals import refuse
from vlm_sft.data.sources.rows import RowProblem, clean_text, loss_weight, most_common, reference_answers

PLACEHOLDER = "<image>"
MOVED = "an image stands behind words of its conversation; here images come first"
IMAGE_PARTS = ("image", "image_url")
_LEADING_MARKS = re.compile(rf"(\s*{PLACEHOLDER})+\s*")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a record, before its images are read.

    Attributes:
        images: the images that the question may see, as written in the record.
        question, target, answers, history, system: as in `Sample`.
        turn: number of the assistant turn in its conversation, from 1.
        problem: why this turn cannot be used; None when it can.
        note: what is not exactly as the record has it; "" when everything is.
        weight: of the answer in the loss.
    """

    images: tuple[Any, ...]
    question: str
    target: str
    answers: tuple[str, ...]
    history: tuple[Turn, ...] = ()
    system: str = ""
    turn: int = 1
    problem: RowProblem | None = None
    note: str = ""
    weight: float = 1.0


@dataclass(slots=True)
class _Message:
    role: str
    text: str
    images: list[Any] = field(default_factory=list)
    marks: int = 0  # placeholders that stand for an image of the record's own list
    behind: bool = False  # an image stands behind words of this message
    weight: float = 1.0  # of an answer in the loss; 0 for one that is context only ("loss": false, or a weight of 0)


def questions_of(record: Any) -> list[Question]:
    """Cut one record into questions.

    Args:
        record: one JSON value.

    Returns:
        One question an assistant turn; a turn that cannot be used carries its problem.

    Raises:
        RowProblem: the whole record cannot be used.
    """
    if not isinstance(record, dict):
        raise RowProblem("not a record", f"a JSON object is needed, not {type(record).__name__}")
    refuse(record)
    for key in ("messages", "conversations"):
        if key in record:
            return _conversation(_messages(record[key], key, not _has_image_parts(record[key])), _image_list(record))
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        messages = (
            [_text_message("user", prompt)]
            if isinstance(prompt, str)
            else _messages(prompt, "prompt", not _has_image_parts(prompt))
        )
        for message in messages:
            message.weight = 0  # the completion alone is learned
        messages += (
            _messages(completion, "completion")
            if isinstance(completion, list)
            else [_Message("assistant", clean_text(completion, "answer"))]
        )
        return _conversation(messages, _image_list(record))
    if "question" in record:
        return [_plain(record)]
    raise RowProblem(
        "missing key",
        "a record needs messages, conversations, prompt and completion, or image, question "
        f"and answer; {keys_of(record)}; name them: {flag_for(('question', 'answer'), record)}",
    )


def require_image(record: Mapping[str, Any], read: Callable[[], list[Question]]) -> list[Question]:
    """The questions of a record; where they see no image though a key looks like one, that is told with the keys.

    A record without any such key is a text row. The record's weight in the loss multiplies those of its answers.

    Args:
        record: the record as it was read.
        read: what cuts it into questions.

    Raises:
        RowProblem: the whole record cannot be used.
    """
    try:
        questions = read()
    except RowProblem as problem:
        if problem.reason == "more placeholders than images" and problem.detail.endswith(", 0 images"):
            raise no_image(record) from problem
        raise
    weight = loss_weight(record)
    if not weight:
        raise RowProblem("weight of 0", "the record's weight in the loss is 0: it would teach nothing")
    if weight != 1:
        questions = [replace(question, weight=weight * question.weight) for question in questions]
    if any(question.images for question in questions) or not likely_images(record):
        return questions
    return [question if question.problem else replace(question, problem=no_image(record)) for question in questions]


def _plain(record: dict[str, Any]) -> Question:
    if "answer" not in record and "answers" not in record:
        raise RowProblem(
            "missing key",
            "the record has a question, but neither answer nor answers; "
            f"{keys_of(record)}; name it: {flag_for(('answer',), record)}",
        )
    images = _image_list(record)
    message = _plain_question(clean_text(record["question"], "question"), len(images))
    listed = record.get("answers")
    if listed is None:
        listed = record.get("answer")
    answers = reference_answers(listed)
    target = clean_text(record["answer"], "answer") if isinstance(record.get("answer"), (str, int, float)) else ""
    system = clean_text(record["system"], "system text") if record.get("system") else ""
    return Question(
        tuple(images),
        clean_text(message.text, "question"),
        target or most_common(answers),
        answers,
        _history(record),
        system,
        note=MOVED if message.behind else "",
    )


def _plain_question(text: str, images: int) -> _Message:
    """The question of a plain record: `<image>` before all words, or alone in a line, is a mark; else it is a word.

    Raises:
        RowProblem: it stands there more often than there are images.
    """
    _refuse_more_marks(text.count(PLACEHOLDER), images)
    lead = _LEADING_MARKS.match(text)
    lines = text[lead.end() if lead else 0 :].split("\n")
    kept = [line for line in lines if not _LEADING_MARKS.fullmatch(line)]
    return _Message("user", "\n".join(kept), behind=len(kept) < len(lines))


def _refuse_more_marks(marks: int, images: int) -> None:
    if marks > images:
        raise RowProblem("more placeholders than images", f"{PLACEHOLDER} {marks} times, {images} images")


def _history(record: dict[str, Any]) -> tuple[Turn, ...]:
    """The earlier turns of a plain record: messages of text, as in `Sample.history`."""
    if not record.get("history"):
        return ()
    turns = []
    for message in _messages(record["history"], "history", marked=False):
        if message.images or message.marks or message.role == "system":
            raise RowProblem("history is not text", "history holds texts of user and assistant; images come before it")
        turns.append(Turn(message.role, clean_text(message.text, "history")))
    return tuple(turns)


def _image_list(record: dict[str, Any]) -> list[Any]:
    """The images beside the texts, under any of the names in use."""
    for key in ("images", "image"):
        value = record.get(key)
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def _without_placeholders(text: str) -> str:
    """Take the image marks out, with the space that set them apart from the words."""
    return re.sub(rf"\s*{PLACEHOLDER}\s*", lambda found: "\n" if "\n" in found.group() else " ", text).strip()


def _text_message(role: str, text: str, marked: bool = True) -> _Message:
    """A message of text; only a user places images, so in other texts `<image>` is a word like any other."""
    if role != "user" or not marked:
        return _Message(role, text.strip())
    before = text.rpartition(PLACEHOLDER)[0].replace(PLACEHOLDER, "")
    return _Message(role, _without_placeholders(text), marks=text.count(PLACEHOLDER), behind=bool(before.strip()))


def _has_image_parts(messages: Any) -> bool:
    """Whether a conversation places its images by parts of the type image: then its texts hold no marks."""
    contents = (
        [item.get("content", item.get("value")) for item in messages if isinstance(item, dict)]
        if isinstance(messages, list)
        else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in parts)


def _messages(value: Any, key: str, marked: bool = True) -> list[_Message]:
    if not isinstance(value, list) or not value:
        raise RowProblem("missing key", f"{key} must be a list with at least one message")
    return [_message(item, f"{key}[{position}]", marked) for position, item in enumerate(value)]


def _message(item: Any, where: str, marked: bool) -> _Message:
    if not isinstance(item, dict):
        raise RowProblem("not a message", f"{where} must be an object with a role and a content")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise RowProblem("unknown role", f"{where} has the role {quoted(role)}; known are {known}")
    weight = 0.0 if item.get("loss") is False else loss_weight(item, where)
    if content is None or isinstance(content, str):
        message = _text_message(ROLES[role], content or "", marked)
        message.weight = weight
        return message
    if not isinstance(content, list):
        raise RowProblem("not a message", f"{where} has a content that is neither text nor a list of parts")
    message = _Message(ROLES[role], "", weight=weight)
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            inner = _text_message(message.role, part["text"], marked)
            message.behind |= inner.behind or bool(inner.marks and any(texts))
            texts.append(inner.text)
            message.marks += inner.marks
        elif kind in IMAGE_PARTS:
            message.behind |= any(texts)
            inline = next((part[name] for name in IMAGE_PARTS if part.get(name)), None)
            if inline is not None:
                message.images.append(inline)
            elif any(part.get(name) for name in ("bytes", "path", "url")):
                message.images.append(part)
            else:
                message.marks += 1
        else:
            raise _unknown_part(where, part)
    message.text = "\n".join(text for text in texts if text)
    return message


def _unknown_part(where: str, part: Any) -> RowProblem:
    """Why a part of a content cannot be read."""
    if not isinstance(part, dict):
        return RowProblem("unknown part", f"{where} has a part that is no object: {quoted(part)}")
    if "type" not in part:
        return RowProblem("unknown part", f"{where} has a part without a type; {keys_of(part)}")
    if part["type"] != "text":
        return RowProblem(
            "unknown part", f"{where} has a part of the type {quoted(part['type'])}; known are text and image"
        )
    given = "null" if part.get("text") is None else f"no text but {quoted(part['text'])}"
    what = f"is {given}" if "text" in part else f"is missing; {keys_of(part)}"
    return RowProblem(
        "text part without text",
        f"{where} has a part of the type text whose text {what}; write it, or leave the part out",
    )


def _conversation(messages: list[_Message], listed: list[Any]) -> list[Question]:
    """One question an assistant turn, with the turns before it as history and the images shown so far."""
    marks = sum(message.marks for message in messages)
    _refuse_more_marks(marks, len(listed))
    waiting = listed[len(listed) - marks :]  # those that a placeholder places; the others come before everything
    seen: list[Any] = listed[: len(listed) - marks]
    system, question = "", ""
    history: list[Turn] = []
    found: list[Question] = []
    note, number = "", 0
    for message in messages:
        if message.behind or (history and (message.images or message.marks)):
            note = MOVED
        seen += message.images + waiting[: message.marks]
        waiting = waiting[message.marks :]
        if message.role == "system":
            system = f"{system}\n{message.text}".strip()
        elif message.role == "user":
            question = f"{question}\n{message.text}".strip()
        else:
            number += 1
            if message.weight:
                turn = _turn(tuple(seen), question, message.text, tuple(history), system, number)
                found.append(replace(turn, note=note, weight=message.weight))
            history += [Turn("user", question), Turn("assistant", message.text)]
            question = ""
    if not found:
        raise RowProblem("missing answer", "the conversation has no turn of the assistant that is to be learned")
    return found


def _turn(
    images: tuple[Any, ...], question: str, answer: str, history: tuple[Turn, ...], system: str, number: int
) -> Question:
    problem = None
    try:
        for text in (system, *(turn.text for turn in history)):
            if text:
                clean_text(text, "history")
        question, answer = clean_text(question, "question"), clean_text(answer, "answer")
    except RowProblem as found:
        problem = found
    return Question(images, question, answer, (answer,), history, system, number, problem)
