"""Recognises the JSON formats people have, record by record, and cuts them into questions.

Formats: `messages` (+ `images`), LLaVA/ShareGPT `conversations`, `prompt` + `completion`, and plain
`image` + `question` + `answer(s)`. Images stay as written here; the jsonl source reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.sample import ABSOLUTE, Place, Turn
from vlm_sft.data.sources.columns import flag_for
from vlm_sft.data.sources.locate import keys_of, likely_images, no_image
from vlm_sft.data.sources.refusals import refuse
from vlm_sft.data.sources.rows import RowProblem, clean_text, loss_weight, most_common, reference_answers
from vlm_sft.data.sources.turns import (
    LISTED,
    Message,
    listed_turns,
    plain_question,
    refuse_more_marks,
    text_message,
    unusual,
)

TALKS = ("messages", "conversations")
IMAGE_PARTS = ("image", "image_url")
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
        weight: of the answer in the loss.
        places: as in `Sample`.
        boxes: whether lists of four numbers in its texts are boxes, in pixels of its image.
    """

    images: tuple[Any, ...]
    question: str
    target: str
    answers: tuple[str, ...]
    history: tuple[Turn, ...] = ()
    system: str = ""
    turn: int = 1
    problem: RowProblem | None = None
    weight: float = 1.0
    places: tuple[Place, ...] = ()
    boxes: bool = False


def questions_of(record: Any) -> list[Question]:
    """Cut one record into questions.

    Args:
        record: one JSON value.

    Returns:
        One question an assistant turn; a turn that cannot be used carries its problem. A list under `answers` holds
        all accepted answers of a conversation with one answer to learn.

    Raises:
        RowProblem: the whole record cannot be used.
    """
    if not isinstance(record, dict):
        raise RowProblem("not a record", f"a JSON object is needed, not {type(record).__name__}")
    record = record | {key: listed_turns(record[key]) for key in TALKS if key in record}
    refuse(record)
    questions = _cut(record)
    answers = record.get("answers")
    if "question" not in record and len(questions) == 1 and isinstance(answers, list) and answers:
        questions = [replace(questions[0], answers=reference_answers(answers))]
    return [_with_boxes(question) for question in questions] if _declares_boxes(record) else questions


def _declares_boxes(record: dict[str, Any]) -> bool:
    """Whether a record says that its texts hold boxes; a key of this name that is no word is metadata.

    Raises:
        RowProblem: it says so in a word that is not known.
    """
    value = record.get("boxes")
    if isinstance(value, str) and value.strip() and value != ABSOLUTE:
        raise RowProblem(
            "boxes are not absolute", f'"boxes" is {quoted(value)}; known is "{ABSOLUTE}": pixels of the original image'
        )
    return value == ABSOLUTE


def _with_boxes(question: Question) -> Question:
    if question.problem or len(question.images) == 1:
        return replace(question, boxes=True)
    shown = f'"boxes" is declared, and it shows {len(question.images)} images: boxes are those of one'
    return replace(question, problem=RowProblem("boxes without one image", shown))


