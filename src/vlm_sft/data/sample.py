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
from typing import Any

from vlm_sft.common.errors import DataError, SampleError
from vlm_sft.common.formats import plural

# Classes of samples that are left out, see `LeftOut`.
UNREADABLE = "image cannot be read"
UNPROCESSABLE = "image cannot be processed"
CONTROL_TEXT = "text cannot be told from a control token"
NOTE = "note"  # key of a sample's metadata: what is not exactly as its record has it
OUTSIDE = "outside"  # key of a sample's metadata: paths of its images that lie outside of the data's folder
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


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, mostly about one image (or several), with the answer to learn and the answers to score against.

    Attributes:
        id: unique and stable within its data set, e.g. "chartqa/train/000017".
        dataset: name of the source, e.g. "chartqa"; it selects the benchmark metric.
        split: the part that results are reported by, e.g. "human" or "augmented"; "" when there is only one.
        images: the images in the order in which they precede the question; none for a text row.
        question: the text of the user's turn, without any prompt template.
        target: the answer that is supervised, exactly as it should be generated.
        answers: every reference answer (TextVQA: ten), for the metric.
        history: earlier turns of the conversation, given as context and never supervised.
        system: system text of the conversation; "" leaves it to the prompt settings.
        metadata: small JSON values for analysis: "question_type", "answer_type", ….
        weight: of its answer's tokens in the training loss.
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

    A system text stands before the image, so samples with different ones are not put together; a conversation's
    history stands behind it.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.subject, sample.system), []).append(sample)
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
