"""Frozen vision features on the side of the data: their names in a pack and their budget.

A pack whose images have features holds no pixels. `model/vision_features.py` computes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from vlm_sft.common.errors import RunError, quoted

PREFIX = "features."  # of the names of feature tensors among the tensors of an image
KEPT, BEFORE_PROJECTOR = "kept", "inputs of the projector"  # a setting of entries that hold these instead of features
AUTO, OFF = "auto", "off"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
Tensor = TypeVar("Tensor")


def parse_feature_cache(text: str) -> int | str:
    """Read `--feature_cache`.

    Args:
        text: "auto", "off", or a size such as "20GB" (powers of ten) or "500000000".

    Returns:
        "auto", "off" or a budget in bytes.

    Raises:
        RunError: it is none of them.
    """
    if text in (AUTO, OFF):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise RunError(f"--feature_cache {quoted(text)} is not a size", "pass auto, off, or a size such as 20GB")
    return size


def is_pixels(name: str) -> bool:
    """True for the large tensors of a processor that only the vision tower reads."""
    return name.startswith("pixel_")


def feature_record(features: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an image has instead of its pixels: its features, and the small tensors that positions need."""
    small = {name: value for name, value in tensors.items() if not is_pixels(name)}
    return small | {PREFIX + name: value for name, value in features.items()}


def features_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features among the tensors of an image, by their own names; {} for an image with pixels."""
    return {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
