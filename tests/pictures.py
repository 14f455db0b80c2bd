"""Small encoded pictures for tests."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

COLOURS = ("red", "navy", "gold", "white", "black", "green", "pink", "grey")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(color: Any = "white", size: tuple[int, int] = (12, 8)) -> bytes:
    """Return a PNG of one colour."""
    return encoded(Image.new("RGB", size, color))
