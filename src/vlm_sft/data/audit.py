"""Checks and counts of loaded samples, and the limit on what may be left out."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vlm_sft.common.errors import QUOTED_CHARACTERS, DataError, ModelError, bounded
from vlm_sft.common.formats import plural
from vlm_sft.data.duplicates import Repeat
from vlm_sft.data.images import check_image
from vlm_sft.data.plain_text import reads_like_control
from vlm_sft.data.sample import (
    OUTSIDE,
    OVERSIZED,
    UNPROCESSABLE,
    ImageRef,
    LeftOut,
    Sample,
    questions_per_image,
    text_rows,
)
from vlm_sft.data.threads import map_images

MAX_LEFT_OUT_FRACTION = 0.01
HISTOGRAM_BINS = 24
CHECK_ALL = "vlm-sft data check DATASET --split all --base_model MODEL"
OUTSIDE_NOTE = "the image lies outside the data's folder (absolute path or link); exports and reports copy it"
PLACED_NOTE = "an image follows words; only questions with the same words before it share it"
CONTROL_NOTE = "a text holds the name of a control token, such as <image>; it is read as plain text"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Counts of one loaded data set or mixture; `to_json` is the schema of data.json.

    Attributes:
        samples: usable questions.
        images: different images among them.
        text_rows: questions without an image.
        questions_per_image: how many images have k questions, by k.
        datasets, splits: questions by data set, and by "dataset/part" where a set has parts.
        answer_characters: minimum, median and maximum length of the targets, in characters.
        answer_words: how many targets have n words, by n; 10 stands for ten and more.
        image_pixels: minimum, median and maximum of width x height; empty while no size is known.
        left_out: samples left out, by reason.
        loaded: all samples that were loaded, used or not; more than both together where a limit was drawn.
        tokens: counts of the encoder (supervised, image, text); empty where nothing was encoded.
        repeats: questions that come again on the same image, by kind: "duplicate" or "contradiction".
        notes: questions that are used otherwise than one might think, by what is done; see `notes_of`.
    """

    samples: int
    images: int
    text_rows: int
    questions_per_image: dict[int, int]
    datasets: dict[str, int]
    splits: dict[str, int]
    answer_characters: dict[str, float]
    answer_words: dict[int, int]
    image_pixels: dict[str, float]
    left_out: dict[str, int]
    loaded: int
    tokens: dict[str, int] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def left_out_fraction(self) -> float:
        """Share of the loaded samples that was left out, 0 to 1."""
        return sum(self.left_out.values()) / self.loaded if self.loaded else 0.0

    @property
    def mean_questions_per_image(self) -> float:
        """k: in how many questions an image is shown."""
        shown = sum(k * images for k, images in self.questions_per_image.items())
        return shown / self.images if self.images else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = dataclasses.asdict(self)
        values["mean_questions_per_image"] = round(self.mean_questions_per_image, 3)
        values["left_out_fraction"] = round(self.left_out_fraction, 6)
        return values


def audit(
    samples: Sequence[Sample],
    left_out: Sequence[LeftOut] = (),
    loaded: int | None = None,
    tokens: dict[str, int] | None = None,
    repeats: Sequence[Repeat] = (),
    holds_control: Callable[[Sample], bool] = reads_like_control,
) -> AuditReport:
    """Count what a list of samples holds; images are not opened (see `check_images`).

    Args:
        samples: the usable samples.
        left_out: those left out.
        loaded: how many were loaded before a limit was drawn; None where there was no limit.
        tokens: counts of the encoder to store along, by kind.
        repeats: the questions among the samples that come again.
        holds_control: as in `notes_of`.
    """
    refs = {image.key: image for sample in samples for image in sample.images}
    parts = Counter(f"{sample.dataset}/{sample.split}" for sample in samples if sample.split)
    return AuditReport(
        samples=len(samples),
        images=len(refs),
        text_rows=text_rows(samples),
        questions_per_image=questions_per_image(samples),
        datasets=dict(Counter(sample.dataset for sample in samples)),
        splits=dict(sorted(parts.items())),
        answer_characters=_spread([len(sample.target) for sample in samples]),
        answer_words=dict(sorted(Counter(min(10, len(sample.target.split())) for sample in samples).items())),
        image_pixels=_spread([ref.width * ref.height for ref in refs.values() if ref.width]),
        left_out=dict(Counter(item.reason for item in left_out).most_common()),
        loaded=len(samples) + len(left_out) if loaded is None else loaded,
        tokens=tokens or {},
        repeats=dict(Counter(repeat.kind for repeat in repeats)),
        notes=notes_of(samples, holds_control),
    )


def notes_of(samples: Iterable[Sample], holds_control: Callable[[Sample], bool] = reads_like_control) -> dict[str, int]:
    """Count what is used otherwise than its record might mean: questions, by what is done.

    Args:
        samples: the usable samples.
        holds_control: tells whether a text holds the string of a control token; by default of any known family.
    """
    found: Counter[str] = Counter()
    for sample in samples:
        found.update([OUTSIDE_NOTE] if OUTSIDE in sample.metadata else [])
        found.update([PLACED_NOTE] if sample.places else [])
        found.update([CONTROL_NOTE] if holds_control(sample) else [])
    return dict(found)


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """The counts of `notes_of` in words."""
    return [f"note: {note}: {count:,} questions" for note, count in notes.items()]


