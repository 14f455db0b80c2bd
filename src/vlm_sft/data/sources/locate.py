"""Finds an image as a record writes it: a path, a data URI, base64, bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import QUOTED_CHARACTERS, quoted
from vlm_sft.data.sample import ImageRef
from vlm_sft.data.sources.columns import IMAGE_NAMES, flag_for
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.video import VIDEO, VIDEO_FIX, is_video_name

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
_BEGINNINGS = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}
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


def video_problem(where: str) -> RowProblem:
    """Refuse a video, in the same words everywhere.

    Args:
        where: what holds it: a key, a part, a file.
    """
    return RowProblem("video", f"{where}: {VIDEO}; {VIDEO_FIX}")


def keys_of(record: Mapping[str, Any]) -> str:
    """The keys of a record, for messages."""
    return "its keys are: " + (", ".join(sorted(str(key)[:QUOTED_CHARACTERS] for key in record)) or "none")


def no_image(record: Mapping[str, Any]) -> RowProblem:
    """Say that a record shows no image, which keys it has, and which of them looks like one."""
    likely = likely_images(record)
    if likely and is_video_name(record[likely[0]]):
        return video_problem(quoted(likely[0]))
    flag = flag_for(["image"], record, {"image": str(likely[0])[:QUOTED_CHARACTERS]} if likely else None)
    what = f"the question has no image under image or images; {keys_of(record)}; name it: {flag}"
    return RowProblem("no image", what)


def likely_images(record: Mapping[str, Any]) -> list[Any]:
    """The keys of a record that look like images under another name than `image` and `images`."""
    return [key for key, value in record.items() if _shows_image(key, value)]


def _shows_image(key: Any, value: Any) -> bool:
    """Whether a value of a record looks like an image, or its key says so."""
    if key in ("image", "images"):  # looked at, and empty
        return False
    if isinstance(value, str):
        looks = (
            value.lower().endswith(PICTURE_ENDINGS)
            or is_video_name(value)
            or value.startswith("data:image")
            or base64_kind(value) != ""
        )
        return looks or bool(value and str(key).lower() in IMAGE_NAMES)
    if isinstance(value, list):
        return any(_shows_image("", item) for item in value[:1])
    return isinstance(value, (bytes, StoredImage)) or (isinstance(value, dict) and bool(value.get("bytes")))


def base64_kind(text: str) -> str:
    """Which kind of picture a text holds as bare base64, e.g. "png"; "" for any other text."""
    head = "".join(text[:64].removeprefix("base64,").split()).replace("-", "+").replace("_", "/")[:32]
    try:
        data = base64.b64decode(head, validate=True) if len(head) == 32 else b""
    except ValueError:  # also for letters that are not ASCII
        return ""
    return next((kind for beginning, kind in _BEGINNINGS.items() if data.startswith(beginning)), "")


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
        image: a path, a data URI, a picture as bare base64, `{"bytes": base64}`, `{"path" or "url": text}`, or a
            `StoredImage`.

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
    given, image = image, image_text(image)
    if not isinstance(image, str) or not image.strip():
        what = f'{quoted(given)} is neither a path, nor a data URI, nor {{"bytes": base64}}'
        raise RowProblem("image missing", what)
    if is_video_name(image):
        raise video_problem(quoted(image, 200))
    if is_url(image):
        raise RowProblem("image is a URL", f"{quoted(image, 200)} is not fetched; {URL_FIX}")
    if image.startswith("data:"):
        header, _, body = image.partition(",")
        if not header.endswith(";base64"):
            raise RowProblem("image cannot be read", f"a data URI must be base64; this one begins {quoted(header)}")
        return ImageRef.from_bytes(_base64(body), "data URI")
    try:
        return _file(folder, image)
    except RowProblem:
        if not base64_kind(image):
            raise
        return ImageRef.from_bytes(_bare_base64(image), "base64 text")


def lies_outside(ref: ImageRef, *roots: Path) -> bool:
    """Whether an image is a file that lies in none of some folders, by its path or through a link."""
    path = Path(ref.source)
    if not path.is_file():  # bytes within a record or a table
        return False
    return not any(path.resolve().is_relative_to(root.resolve()) for root in roots)


def _file(folder: Path, image: str) -> ImageRef:
    path = Path(image.removeprefix("file://"))
    candidates = [path] if path.is_absolute() else [folder / path, folder / "images" / path]
    try:
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else error  # without the name, which may be a picture
        raise _missing(image, [], f": {reason}") from error
    if found is None:
        raise _missing(image, candidates)
    try:
        return ImageRef.from_path(found)
    except OSError as error:
        raise RowProblem("image cannot be read", f"{quoted(image)} cannot be opened: {error.strerror}") from error


def _missing(image: str, candidates: list[Path], reason: str = "") -> RowProblem:
    """Why there is no file of this name."""
    if reason:
        return RowProblem("image missing", f"{quoted(image)} cannot be opened{reason}")
    return RowProblem("image missing", f"there is no file {' nor '.join(map(str, candidates))}")


def _bare_base64(text: str) -> bytes:
    """The picture that a text is, in the alphabet of base64 or in that for URLs, with or without its padding."""
    letters = "".join(text.removeprefix("base64,").split()).replace("-", "+").replace("_", "/").rstrip("=")
    return _base64(letters + "=" * (-len(letters) % 4))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowProblem("image cannot be read", f"the bytes are not base64: {error}") from error
