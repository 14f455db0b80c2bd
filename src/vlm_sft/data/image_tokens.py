"""Visual tokens of an image from its size alone."""

from __future__ import annotations

import math

import torch

from vlm_sft.data.encode import Encoder, picture_sizes
from vlm_sft.data.processor import visual_tokens
from vlm_sft.data.sample import Sample


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


def grid_tensors(encoder: Encoder, sample: Sample) -> dict[str, torch.Tensor]:
    """The grids that the processor would report for a sample's images.

    {} for a text row, and for a processor whose rule is not known.

    Raises:
        SampleError: it refuses one of them.
    """
    images = encoder.processor.image_processor
    size = dict(getattr(images, "size", None) or {})
    if not sample.images or not hasattr(images, "merge_size") or not {"shortest_edge", "longest_edge"} <= set(size):
        return {}
    bounds = (images.patch_size, images.merge_size, size["shortest_edge"], size["longest_edge"])
    grids = []
    for image, (width, height) in zip(sample.images, picture_sizes(sample), strict=True):
        visual_tokens(encoder.processor, width, height, f"{image.source} ({width} x {height} pixels)")
        grids.append([1, *qwen_grid(height, width, *bounds)])
    return {"image_grid_thw": torch.tensor(grids)}
