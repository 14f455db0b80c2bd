"""Pictures of predictions, scaled; as data addresses, within a budget of bytes. Imports Pillow and report.canvas."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from vlm_sft.report.canvas import data_address

PICTURE_SIDE_PIXELS = 480
LOSSLESS_UP_TO_PIXELS = 256 * 256  # artefacts show where a small picture is scaled up, and it is small anyway
BUDGET_BYTES = 6_000_000  # of the addresses of one page
MISSING, NOT_EMBEDDED, NONE_GIVEN = -1, -2, -3  # instead of the number of a picture


def thumbnail(path: Path | None) -> str | None:
    """A picture as a data address, scaled down to PICTURE_SIDE_PIXELS and encoded anew without its metadata.

    Args:
        path: the image file, or None.

    Returns:
        The address, in WebP; None when the picture is missing or cannot be decoded.
    """
    if path is None:
        return None
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return _thumbnail(path, state.st_mtime_ns, state.st_size)


def scaled(path: Path) -> Image.Image | None:
    """A picture on white, scaled down to PICTURE_SIDE_PIXELS, without its metadata; None when it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.draft("RGB", (PICTURE_SIDE_PIXELS, PICTURE_SIDE_PIXELS))
                picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    picture.thumbnail((PICTURE_SIDE_PIXELS, PICTURE_SIDE_PIXELS), Image.Resampling.LANCZOS)
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    return flat


@lru_cache(maxsize=4096)
def _thumbnail(path: Path, changed: int, size: int) -> str | None:
    """The address of a file in one state: a page that is served again and again encodes each picture once."""
    flat = scaled(path)
    if flat is None:
        return None
    buffer = io.BytesIO()
    lossless = flat.width * flat.height <= LOSSLESS_UP_TO_PIXELS
    flat.save(buffer, "WEBP", lossless=lossless, quality=75, method=2)
    return data_address("image/webp", buffer.getvalue())


class Album:
    """The pictures of one page, each held once.

    Args:
        budget: bytes of all addresses together; what comes later is not embedded.

    Attributes:
        addresses: the data addresses, in the order of their numbers.
    """

    def __init__(self, budget: int = BUDGET_BYTES) -> None:
        self.addresses: list[str] = []
        self._left = budget
        self._numbers: dict[tuple[str, int], int] = {}

    def add(self, path: Path | None) -> None:
        """Embed a picture, unless it is there already, cannot be read, or exceeds the budget."""
        key = _key(path)
        if key is None or key in self._numbers or self._left <= 0:
            return
        address = thumbnail(path)
        if address is None:
            self._numbers[key] = MISSING
        elif len(address) <= self._left:
            self._left -= len(address)
            self._numbers[key] = len(self.addresses)
            self.addresses.append(address)

    def number(self, path: Path | None) -> int:
        """The number of a picture in `addresses`, or MISSING, NOT_EMBEDDED or NONE_GIVEN."""
        if path is None:
            return NONE_GIVEN
        key = _key(path)
        return MISSING if key is None else self._numbers.get(key, NOT_EMBEDDED)


def _key(path: Path | None) -> tuple[str, int] | None:
    """What is the same for one picture in several runs: its name, which is a hash of its bytes, and its size."""
    try:
        return None if path is None else (path.name, path.stat().st_size)
    except (OSError, ValueError):
        return None
