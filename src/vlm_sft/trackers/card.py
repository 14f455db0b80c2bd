"""A picture with its question and answers written below it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

WIDTH, MARGIN = 480, 10  # pixels
TEXT_PIXELS, LINE_PIXELS = 15, 20
LABEL_PIXELS = 80  # the column that says what a line is
COLOURS = {"right": "#1a7f37", "wrong": "#b42318", "": "#1f2328"}


def draw_card(picture: Image.Image | None, lines: Sequence[tuple[str, str, str]]) -> Image.Image:
    """Draw a picture with labelled, wrapped lines of text below it.

    Args:
        picture: RGB, at most 480 pixels wide; a small one is enlarged; None leaves its place out.
        lines: label, text, and "right", "wrong" or "" for the colour of the text.

    Returns:
        RGB, 480 pixels wide, as high as it takes.
    """
    wrapped = [(label, _wrap(text, WIDTH - 2 * MARGIN - LABEL_PIXELS), verdict) for label, text, verdict in lines]
    if picture:
        factor = max(1, min(WIDTH // picture.width, WIDTH // picture.height))
        picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    top = picture.height + MARGIN if picture else MARGIN
    height = top + LINE_PIXELS * sum(len(rows) for _, rows, _ in wrapped) + MARGIN
    card = Image.new("RGB", (WIDTH, height), "white")
    if picture:
        card.paste(picture, ((WIDTH - picture.width) // 2, 0))
    draw = ImageDraw.Draw(card)
    for label, rows, verdict in wrapped:
        draw.text((MARGIN, top), label, "#57606a", _font())
        for row in rows:
            draw.text((MARGIN + LABEL_PIXELS, top), row, COLOURS[verdict], _font())
            top += LINE_PIXELS
    return card


def same_size(cards: Sequence[Image.Image]) -> list[Image.Image]:
    """Cards as high as the highest of them: some trackers show a row of pictures in one size."""
    height = max((card.height for card in cards), default=0)
    return [ImageOps.pad(card, (WIDTH, height), color="white", centering=(0.5, 0)) for card in cards]


def _wrap(text: str, width: int) -> list[str]:
    """Cut a text into rows of at most `width` pixels, between words where that is possible."""
    rows = [""]
    for word in text.split():
        joined = f"{rows[-1]} {word}".strip()
        if _font().getlength(joined) <= width:
            rows[-1] = joined
            continue
        if rows[-1]:
            rows.append("")
        for character in word:
            if _font().getlength(rows[-1] + character) > width:
                rows.append("")
            rows[-1] += character
    return rows


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic and many signs."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT_PIXELS)
