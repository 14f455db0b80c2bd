"""What a record may hold that a question about images cannot say, in the words of every trainer.

Every reader of records asks here: own data in all its formats, parquet, and the imports. A key that is there and empty
(`"videos": []`) says nothing; keys that are not named here are metadata and stay out of the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_sft.common.errors import quoted
from vlm_sft.data.sources.locate import video_problem
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.video import PARTS

VIDEOS = ("videos", "video")
UNLEARNABLE = (*VIDEOS, "audios", "audio", "tools", "objects")
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag")
IN_MESSAGES = ("tool_calls", "function_call", "audio")
CONVERSATION = ("messages", "conversations", "prompt", "completion")
NOT_FINAL = ("analysis", "commentary")  # channels of a message that are not the answer
MEDIA_MARK = re.compile(r"<(?:video|audio|bbox|ref-object|cot-process)>|<img>(?=[^<]*</img>)")
PLACE_MARK = re.compile(r"<(?:bbox|ref-object|cot-process)>")  # an answer may speak of <video>, never of these
USER_TEXTS = ("question", "query", "instruction", "input", "prompt")
ANSWER_TEXTS = ("answer", "response", "output", "completion")
ASSISTANT = ("assistant", "gpt", "model")


def refuse(record: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> None:
    """Name what a question about images cannot hold.

    Args:
        record: one record as it was read.
        columns: what our names of keys are called in it, where that was said.

    Raises:
        RowProblem: the record holds such a thing.
    """
    named = columns or {}
    for ours in (*UNLEARNABLE, *PREFERENCE):
        for key in dict.fromkeys((ours, named.get(ours, ours))):
            value = record.get(key)
            if not _says_nothing(value) and (value is not False or ours in PREFERENCE):
                if ours in VIDEOS:
                    raise video_problem(key)
                raise _preference(key) if ours in PREFERENCE else _unlearnable(key)
    talks = [named.get(key, key) for key in CONVERSATION]
    if isinstance(record.get("label"), bool) and any(key in record for key in talks):
        raise _preference("label")
    for key in dict.fromkeys((*talks, "history")):
        for message in record[key] if isinstance(record.get(key), list) else ():
            if isinstance(message, dict):
                _refuse_message(message)
            elif isinstance(message, list):  # a history in pairs
                _refuse_marks(str(message[0]) if message else "", MEDIA_MARK)
    for keys, marks in ((USER_TEXTS, MEDIA_MARK), (ANSWER_TEXTS, PLACE_MARK)):
        for key in keys:
            _refuse_marks(record.get(named.get(key, key)), marks)


def _refuse_message(message: Mapping[str, Any]) -> None:
    for key in IN_MESSAGES:
        if not _says_nothing(message.get(key)):
            raise _unlearnable(key)
    if message.get("channel") in NOT_FINAL:
        what = f"a message of the channel {quoted(message['channel'])} is no answer; keep the final one only"
        raise RowProblem("record with channel", what)
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [content]
    role = message.get("role", message.get("from"))
    for part in parts:
        if isinstance(part, dict) and part.get("type") in PARTS:
            raise video_problem(f"a part of the type {part['type']}")
        text = part.get("text") if isinstance(part, dict) else part
        _refuse_marks(text, PLACE_MARK if role in ASSISTANT else MEDIA_MARK)


def _refuse_marks(text: Any, marks: re.Pattern[str]) -> None:
    found = marks.search(text) if isinstance(text, str) else None
    if found and found.group() == "<video>":
        raise video_problem(found.group())
    if found:
        raise RowProblem("unknown mark", f"{found.group()} cannot be read; images are marked <image>")


def _unlearnable(key: str) -> RowProblem:
    return RowProblem(f"record with {key}", f"{key} cannot be learned here: questions about images only")


def _preference(key: str) -> RowProblem:
    return RowProblem("preference record", f"{key}: records of preferences are not questions with answers")


def _says_nothing(value: Any) -> bool:
    """Whether a value is empty all through, as tables fill the cells of rows that do not have a column."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(map(_says_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_says_nothing, value))
    return value is None
