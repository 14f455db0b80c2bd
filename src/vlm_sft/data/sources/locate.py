"""Finds an image as a record writes it: a path, a data URI, bytes. Imports data.sample, data.images and rows."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.data.images import MAX_FILE_BYTES
from vlm_sft.data.sample import ImageRef
from vlm_sft.data.sources.rows import RowProblem

URL_FIX = "they are fetched by vlm-sft data import FILE --format FORMAT --allow_image_urls --output FOLDER"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The encoded bytes of one image inside of a table, read when they are needed.

    Attributes:
        source: which file, row and column, for messages; unique.
        load: returns the bytes; it may raise OSError.
    """

    source: str
    load: Callable[[], bytes] = field(repr=False, compare=False)


def is_url(image: Any) -> bool:
    """Whether an image of a record is to be fetched from the web."""
    return isinstance(image, str) and image.lower().startswith(("http://", "https://"))


def image_text(image: Any) -> Any:
    """The path, URI or URL in an image that is written as an object; anything else as it is."""
    if isinstance(image, dict) and not image.get("bytes"):
        return next((image[key] for key in ("path", "url", "image") if isinstance(image.get(key), str)), None)
    return image


def locate_image(folder: Path, image: Any) -> ImageRef:
    """Find one image of a record; it is read once for its key.

    Args:
        folder: what paths are relative to; its subfolder "images" is searched too.
        image: a path, a data URI, `{"bytes": base64}`, `{"path" or "url": text}`, or a `StoredImage`.

    Raises:
        RowProblem: there is no such image, it cannot be read, or it is a URL.
    """
    if isinstance(image, StoredImage):
        try:
            return ImageRef(ImageRef.from_bytes(image.load(), "").key, image.source, image.load)
        except OSError as error:
            raise RowProblem("image missing", f"{image.source}: {error}") from error
    if isinstance(image, dict) and isinstance(image.get("bytes"), str):
        return ImageRef.from_bytes(_base64(image["bytes"]), "base64 bytes")
    image = image_text(image)
    if not isinstance(image, str) or not image.strip():
        raise RowProblem("image missing", "an image is neither a path, nor a data URI, nor {\"bytes\": base64}")
    if is_url(image):
        raise RowProblem("image is a URL", f"{image[:200]} is not fetched; {URL_FIX}")
    if image.startswith("data:"):
        header, _, body = image.partition(",")
        if not header.endswith(";base64"):
            raise RowProblem("image cannot be read", "a data URI must be base64")
        return ImageRef.from_bytes(_base64(body), "data URI")
    return _file(folder, image)


def _file(folder: Path, image: str) -> ImageRef:
    path = Path(image.removeprefix("file://"))
    candidates = [path] if path.is_absolute() else [folder / path, folder / "images" / path]
    try:
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise RowProblem("image missing", f"there is no file {' nor '.join(map(str, candidates))}")
        if (size := found.stat().st_size) > MAX_FILE_BYTES:
            raise RowProblem("image cannot be read", f"{found} has {size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
        return ImageRef.from_path(found)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise RowProblem("image missing", f"{image[:200]!r} cannot be opened: {error}") from error


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowProblem("image cannot be read", f"the bytes are not base64: {error}") from error
