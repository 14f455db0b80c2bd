"""Pictures of predictions, scaled; as data addresses, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_sft.common import artifacts
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.common.formats import size
from vlm_sft.data.images import decode_rgb, encode_webp
from vlm_sft.data.sample import read_file
from vlm_sft.report.svg import data_address

PICTURE_SIDE_PIXELS = 480
SIDES = ((250, PICTURE_SIDE_PIXELS), (800, 320))  # of a page with so many pictures at most
SMALLEST_SIDE = 224
BUDGET_BYTES = 12_000_000  # of the addresses of one page
NONE_GIVEN = "no picture given"
MISSING = "picture missing: it is not in the run's evaluation/images"


def scaled(path: Path, side: int = PICTURE_SIDE_PIXELS) -> Image.Image:
    """A picture on white, RGB, scaled down to at most `side` pixels wide and high.

    Raises:
        DataError: it is missing, or cannot be decoded.
    """
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: {getattr(error, 'strerror', None) or error}", "evaluate again") from error
    picture = decode_rgb(data, path.name)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def thumbnail(path: Path, side: int = PICTURE_SIDE_PIXELS) -> str:
    """A picture as a data address in WebP, scaled down and encoded anew without its metadata.

    Raises:
        DataError: it is missing, or cannot be decoded.
    """
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(MISSING, "evaluate again") from error
    return _thumbnail(path, state.st_mtime_ns, state.st_size, side)


@lru_cache(maxsize=4096)
def _thumbnail(path: Path, changed: int, length: int, side: int) -> str:
    """The address of a file in one state: a page that is served again and again encodes each picture once."""
    try:
        return data_address("image/webp", encode_webp(scaled(path, side), quality=75))
    except DataError as error:
        raise DataError(f"picture unreadable: {error.what}", error.fix) from error


class Album:
    """The pictures of one page, each held once.

    Args:
        paths: the pictures that the page would show, the most important first; None for a question without one.
        budget: bytes of all addresses together; what comes later is not embedded.

    Attributes:
        addresses: the data addresses, in the order of their numbers.
        reasons: why others are not shown.
    """

    def __init__(self, paths: Iterable[Path | None], budget: int = BUDGET_BYTES) -> None:
        self.addresses: list[str] = []
        self.reasons: list[str] = []
        self._left = budget
        self._budget = budget
        self._numbers: dict[tuple[str, int], int] = {}
        self._kept: dict[Path, Mapping[str, Any]] = {}
        first = {key: path for path in paths if path is not None and (key := _key(path)) is not None}
        side = next((side for count, side in SIDES if len(first) <= count), SMALLEST_SIDE)
        for key, path in first.items():
            self._numbers[key] = self._embed(path, side)

    def number(self, path: Path | None) -> int:
        """The number of a picture in `addresses`; below 0, -1 - the number of a text in `reasons`."""
        if path is None:
            return self._reason(NONE_GIVEN)
        key = _key(path)
        return self._reason(self._why_missing(path)) if key is None else self._numbers[key]

    def reason(self, number: int) -> str:
        """The text of a number below 0; "" of an embedded picture."""
        return self.reasons[-1 - number] if number < 0 else ""

    def _embed(self, path: Path, side: int) -> int:
        place = "see the run's evaluation/images"
        full = f"picture not embedded: this page holds {size(self._budget)} of pictures; {place}"
        if self._left <= 0:
            return self._reason(full)
        try:
            address = thumbnail(path, side)
        except DataError as error:
            return self._reason(error.what)
        if len(address) > self._left:
            return self._reason(full)
        self._left -= len(address)
        self.addresses.append(address)
        return len(self.addresses) - 1

    def _why_missing(self, path: Path) -> str:
        """Why a run holds no picture of this name, as its evaluation recorded it."""
        folder = path.parent.parent
        if folder not in self._kept:
            self._kept[folder] = _record(folder / artifacts.PICTURES)
        record = self._kept[folder]
        if reason := record.get("failed", {}).get(f"{path.parent.name}/{path.name}"):
            return f"picture not stored: {reason}"
        if record.get("over_limit"):
            return f"picture not stored: an evaluation stores {size(record['limit_bytes'])} of pictures a benchmark"
        return MISSING

    def _reason(self, text: str) -> int:
        if text not in self.reasons:
            self.reasons.append(text)
        return -1 - self.reasons.index(text)


def _key(path: Path) -> tuple[str, int] | None:
    """What is the same for one picture in several runs: its name, which is a hash of its bytes, and its size."""
    try:
        return path.name, path.stat().st_size
    except (OSError, ValueError):
        return None


def _record(path: Path) -> Mapping[str, Any]:
    """The pictures.json of an evaluation; {} of an older or damaged one."""
    try:
        found = artifacts.read_json(path)
        assert isinstance(found["failed"], dict) and isinstance(found["limit_bytes"], int)
    except (RunError, AssertionError, KeyError, TypeError):
        return {}
    return dict(found)