def _cut(record: dict[str, Any]) -> list[Question]:
    """The questions of a record by its format, before its other accepted answers are read."""
    for key in TALKS:
        if key in record:
            return _conversation(_messages(record[key], key, not _has_image_parts(record[key])), _image_list(record))
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        messages = (
            [text_message("user", prompt)]
            if isinstance(prompt, str)
            else _messages(prompt, "prompt", not _has_image_parts(prompt))
        )
        for message in messages:
            message.weight = 0  # the completion alone is learned
        messages += (
            _messages(completion, "completion")
            if isinstance(completion, list)
            else [Message("assistant", clean_text(completion, "answer"))]
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
    history = _history(record)
    question, places = plain_question(clean_text(record["question"], "question"), len(images), history)
    clean_text(question, "question")
    listed = record.get("answers")
    if listed is None:
        listed = record.get("answer")
    answers = reference_answers(listed)
    target = clean_text(record["answer"], "answer") if isinstance(record.get("answer"), (str, int, float)) else ""
    system = clean_text(record["system"], "system text") if record.get("system") else ""
    return Question(tuple(images), question, target or most_common(answers), answers, history, system, places=places)


def _history(record: dict[str, Any]) -> tuple[Turn, ...]:
    """The earlier turns of a plain record: messages of text, as in `Sample.history`."""
    if not record.get("history"):
        return ()
    turns = []
    for message in _messages(record["history"], "history", marked=False):
        if message.images or message.role == "system":
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


def _has_image_parts(messages: Any) -> bool:
    """Whether a conversation places its images by parts of the type image: then its texts hold no marks."""
    contents = (
        [item.get("content", item.get("value")) for item in messages if isinstance(item, dict)]
        if isinstance(messages, list)
        else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in parts)


def _messages(value: Any, key: str, marked: bool = True) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowProblem("missing key", f"{key} must be a list with at least one message")
    return [_message(item, f"{key}[{position}]", marked) for position, item in enumerate(value)]


def _message(item: Any, where: str, marked: bool) -> Message:
    if not isinstance(item, dict):
        raise RowProblem("not a message", f"{where} must be an object with a role and a content")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise RowProblem("unknown role", f"{where} has the role {quoted(role)}; known are {known}")
    weight = 0.0 if item.get("loss") is False else loss_weight(item, where)
    if content is None or isinstance(content, str):
        message = text_message(ROLES[role], content or "", marked)
        message.weight = weight
        return message
    if not isinstance(content, list):
        raise RowProblem("not a message", f"{where} has a content that is neither text nor a list of parts")
    message = Message(ROLES[role], "", weight=weight)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            message.add_marked(part["text"]) if marked and message.role == "user" else message.add_text(part["text"])
        elif kind in IMAGE_PARTS:
            inline = next((part[name] for name in IMAGE_PARTS if part.get(name)), None)
            if inline is None:
                inline = part if any(part.get(name) for name in ("bytes", "path", "url")) else LISTED
            message.add_image(inline)
        else:
            raise _unknown_part(where, part)
    return message.ended()


def _unknown_part(where: str, part: Any) -> RowProblem:
    """Why a part of a content cannot be read."""
    if not isinstance(part, dict):
        return RowProblem("unknown part", f"{where} has a part that is not an object: {quoted(part)}")
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


def _conversation(messages: list[Message], listed: list[Any]) -> list[Question]:
    """One question an assistant turn, with the turns before it as history and the images shown so far."""
    marks = sum(message.marks for message in messages)
    refuse_more_marks(marks, len(listed))
    # Those that no mark places come before everything.
    seen = [(image, Place(0, 0)) for image in listed[: len(listed) - marks]]
    waiting = iter(listed[len(listed) - marks :])
    system, asked = "", Message("user", "")
    history: list[Turn] = []
    found: list[Question] = []
    number = 0
    for message in messages:
        message.images = [next(waiting) if image is LISTED else image for image in message.images]
        if message.role == "system":
            _refuse_image(message, "a system text")
            system = f"{system}\n{message.text}".strip()
        elif message.role == "user":
            asked.add(message)
        else:
            number += 1
            shown = [*seen, *_placed(asked, len(history))]
            if message.weight:
                turn = _turn(shown, asked.text, message, tuple(history), system, number)
                found.append(replace(turn, weight=message.weight))
            seen = [*shown, *_placed(message, len(history) + 1)]
            history += [Turn("user", asked.text), Turn("assistant", message.text)]
            asked = Message("user", "")
    if not found:
        raise RowProblem("missing answer", "the conversation has no turn of the assistant that is to be learned")
    return found


def _placed(message: Message, turn: int) -> list[tuple[Any, Place]]:
    return [(image, Place(turn, at)) for image, at in zip(message.images, message.at, strict=True)]


def _refuse_image(message: Message, where: str) -> None:
    if message.images:
        raise RowProblem(f"image in {where}", f"an image stands in {where}; only turns before an answer hold images")


def _turn(
    shown: list[tuple[Any, Place]], question: str, answer: Message, history: tuple[Turn, ...], system: str, number: int
) -> Question:
    problem, target = None, answer.text
    try:
        for text in (system, *(turn.text for turn in history)):
            if text:
                clean_text(text, "history")
        clean_text(question, "question")
        target = clean_text(target, "answer")
        _refuse_image(answer, "an answer")
    except RowProblem as found:
        problem = found
    images, places = [image for image, _ in shown], unusual([place for _, place in shown], 0)
    return Question(tuple(images), question, target, (target,), history, system, number, problem, places=places)
