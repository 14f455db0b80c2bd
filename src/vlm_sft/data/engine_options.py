"""Switches that change speed, disk and memory, and no result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_sft.common.errors import RunError, quoted
from vlm_sft.common.options import option

# How questions that cannot share an image run together, each with its own copy of the image's tokens: as one batch
# padded to the longest, as batches of equal length, or one question a forward pass.
Rows = Literal["padded", "equal", "single"]
AUTO, OFF = "auto", "off"  # of the cache of vision features
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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


@dataclass(frozen=True)
class CacheOptions:
    """What is kept on disk; `feature_cache` is "auto", "off" or a budget in bytes."""

    cache_dir: Path | None = option(
        None, "folder of the prepared data (default: $VLM_SFT_CACHE, or ~/.cache/vlm_sft)", "DIR"
    )
    prepared_cache: bool = option(
        True,
        "keep processed images and tokens for later epochs, ranks and runs (default: %(default)s)",
        words=("on", "off"),
    )
    feature_cache: int | str = option(
        AUTO,
        "keep the outputs of the frozen vision tower: where it pays and fits, never, or up to a size such as 20GB "
        "(default: %(default)s)",
        "auto|off|SIZE",
        read=parse_feature_cache,
    )


@dataclass(frozen=True)
class EngineOptions(CacheOptions):
    """The same with the switches of packing."""

    share_images: bool = option(
        True, "compute an image once for all its questions of a step (default: %(default)s)", words=("true", "false")
    )
    packing: bool = option(
        True,
        "put several images, or questions that cannot share one, into one forward pass (default: %(default)s)",
        words=("on", "off"),
    )
