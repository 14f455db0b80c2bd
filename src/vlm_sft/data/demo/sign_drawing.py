"""Draws synthetic signs with Pillow."""

from __future__ import annotations

import numpy
from PIL import Image, ImageDraw

from vlm_sft.data.demo.drawing import Pen
from vlm_sft.data.demo.fonts import load_font
from vlm_sft.data.demo.signs import SignSpec


def draw_sign(spec: SignSpec, pen: Pen = ImageDraw.Draw) -> Image.Image:
    """Draw a sign.

    Args:
        spec: what to draw, from `random_sign` or made by hand.
        pen: makes the tool that draws on the picture, as in `draw_chart`.

    Returns:
        An RGB picture of `spec.width` by `spec.height` pixels.
    """
    image = Image.new("RGB", (spec.width, spec.height), spec.scene)
    draw = pen(image)
    box = (spec.margin, spec.margin, spec.width - 1 - spec.margin, spec.height - 1 - spec.margin)
    frame = spec.ink if spec.border else None
    draw.rounded_rectangle(box, spec.radius, fill=spec.board, outline=frame, width=spec.border)
    for line in spec.lines:
        font = load_font(line.font, line.size_px)
        draw.text((spec.width // 2, line.centre_y), line.text, fill=spec.ink, font=font, anchor="mm")
    if spec.rotation_degrees:
        image = image.rotate(spec.rotation_degrees, Image.Resampling.BICUBIC, fillcolor=spec.scene)
    return _with_noise(image, spec) if spec.noise else image


def _with_noise(image: Image.Image, spec: SignSpec) -> Image.Image:
    """Add grey noise from the seed of the specification; Pillow's own noise cannot be seeded."""
    generator = numpy.random.default_rng(spec.noise_seed)
    noise = generator.integers(-spec.noise, spec.noise + 1, (spec.height, spec.width, 1), dtype=numpy.int16)
    pixels = numpy.asarray(image, dtype=numpy.int16) + noise
    return Image.fromarray(numpy.clip(pixels, 0, 255).astype(numpy.uint8))
