"""Switches that change speed, disk and memory, and no result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_sft.common.options import option
from vlm_sft.data.cache.feature_names import AUTO, parse_feature_cache

# How questions that cannot share an image run together, each with its own copy of the image's tokens: as one batch
# padded to the longest, as batches of equal length, or one question a forward pass.
Rows = Literal["padded", "equal", "single"]


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
