"""Visual tokens of an image from its size alone."""

from __future__ import annotations

import math


def qwen_grid(height: int, width: int, patch: int, merge: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Rows and columns of patches that the Qwen-VL processors make of an image.

    Both sides are rounded to whole visual tokens; an area outside the bounds is scaled back into them, down or up to
    whole tokens (Wang et al. 2024, arXiv:2409.12191, section 2.1; the rule of Qwen2VLImageProcessor).

    Args:
        height, width: of the image in pixels.
        patch: side of a patch in pixels.
        merge: patches that are merged in each direction.
        min_pixels, max_pixels: bounds of the area in pixels.

    Returns:
        Rows and columns, multiples of `merge`.
    """
    unit = patch * merge
    rows, columns = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(unit, math.floor(height / shrink / unit) * unit)
        columns = max(unit, math.floor(width / shrink / unit) * unit)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return rows // patch, columns // patch
