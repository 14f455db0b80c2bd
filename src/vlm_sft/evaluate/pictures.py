"""The pictures that an evaluation keeps for its report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from vlm_sft.common import artifacts
from vlm_sft.common.console import progress, warn
from vlm_sft.common.errors import DataError
from vlm_sft.data.images import decode_rgb, encode_webp, read_bytes
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.evaluate.tasks import Task

KEPT_BYTES = 32_000_000  # of pictures a benchmark: all of ChartQA's test split, about half of TextVQA's
PICTURE_SIDE = 480  # pixels
FOLLOWED = 24  # pictures a benchmark that a training keeps of its validation questions
GAP = 4  # pixels between the images of a question


def picture_name(sample: Sample) -> str | None:
    """Where the report finds the picture of a question, relative to the evaluation folder; None without images."""
    if not sample.images:
        return None
    key = sample.image_key if len(sample.images) == 1 else hashlib.sha256(sample.image_key.encode()).hexdigest()
    return f"images/{key[:24]}.webp"


def save_pictures(tasks: Sequence[Task], folder: Path) -> None:
    """Save scaled-down copies of the images of every benchmark for the report, each different picture once.

    The order is that of a hash of the questions' ids, which favours no part of a benchmark. What has no picture in the
    end, for lack of room or because its image cannot be read any more, is counted or named in pictures.json.

    Args:
        tasks: the questions that were answered.
        folder: of the evaluation; "images" and pictures.json are made in it.

    Raises:
        OSError: they cannot be written.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names: set[str] = set()
    failed: dict[str, str] = {}
    over_limit = 0
    for task in tasks:
        first = {name: sample.images for sample in _by_hash(task.samples) if (name := picture_name(sample))}
        fresh = {name: images for name, images in first.items() if name not in names}
        names |= fresh.keys()
        left = KEPT_BYTES
        with progress(len(fresh), f"{task.name}: pictures for the report", "images") as bar:
            for name, images in fresh.items():
                path = folder / name
                bar.advance()
                if left <= 0:
                    over_limit += 1
                    continue
                try:
                    if not path.is_file():
                        partial = path.with_suffix(".tmp")
                        partial.write_bytes(scaled_picture(images))
                        partial.replace(path)
                    left -= path.stat().st_size
                except DataError as error:
                    failed[name] = error.what
    if failed:
        warn(f"{len(failed):,} picture(s) cannot be saved for the report; the first: {next(iter(failed.values()))}")
    artifacts.write_json(
        folder / artifacts.PICTURES,
        {
            "schema": 1,
            "limit_bytes": KEPT_BYTES,
            "kept": len(names) - over_limit - len(failed),
            "over_limit": over_limit,
            "failed": failed,
        },
    )


def save_some(tasks: Sequence[Task], folder: Path) -> None:
    """Save pictures of a few questions of every benchmark for a page that follows a training, those of `_by_hash`.

    Args:
        tasks: the questions that are answered during the training.
        folder: "images" is made in it; what is there already is kept. A picture that cannot be saved is left out: the
            page says so, and the training needs none.
    """
    for task in tasks:
        first = {name: sample.images for sample in _by_hash(task.samples) if (name := picture_name(sample))}
        for name in list(first)[:FOLLOWED]:
            with suppress(DataError, OSError):
                if not (folder / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(scaled_picture(first[name]))


def scaled_picture(images: Sequence[ImageRef]) -> bytes:
    """What the report shows of a question's images: WebP, at most `PICTURE_SIDE` pixels wide and high.

    Args:
        images: one at least; several stand beside each other in their order, in rows.

    Raises:
        DataError: an image cannot be read or decoded.
    """
    columns = math.ceil(math.sqrt(len(images)))
    side = (PICTURE_SIDE - GAP * (columns - 1)) // columns
    parts = []
    for image in images:
        part = decode_rgb(read_bytes(image), image.source)
        part.thumbnail((max(1, side), max(1, side)))
        parts.append(part)
    return encode_webp(_in_rows(parts, columns), quality=85)


def _in_rows(parts: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows on white; a single one stays as it is."""
    if len(parts) == 1:
        return parts[0]
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    heights = [max(part.height for part in row) for row in rows]
    width = max(sum(part.width for part in row) + GAP * (len(row) - 1) for row in rows)
    whole = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for part in row:
            whole.paste(part, (left, top))
            left += part.width + GAP
        top += height + GAP
    return whole


def _by_hash(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda one: hashlib.sha256(one.id.encode("utf-8", "surrogatepass")).digest())
