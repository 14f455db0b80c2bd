"""Boxes in texts: `[x1, y1, x2, y2]` in pixels of the image in a record, and as a model family writes them.

Qwen2.5-VL writes pixels of the image as its processor has resized it (Qwen2.5-VL Technical Report, arXiv 2502.13923).
Qwen2-VL (arXiv 2409.12191) and Qwen3-VL (cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL) write thousandths of width
and height. Rounding and bounds are those of their authors' own tool for training data (QwenLM/Qwen3-VL,
qwen-vl-finetune/tools/process_bbox.ipynb).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from typing import Any

from vlm_sft.common.errors import ModelError, quoted
from vlm_sft.data.processor import blamed_on
from vlm_sft.data.sample import Place, Sample, Turn

Size = tuple[int, int]  # width and height

PIXELS, THOUSANDTHS = "pixels of the resized image", "thousandths of width and height"
CONVENTIONS = {"qwen2_vl": THOUSANDTHS, "qwen2_5_vl": PIXELS, "qwen3_vl": THOUSANDTHS, "qwen3_vl_moe": THOUSANDTHS}
_TOLERANCE = 1  # pixels by which an annotation may stand out of its image
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_BOX = re.compile(rf"\[\s*{_NUMBER.pattern}(?:\s*,\s*{_NUMBER.pattern}){{3}}\s*\]")


def box_outside(texts: Iterable[str], size: Size) -> str | None:
    """The first box of some texts that is not within an image of this size; None where all are.

    Args:
        texts: of a record.
        size: of its image, in pixels.
    """
    limits = [bound + _TOLERANCE for bound in (*size, *size)]
    for text in texts:
        for found in _BOX.finditer(text):
            numbers = map(float, _NUMBER.findall(found.group()))
            if not all(-_TOLERANCE <= number <= limit for number, limit in zip(numbers, limits, strict=True)):
                return found.group()
    return None


def widest(text: str) -> str:
    """A text whose boxes have coordinates of as many digits as any convention may give them."""
    return _BOX.sub(lambda found: _NUMBER.sub("9999", found.group()), text)


class Convention:
    """How a model family writes boxes.

    Args:
        family: gives `model_type` of the model's configuration; asked where a sample declares boxes.
        processor: of the model; it says how an image is resized.
    """

    def __init__(self, family: Callable[[], str], processor: Any) -> None:
        self.family = functools.cache(family)
        self.processor = processor

    def written(self, sample: Sample) -> Sample:
        """A sample with its boxes as the family writes them; one that declares none is left as it is.

        Raises:
            ModelError: the convention of the family is not known.
            SampleError: the processor refuses the image.
        """
        if sample.boxes is None:
            return sample
        new, last = self._grid(sample)
        return _rewritten(sample, new, last)

    def in_pixels(self, sample: Sample, answer: str) -> str:
        """A model's answer with its boxes in pixels of the stored image; a model may put them out of it."""
        return answer if sample.boxes is None else _rescaled(answer, self._grid(sample)[0], sample.boxes, None)

    def as_said(self, sample: Sample, answer: str) -> str:
        """An answer in pixels of the stored image, as precise as the family can say it."""
        if sample.boxes is None:
            return answer
        new, last = self._grid(sample)
        return self.in_pixels(sample, _rescaled(answer, sample.boxes, new, last))

    def _grid(self, sample: Sample) -> tuple[Size, Size]:
        """Width and height of what coordinates are within, and their largest values."""
        family = self.family()
        convention = CONVENTIONS.get(family)
        if convention is None:
            raise ModelError(
                f'{sample.metadata.get("where", sample.id)} declares "boxes", and how models of the family '
                f"{quoted(family)} write boxes is not known here (known: {', '.join(CONVENTIONS)})",
                'use a model of these families, or leave the key "boxes" out: coordinates are plain text then',
            )
        return ((1000, 1000), (1000, 1000)) if convention == THOUSANDTHS else _resized(sample, self.processor)


def _resized(sample: Sample, processor: Any) -> tuple[Size, Size]:
    """Width and height of a sample's image behind the processor, and its last column and row."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images, (image,) = processor.image_processor, sample.images
    width, height = image.width, image.height
    low, high = images.size["shortest_edge"], images.size["longest_edge"]
    with blamed_on(f"{image.source} ({width} x {height} pixels)", processor):
        new_height, new_width = smart_resize(height, width, images.patch_size * images.merge_size, low, high)
    return (new_width, new_height), (new_width - 1, new_height - 1)


def _rewritten(sample: Sample, new: Size, last: Size) -> Sample:
    """A sample with the boxes of all its texts in another grid, which is no declaration any more."""
    assert sample.boxes is not None
    old = sample.boxes
    places = tuple(
        Place(turn, len(_rescaled([*(one.text for one in sample.history), sample.question][turn][:at], old, new, last)))
        for turn, at in sample.places
    )
    return replace(
        sample,
        question=_rescaled(sample.question, old, new, last),
        target=_rescaled(sample.target, old, new, last),
        answers=tuple(_rescaled(answer, old, new, last) for answer in sample.answers),
        history=tuple(Turn(turn.role, _rescaled(turn.text, old, new, last)) for turn in sample.history),
        boxes=None,
        places=places,
    )


def _rescaled(text: str, old: Size, new: Size, last: Size | None) -> str:
    """A text with its boxes in another grid, rounded, and within the last column and row where these are given."""

    def coordinate(digits: str, axis: int) -> str:
        value = round(float(digits) * new[axis] / old[axis])
        return str(value if last is None else min(max(value, 0), last[axis]))

    def box(found: re.Match[str]) -> str:
        axes = cycle((0, 1))
        return _NUMBER.sub(lambda number: coordinate(number.group(), next(axes)), found.group())

    return text if old == new and last is None else _BOX.sub(box, text)
