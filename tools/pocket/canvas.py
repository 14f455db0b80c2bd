"""Pictures drawn together with a map of what is where.

While pocket is trained from nothing, its vision tower also learns to name the character and the coloured thing under
every slot of 4 x 8 px, and, under a label, the facts that belong to it (see `labels`). That teaches it to read, to see
colours and to find values much sooner than the words of the answers alone do.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.pocket.labels import UNKNOWN, labels_of_tokens
from vlm_sft.data.demo.fonts import load_font
from vlm_sft.data.demo.vocabulary import COLOURS

# Class 0 is "no character"; every other character that has no class of its own counts as the last one.
CHARACTERS = string.digits + string.ascii_letters + "%$.,:-/&!?'#+"
CHARACTER_CLASSES = len(CHARACTERS) + 2
# What a coloured thing is; class 0 is "nothing", the others are every kind in every colour.
KINDS = ("text", "circle", "rectangle", "triangle")
THING_CLASSES = 1 + len(KINDS) * len(COLOURS)
SLOT_WIDTH_PX = 4
SLOT_HEIGHT_PX = 8
_CLASS_OF = {character: number for number, character in enumerate(CHARACTERS, start=1)}

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a lesson.

    Attributes:
        task: what is practised, for the log.
        pixels: (height, width, 3) uint8, sides multiples of 16.
        questions: pairs of question and answer; may be empty where only characters are learned.
        slots: (2, height / 8, width / 4) classes of characters and of things, see `Canvas.slots`; None where unknown.
        facts: (24, height / 16, width / 16) classes of the facts about the label under a visual token, see
            `facts_of_labels`; None where no picture of the task has labels.
        sought: (5, questions, height / 16, width / 16) bool: where the labels and marks are that a question is about,
            see `places_of_labels`; None where no picture of the task has labels.
    """

    task: str
    pixels: np.ndarray
    questions: tuple[tuple[str, str], ...]
    slots: np.ndarray | None
    facts: np.ndarray | None = None
    sought: np.ndarray | None = None


