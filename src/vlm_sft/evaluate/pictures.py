"""The pictures that an evaluation keeps for its report. Imports data, artifacts and console."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vlm_sft import artifacts
from vlm_sft.console import progress, warn
from vlm_sft.data.images import decode_rgb, encode_webp, read_bytes
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.errors import DataError
from vlm_sft.evaluate.tasks import Task

KEPT_BYTES = 32_000_000  # of pictures a benchmark: all of ChartQA's test split, about half of TextVQA's
PICTURE_SIDE = 480  # pixels


def picture_name(image: ImageRef) -> str:
    """Where the report finds the picture of a prediction, relative to the evaluation folder."""
    return f"images/{image.key[:24]}.webp"


def save_pictures(tasks: Sequence[Task], folder: Path) -> None:
    """Save scaled-down copies of the images of every benchmark for the report, each different image once.

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
        first = {picture_name(sample.images[0]): sample.images[0] for sample in _by_hash(task.samples)}
        fresh = {name: image for name, image in first.items() if name not in names}
        names |= fresh.keys()
        left = KEPT_BYTES
        with progress(len(fresh), f"{task.name}: pictures for the report", "images") as bar:
            for name, image in fresh.items():
                path = folder / name
                bar.advance()
                if left <= 0:
                    over_limit += 1
                    continue
                try:
                    if not path.is_file():
                        partial = path.with_suffix(".tmp")
                        partial.write_bytes(scaled_picture(image))
                        partial.replace(path)
                    left -= path.stat().st_size
                except DataError as error:
                    failed[name] = error.what
    if failed:
        warn(f"{len(failed):,} picture(s) cannot be saved for the report; the first: {next(iter(failed.values()))}")
    artifacts.write_json(
        folder / artifacts.PICTURES,
        {
            "schema": 1, "limit_bytes": KEPT_BYTES, "kept": len(names) - over_limit - len(failed),
            "over_limit": over_limit, "failed": failed,
        },
    )  # fmt: skip


def scaled_picture(image: ImageRef) -> bytes:
    """The copy of an image that the report shows: WebP, at most `PICTURE_SIDE` pixels wide and high.

    Raises:
        DataError: the image cannot be read or decoded.
    """
    picture = decode_rgb(read_bytes(image), image.source)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return encode_webp(picture, quality=85)


def _by_hash(samples: Sequence[Sample]) -> list[Sample]:
    with_images = [sample for sample in samples if sample.images]
    return sorted(with_images, key=lambda one: hashlib.sha256(one.id.encode("utf-8", "surrogatepass")).digest())
