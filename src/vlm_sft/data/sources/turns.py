"""One turn of a record while it is read: its words, and its images where they stand between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_sft.data.sample import IMAGE_MARK, Place, Turn
from vlm_sft.data.sources.rows import RowProblem

LISTED = object()  # an image of a turn: the next one of the record's own list
_LEADING_MARK = re.compile(rf"\s*{IMAGE_MARK}")
_LONE_MARK = re.compile(rf"^[^\S\n]*{IMAGE_MARK}[^\S\n]*$", re.MULTILINE)


@dataclass(slots=True)
class Message:
    """A turn of a conversation.

    Words next to an image stay as they are, blanks included; blanks around the whole turn, and between its first
    images and its first word, are dropped.

    Attributes:
        role: "user", "assistant" or "system".
        text: its words.
        images: in order, as written in the record; `LISTED` for one of its own list.
        at: behind how many characters of the text each image stands.
        weight: of an answer in the loss; 0 for one that is context only.
    """

    role: str
    text: str = ""
    images: list[Any] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    weight: float = 1.0

    @property
    def marks(self) -> int:
        """How many images of the record's own list this turn places."""
        return sum(image is LISTED for image in self.images)

    def add_image(self, image: Any) -> None:
        """Put an image behind what is there."""
        self.images.append(image)
        self.at.append(len(self.text))

    def add_text(self, text: str) -> None:
        """Put words behind what is there; behind other words they begin a line."""
        kept = self.at[-1] if self.at else 0  # the words behind the last image follow
        tail = self.text[kept:].rstrip()
        if not self.text:
            self.text = text.lstrip()
        elif kept == len(self.text) or not tail:
            self.text += text
        elif text.strip():
            self.text = f"{self.text[:kept]}{tail}\n{text.lstrip()}"

    def add_marked(self, text: str) -> None:
        """Put words behind what is there, and an image of the record's list where `<image>` stands in them."""
        first, *others = text.split(IMAGE_MARK)
        self.add_text(first)
        for word in others:
            self.add_image(LISTED)
            self.add_text(word)

    def add(self, other: Message) -> None:
        """Put another turn of the same role behind this one, a line below where both have words."""
        self.text += "\n" if other.text and self.text else ""
        self.at += [len(self.text) + at for at in other.at]
        self.images += other.images
        self.text += other.text

    def ended(self) -> Message:
        """Drop the blanks behind the last word or image."""
        kept = self.at[-1] if self.at else 0
        self.text = self.text[:kept] + self.text[kept:].rstrip()
        return self


def text_message(role: str, text: str, marked: bool = True) -> Message:
    """A message of text; only a user places images, so in other texts `<image>` is a word like any other."""
    message = Message(role)
    if role == "user" and marked:
        message.add_marked(text)
    else:
        message.add_text(text)
    return message.ended()


def plain_question(text: str, images: int, history: Sequence[Turn] = ()) -> tuple[str, tuple[Place, ...]]:
    """The question of a plain record, without marks, and where its images stand, as in `Sample.places`.

    Beside one image, `<image>` between words is a word like any other; before all words, or alone in a line, it is a
    mark. Beside several images each one is a mark. Images without a mark stand before all words.

    Args:
        text: as written.
        images: how many images the record has.
        history: the turns before the question.

    Raises:
        RowProblem: `<image>` stands there more often than there are images.
    """
    refuse_more_marks(text.count(IMAGE_MARK), images)
    is_mark = images != 1 or _LEADING_MARK.match(text) or _LONE_MARK.search(text)
    message = text_message("user", text, marked=bool(is_mark))
    first = next((number for number, turn in enumerate(history) if turn.role == "user"), len(history))
    before = [Place(first, 0)] * (images - message.marks)
    return message.text, unusual([*before, *(Place(len(history), at) for at in message.at)], first)


def unusual(places: Sequence[Place], first: int) -> tuple[Place, ...]:
    """Places as in `Sample`: none where every image stands before the words of the first user's turn."""
    return () if all(place == (first, 0) for place in places) else tuple(places)


def refuse_more_marks(marks: int, images: int) -> None:
    """Refuse a record with more marks than images.

    Raises:
        RowProblem: it has.
    """
    if marks > images:
        raise RowProblem("more placeholders than images", f"{IMAGE_MARK} {marks} times, {images} images")


def listed_turns(value: Any) -> Any:
    """A conversation as a list of messages, however its data set stores it; what is none is returned as it is.

    `{"user": …, "assistant": …}` is a question with its answer, as in the `texts` of FineVision and of
    https://huggingface.co/datasets/HuggingFaceM4/the_cauldron; a mapping of equally long lists is what `datasets` makes
    of a `Sequence` of mappings.
    """
    if isinstance(value, Mapping) and value and all(isinstance(cells, list) for cells in value.values()):
        if len({len(cells) for cells in value.values()}) == 1:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        return value
    return [turn for item in value for turn in (_pair(item) or [item])]


def _pair(item: Any) -> list[dict[str, Any]]:
    """The two messages of a question with its answer; empty for anything else."""
    if not isinstance(item, Mapping) or not {"user", "assistant"} <= item.keys() or {"role", "from"} & item.keys():
        return []
    return [
        {"role": role, "content": item[role]} for role in ("system", "user", "assistant") if item.get(role) is not None
    ]
