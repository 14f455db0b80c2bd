"""The one internal sample type, and references to images."""

from __future__ import annotations

import errno
import functools
import hashlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlm_sft.common.errors import DataError, SampleError
from vlm_sft.common.formats import plural

# Classes of samples that are left out, see `LeftOut`.
UNREADABLE = "image cannot be read"
UNPROCESSABLE = "image cannot be processed"
UNPLACEABLE = "image cannot stand between words"
CONTROL_TEXT = "text cannot be told from a control token"
OVERSIZED = "longer than the limit, and oversized is leave_out"  # no mistake: it was asked for
UNSCALABLE = "longer than the limit however small its images are"
ABSOLUTE = "absolute"  # a record's value of "boxes": pixels of its image
IMAGE_MARK = "<image>"  # stands for an image in a text that people read or write
OUTSIDE = "outside"  # key of a sample's metadata: paths of its images that lie outside of the data's folder
RECORD = "record"  # key of a sample's metadata: what the user's record holds besides, for a metric
MAX_FILE_BYTES = 1024**3  # no picture within the limit of pixels is stored in more


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to one encoded image (PNG, JPEG, …) that is read only when it is needed.

    Attributes:
        key: SHA-256 hex digest of the encoded bytes. Equal keys mean one image: questions are grouped by it.
        source: where the image is, for messages: a path, or "file.parquet row 12".
        load: returns the encoded bytes; it may raise OSError.
        width, height: pixels, 0 while unknown.
    """

    key: str
    source: str
    load: Callable[[], bytes] = field(repr=False, compare=False)
    width: int = 0
    height: int = 0

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> ImageRef:
        """Reference bytes that are held in memory."""
        return cls(hashlib.sha256(data).hexdigest(), source, lambda: data)

    @classmethod
    def from_path(cls, path: str | Path) -> ImageRef:
        """Reference a file; it is read once here for its key.

        Raises:
            OSError: as of `read_file`.
        """
        read = functools.partial(read_file, Path(path))
        return cls(hashlib.sha256(read()).hexdigest(), str(path), read)


def read_file(path: Path) -> bytes:
    """The bytes of an encoded image.

    Raises:
        OSError: the file is missing or unreadable, larger than `MAX_FILE_BYTES`, or a pipe or device, whose end may
            never come.
    """
    state = path.stat()
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if state.st_size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"{state.st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}", str(path))
    return path.read_bytes()


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier turn of a conversation: role is "user" or "assistant"."""

    role: str
    text: str


class Place(NamedTuple):
    """Where an image stands: in which turn (the question is the last one), behind how many characters of its text."""

    turn: int
    at: int


PlacedTurn = tuple[str, str, tuple[int, ...]]  # role, text, and behind how many characters each of its images stands


def pieces(text: str, places: Sequence[int]) -> list[str | None]:
    """A turn in order: its texts, and None for each image; an empty text stands for a turn without words.

    Args:
        text: of the turn.
        places: behind how many characters each image stands, ascending.
    """
    found: list[str | None] = []
    start = 0
    for at in places:
        found += [text[start:at], None] if at > start else [None]
        start = max(start, at)
    return [*found, text[start:]] if text[start:] or not text else found


def placed_turns(history: Sequence[Turn], question: str, images: int, places: Sequence[Place]) -> list[PlacedTurn]:
    """A conversation up to its answer, as `PlacedTurn`; without places all images stand before the first user's words.

    Args:
        history, question, places: as in `Sample`.
        images: how many images there are.
    """
    turns = [*history, Turn("user", question)]
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    places = places or [Place(first, 0)] * images
    inside = [tuple(place.at for place in places if place.turn == number) for number in range(len(turns))]
    return [(turn.role, turn.text, at) for turn, at in zip(turns, inside, strict=True)]


