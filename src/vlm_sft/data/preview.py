"""The HTML page of a data check: pictures, questions, counts."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from PIL import Image

from vlm_sft.data.audit import AuditReport
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.sample import ImageRef, LeftOut, Sample

THUMBNAIL_PIXELS = 320  # longest side
SHOWN = 24
SHOWN_LEFT_OUT = 20


def render_preview(
    title: str,
    descriptions: Sequence[str],
    samples: Sequence[Sample],
    left_out: Sequence[LeftOut],
    report: AuditReport,
    seed: int = 0,
) -> str:
    """Render the preview as one self-contained HTML page; every text of the data is escaped.

    Args:
        title: the dataset argument.
        descriptions: one line a loaded split.
        samples: checked samples.
        left_out: those left out; the first of them are shown.
        report: their counts.
        seed: of the choice of samples.

    Returns:
        The page; thumbnails are embedded as JPEG data URIs of at most `THUMBNAIL_PIXELS` a side.
    """
    from jinja2 import Environment, StrictUndefined

    page = files("vlm_sft.data").joinpath("preview.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(page)
    questions = _questions_per_image(samples)
    by_k = report.questions_per_image
    most = max(by_k.values(), default=1)
    return template.render(
        title=title,
        descriptions=descriptions,
        counts=count_rows(report),
        histogram=[(k, f"{images:,}", round(images / most, 4)) for k, images in by_k.items()],
        left_out=list(left_out)[:SHOWN_LEFT_OUT],
        more_left_out=max(0, len(left_out) - SHOWN_LEFT_OUT),
        cards=[_card(sample, questions[sample.subject]) for sample in choose(samples, SHOWN, seed)],
    )


def count_rows(report: AuditReport) -> list[tuple[str, str]]:
    """The counts as name and value, for the page and for the terminal."""
    rows = [
        ("questions", f"{report.samples:,}"),
        ("images", f"{report.images:,}"),
        *([("text rows, without an image", f"{report.text_rows:,}")] if report.text_rows else []),
        ("questions per image, mean", f"{report.mean_questions_per_image:.2f}"),
    ]
    rows += [(f"questions in {part}", f"{count:,}") for part, count in (report.splits or report.datasets).items()]
    if report.answer_characters:
        spread = report.answer_characters
        rows.append(
            (
                "answer length in characters",
                f"{spread['minimum']:g} to {spread['maximum']:g}, median {spread['median']:g}",
            )
        )
    if report.image_pixels:
        spread = report.image_pixels
        rows.append(
            (
                "image size in pixels",
                f"{spread['minimum']:,g} to {spread['maximum']:,.0f}, median {spread['median']:,.0f}",
            )
        )
    rows += [(f"{kind} tokens", f"{count:,}") for kind, count in report.tokens.items()]
    names = {"duplicate": "asked again, same answer", "contradiction": "asked again, another answer"}
    rows += [(names[kind], f"{count:,}") for kind, count in report.repeats.items()]
    rows += [(f"note: {note}", f"{count:,}") for note, count in report.notes.items()]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in report.left_out.items()]
    return rows + [("left out, share", f"{report.left_out_fraction:.2%}")]


def choose(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw samples in turn from every combination of data set, part and number of questions per image.

    Args:
        samples: to choose from.
        count: how many at most.
        seed: of the draw.
    """
    questions = _questions_per_image(samples)
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        k = min(4, questions[sample.subject])  # four and more look alike
        groups.setdefault((sample.dataset, sample.split, k), []).append(sample)
    generator = random.Random(seed)
    queues = [groups[key] for key in sorted(groups)]
    for queue in queues:
        generator.shuffle(queue)
    chosen: list[Sample] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:count]


def _questions_per_image(samples: Sequence[Sample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.subject] = counts.get(sample.subject, 0) + 1
    return counts


def _card(sample: Sample, questions: int) -> dict[str, Any]:
    part = " / ".join(text for text in (sample.dataset, sample.split, sample.metadata.get("question_type")) if text)
    return {
        "id": sample.id,
        "pictures": [thumbnail(image) for image in sample.images],
        "history": sample.shown_turns[:-1],
        "question": sample.shown_question,
        "target": sample.target,
        "answers": " | ".join(sample.answers),
        "part": part,
        "k": questions,
    }


def thumbnail(ref: ImageRef) -> str:
    """A JPEG data URI of the image, at most `THUMBNAIL_PIXELS` a side.

    Raises:
        DataError: the image cannot be decoded.
    """
    picture = decode_rgb(ref.load(), ref.source)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
