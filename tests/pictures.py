"""Small encoded pictures for tests."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from vlm_sft.data.demo.charts import random_chart
from vlm_sft.data.demo.generate import picture_stream
from vlm_sft.data.demo.signs import SignSpec, random_sign
from vlm_sft.data.demo.spec import ChartSpec

COLOURS = ("red", "navy", "gold", "white", "black", "green", "pink", "grey")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(color: Any = "white", size: tuple[int, int] = (12, 8)) -> bytes:
    """Return a PNG of one colour."""
    return encoded(Image.new("RGB", size, color))


def chart_spec(split: str, index: int) -> ChartSpec:
    """Return the drawing specification of a chart of the demo."""
    return random_chart(picture_stream("demo_charts", split, index))


def sign_spec(split: str, index: int) -> SignSpec:
    """Return the drawing specification of a sign of the demo."""
    return random_sign(picture_stream("demo_text", split, index))