class Canvas:
    """A picture that remembers where its characters and its coloured things are.

    Args:
        width, height: pixels, multiples of 16.
        paper: background colour.
    """

    def __init__(self, width: int, height: int, paper: Colour) -> None:
        self.size = (width, height)
        self.paper = paper
        self.image = Image.new("RGB", self.size, paper)
        self._maps = [Image.new("L", self.size, 0) for _ in range(3)]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        font_name: str,
        size_px: int,
        ink: Colour,
        name: str | None = None,
        label: int = 0,
    ) -> None:
        """Write one line.

        Args:
            x, y: its left end and its baseline in pixels.
            name: of its colour.
            label: its number from 1 on where facts belong to it.
        """
        characters, things, labels = (ImageDraw.Draw(one) for one in self._maps)
        font = load_font(font_name, size_px)
        ImageDraw.Draw(self.image).text((x, y), text, ink, font, anchor="ls")
        for box in _name_characters(characters, x, y, text, font):
            things.rectangle(box, fill=_thing("text", name) if name else 0)
            labels.rectangle(box, fill=label)

    def shape(self, kind: str, box: tuple[int, int, int, int], paint: Colour, name: str) -> None:
        """Draw a shape of KINDS that fills `box` (left, top, right, bottom), in a colour called `name`."""
        for image, fill in ((self.image, paint), (self._maps[1], _thing(kind, name))):
            draw = ImageDraw.Draw(image)
            if kind == "circle":
                draw.ellipse(box, fill=fill)
            elif kind == "rectangle":
                draw.rectangle(box, fill=fill)
            else:
                draw.polygon([((box[0] + box[2]) / 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=fill)

    def rotate(self, degrees: float) -> None:
        """Turn everything drawn so far about the middle, in place."""
        self.image = self.image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=self.paper)
        self._maps = [one.rotate(degrees, Image.Resampling.NEAREST) for one in self._maps]

    def pixels(self) -> np.ndarray:
        """The picture: (height, width, 3) uint8."""
        return np.asarray(self.image)

    def slots(self) -> np.ndarray:
        """The classes under the middle of every slot: (2, height / 8, width / 4) uint8, characters before things."""
        return _middles(np.stack([np.asarray(one) for one in self._maps[:2]]))

    def labels(self) -> np.ndarray:
        """The label under every visual token, see `labels_of_tokens`."""
        return labels_of_tokens(_middles(np.asarray(self._maps[2])))


class Record:
    """Makes the pens of the demo drawings (`draw_chart`, `draw_sign`) and remembers where each character is written.

    Args:
        width, height: of the picture, pixels.
        labels: the texts that facts belong to, with their numbers from 1 on.
    """

    def __init__(self, width: int, height: int, labels: Mapping[str, int] | None = None) -> None:
        self.characters = Image.new("L", (width, height), 0)
        self._labels, self._numbers = Image.new("L", (width, height), 0), labels or {}

    def pen(self, image: Image.Image) -> ImageDraw.ImageDraw:
        """The tool that draws on `image`."""
        return _RecordingPen(image, self.characters, self._labels, self._numbers)

    def mark(self, x: int, y: int, label: int) -> None:
        """Note that facts belong to a place that no text stands at; `x`, `y` in pixels."""
        box = (x - SLOT_WIDTH_PX, y - SLOT_HEIGHT_PX // 2, x + SLOT_WIDTH_PX - 1, y + SLOT_HEIGHT_PX // 2 - 1)
        ImageDraw.Draw(self._labels).rectangle(box, fill=label)

    def labels(self) -> np.ndarray:
        """As `Canvas.labels`."""
        return labels_of_tokens(_middles(np.asarray(self._labels)))

    def slots(self, degrees: float = 0.0) -> np.ndarray:
        """As `Canvas.slots`, the things UNKNOWN; `degrees` is how far the drawing was turned after it was written."""
        turned = self.characters.rotate(degrees, Image.Resampling.NEAREST) if degrees else self.characters
        named = _middles(np.asarray(turned))
        return np.stack([named, np.full_like(named, UNKNOWN)])


class _RecordingPen(ImageDraw.ImageDraw):
    def __init__(
        self, image: Image.Image, characters: Image.Image, labels: Image.Image, numbers: Mapping[str, int]
    ) -> None:
        super().__init__(image)
        self._characters, self._labels, self._numbers = ImageDraw.Draw(characters), ImageDraw.Draw(labels), numbers

    def text(self, xy: Any, text: Any, *arguments: Any, **named: Any) -> None:
        super().text(xy, text, *arguments, **named)
        font, (across, along) = named["font"], named["anchor"]
        ascent, descent = font.getmetrics()
        x = xy[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[across] * font.getlength(text)
        y = xy[1] + {"s": 0.0, "m": (ascent - descent) / 2}[along]
        for box in _name_characters(self._characters, x, y, text, font):
            self._labels.rectangle(box, fill=self._numbers.get(text, 0))


def _name_characters(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, font: ImageFont.FreeTypeFont
) -> list[tuple[int, int, int, int]]:
    """Fill the box of every character of a line with its class; returns the boxes. `x`, `y`: left end, baseline."""
    boxes, left = [], x
    for count, character in enumerate(text, start=1):
        right = x + font.getlength(text[:count])
        box = (round(left), round(y - 0.8 * font.size), round(right) - 1, round(y + 0.2 * font.size))
        if character != " " and box[2] >= box[0]:
            draw.rectangle(box, fill=_CLASS_OF.get(character, CHARACTER_CLASSES - 1))
            boxes.append(box)
        left = right
    return boxes


def _middles(pixels: np.ndarray) -> np.ndarray:
    """The value in the middle of every slot."""
    return pixels[..., SLOT_HEIGHT_PX // 2 :: SLOT_HEIGHT_PX, SLOT_WIDTH_PX // 2 :: SLOT_WIDTH_PX]


def _thing(kind: str, name: str) -> int:
    """Class of a kind of thing in a colour."""
    return 1 + list(COLOURS).index(name) * len(KINDS) + KINDS.index(kind)