def _spread(values: list[int]) -> dict[str, float]:
    return {"minimum": min(values), "median": median(values), "maximum": max(values)} if values else {}


def histogram(values: Sequence[int], bins: int = HISTOGRAM_BINS) -> dict[str, list[int]]:
    """Count how values are spread, in bins of one whole width.

    Args:
        values: whole numbers; none give an empty histogram.
        bins: at most so many.

    Returns:
        `edges` and `counts`: `counts[i]` values lie from `edges[i]` up to, not including, `edges[i + 1]`.
    """
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // bins)
    counts = Counter((value - low) // width for value in values)
    last = (high - low) // width
    return {
        "edges": [low + width * place for place in range(last + 2)],
        "counts": [counts[place] for place in range(last + 1)],
    }


def check_images(samples: Sequence[Sample]) -> tuple[list[Sample], list[LeftOut]]:
    """Fully decode every different image once, in threads, with a progress bar.

    Args:
        samples: samples; images whose size is known were decoded before and are not decoded again.

    Returns:
        The samples whose images are all sound, now with the images' sizes, and the others.
    """
    refs = {image.key: image for sample in samples for image in sample.images}
    results = dict(zip(refs, map_images(_check, refs.values(), len(refs), "checking images"), strict=True))
    sound: list[Sample] = []
    left: list[LeftOut] = []
    for sample in samples:
        found = [results[image.key] for image in sample.images]
        refused = next((item for item in found if isinstance(item, DataError)), None)
        if refused is None:
            images = tuple(item for item in found if isinstance(item, ImageRef))
            sound.append(dataclasses.replace(sample, images=images))
        else:
            left.append(LeftOut.because(sample.id, refused))
    return sound, left


def _check(ref: ImageRef) -> ImageRef | DataError:
    try:
        return check_image(ref)
    except DataError as error:
        return error


def refuse_if_all_fail(left_out: Sequence[LeftOut], samples: Sequence[Sample]) -> None:
    """Where a processor fails on every image, no single image is to blame.

    Args:
        left_out: the samples left out.
        samples: all of them.

    Raises:
        ModelError: there are several images, and the processor failed on all of them.
    """
    failed = [item for item in left_out if item.reason == UNPROCESSABLE]
    images = len({sample.image_key for sample in samples})
    if images > 1 and len(failed) == len(samples):
        raise ModelError(
            f"the processor of the model fails on every one of the {images:,} images; the first: {failed[0].detail}",
            "either all images are of a kind that it does not take, or its settings are wrong: "
            "preprocessor_config.json, --max_pixels, --min_pixels",
        )


def left_out_line(left_out: Sequence[LeftOut]) -> str:
    """How many samples are left out and why, with the first of each class."""
    firsts = {item.reason: item for item in reversed(left_out)}
    counts = Counter(item.reason for item in left_out).most_common()
    parts = [
        f"{reason}: {count:,}, e.g. {bounded(firsts[reason].id, QUOTED_CHARACTERS)}: {firsts[reason].detail}"
        for reason, count in counts
    ]
    return f"{plural(len(left_out), 'sample')} left out ({'; '.join(parts)})"


def enforce(
    left_out: Sequence[LeftOut],
    total: int,
    max_left_out_fraction: float = MAX_LEFT_OUT_FRACTION,
    left_out_file: str | Path | None = None,
) -> None:
    """Stop when more samples were left out than allowed.

    Args:
        left_out: the samples left out. Those that the user asked to leave out for their length do not count.
        total: all samples, used and left out.
        max_left_out_fraction: the share that is allowed, 0 to 1.
        left_out_file: the file that names them, for the message; None where there is none.

    Raises:
        DataError: with counts by reason, the first examples, the file, and the flag that allows it.
    """
    allowed = max_left_out_fraction
    if not 0 <= allowed <= 1:
        raise DataError(f"--max_left_out {allowed} is not between 0 and 1", "0.01 allows one in a hundred")
    left_out = [item for item in left_out if item.reason != OVERSIZED]
    if not left_out or len(left_out) <= allowed * total:
        return
    share = len(left_out) / total
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in Counter(i.reason for i in left_out).most_common())
    examples = "".join(f"\n    {bounded(item.id, QUOTED_CHARACTERS)}: {item.detail}" for item in left_out[:3])
    enough = min(1.0, math.ceil(share * 100) / 100)
    named = f"named in {left_out_file}" if left_out_file else f"that {CHECK_ALL} names"
    raise DataError(
        f"{len(left_out):,} of {total:,} samples ({share:.1%}) cannot be used, more than the {allowed:.1%} "
        f"allowed ({reasons}); the first:{examples}",
        f"correct the samples {named}, or allow it with --max_left_out {enough:g}",
    )