def with_marks(text: str, places: Sequence[int]) -> str:
    """A turn as one text, with `<image>` where an image stands; arguments as of `pieces`."""
    return "".join(IMAGE_MARK if piece is None else piece for piece in pieces(text, places))


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, mostly about one image (or several), with the answer to learn and the answers to score against.

    Attributes:
        id: unique and stable within its data set, e.g. "chartqa/train/000017".
        dataset: name of the source, e.g. "chartqa"; it selects the benchmark metric.
        split: the part that results are reported by, e.g. "human" or "augmented"; "" when there is only one.
        images: the images in the order in which they are shown; none for a text row.
        question: the text of the user's turn, without any prompt template.
        target: the answer that is supervised, exactly as it should be generated.
        answers: every reference answer (TextVQA: ten), for the metric.
        history: earlier turns of the conversation, given as context and never supervised.
        system: system text of the conversation; "" leaves it to the prompt settings.
        metadata: small JSON values for analysis: "question_type", "answer_type", ….
        weight: of its answer's tokens in the training loss.
        places: where each image stands, ascending; empty where all stand before the first user's words.
        boxes: width and height in pixels of its only image as it is stored, where its texts hold boxes in such pixels;
            None where it declares no boxes.
    """

    id: str
    dataset: str
    split: str
    images: tuple[ImageRef, ...]
    question: str
    target: str
    answers: tuple[str, ...]
    history: tuple[Turn, ...] = ()
    system: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    weight: float = 1.0
    places: tuple[Place, ...] = ()
    boxes: tuple[int, int] | None = None

    @property
    def image_key(self) -> str:
        """Key of the images of this sample together; "" for a text row."""
        return "+".join(image.key for image in self.images)

    @property
    def subject(self) -> str:
        """What this sample is about: its images, or the text that its conversation opens with.

        Samples of one subject share an encoded prefix, are dealt to the same part of a hold-out and are one cluster
        in statistics.
        """
        if self.images:
            return self.image_key
        opening = self.history[0].text if self.history else self.question
        return "text:" + hashlib.sha256(opening.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def opening_words(self) -> str:
        """The words of the question in front of its last image that stands behind some."""
        last = self.places[-1] if self.places else None
        return self.question[: last.at] if last and last.turn == len(self.history) else ""

    @property
    def opening(self) -> tuple[Any, ...]:
        """What the conversation holds up to its last image; empty where images stand before all words."""
        if not self.places:
            return ()
        turn, at = self.places[-1]
        if turn < len(self.history):
            return (self.places, self.history[:turn], self.history[turn].text[:at], "")
        # A prompt template may set words before those of the question, and that of own data may be another one.
        return (self.places, self.history, self.opening_words, self.dataset if at else "")

    def turns(self, question: str | None = None) -> list[PlacedTurn]:
        """The conversation up to its answer.

        Args:
            question: instead of the sample's own question, with the same images in it.
        """
        asked = self.question if question is None else question
        return placed_turns(self.history, asked, len(self.images), self.places)

    @property
    def shown_turns(self) -> list[Turn]:
        """The conversation as people read it: with marks for its images where they do not all come first."""
        return [Turn(role, with_marks(text, at if self.places else ())) for role, text, at in self.turns()]

    @property
    def shown_question(self) -> str:
        """The question as people read it, see `shown_turns`."""
        return self.shown_turns[-1].text

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of this sample that a model may read or learn."""
        return (self.system, *(turn.text for turn in self.history), self.question, self.target)


def distinct_images(samples: Iterable[Sample]) -> int:
    """How many different images some samples show, by the hash of their bytes."""
    return len({image.key for sample in samples for image in sample.images})


def text_rows(samples: Iterable[Sample]) -> int:
    """How many samples show no image."""
    return sum(not sample.images for sample in samples)


def counted(samples: Sequence[Sample]) -> str:
    """Questions and images in words, with what has no image told apart: "12 questions on 4 images, 3 text rows"."""
    text = text_rows(samples)
    seen = f"{plural(len(samples) - text, 'question')} on {plural(distinct_images(samples), 'image')}"
    rows = plural(text, "text row")
    return seen if not text else f"{seen}, {rows}" if text < len(samples) else rows


def questions_per_image(samples: Iterable[Sample]) -> dict[int, int]:
    """How many different images are shown in k questions, by k."""
    shown = Counter(key for sample in samples for key in {image.key for image in sample.images})
    return dict(sorted(Counter(shown.values()).items()))


def group_by_image(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Put the questions of one image together, and text rows of one opening; in the order of their first question.

    What stands before the image (a system text, or words where the record has its images behind some) is shared too,
    so samples that differ there are not put together; other history stands behind it.
    """
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.subject, sample.system, sample.opening), []).append(sample)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that cannot be used, and why. It is counted and written to left_out.jsonl, never dropped in silence.

    Attributes:
        id: id of the sample.
        reason: a short class that is counted, e.g. "image cannot be read" or "empty answer".
        detail: the whole story: file, line, message of the reader.
    """

    id: str
    reason: str
    detail: str

    @classmethod
    def because(cls, sample_id: str, error: DataError) -> LeftOut:
        """Leave a sample out for an error; one that names no class of its own is about its image."""
        return cls(sample_id, error.reason if isinstance(error, SampleError) else UNREADABLE, error.what)
