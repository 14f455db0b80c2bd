"""The data engine of a training: caches and packing, their escape hatches, what they came to. Imports evaluate.caches.

Every switch changes speed, disk and memory only; the mathematics stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.data.cache import DataCache
from vlm_sft.data.features import parse_feature_cache
from vlm_sft.evaluate.caches import CacheOptions, Caches, read_switches
from vlm_sft.model.features import TowerUse


@dataclass(frozen=True)
class EngineOptions(CacheOptions):
    """The switches of `vlm-sft train` that change no result.

    Attributes:
        share_images: compute the questions of an image behind one prefix.
        packing: fill a forward pass with several images.
    """

    share_images: bool = True
    packing: bool = True

    @classmethod
    def parse(
        cls, cache_dir: Path | None, prepared_cache: str, feature_cache: str, share_images: str, packing: str
    ) -> EngineOptions:
        """Read the flags.

        Raises:
            RunError: a value is not one that the flag takes.
        """
        switches = read_switches(prepared_cache=prepared_cache, share_images=share_images, packing=packing)
        return cls(cache_dir=cache_dir, feature_cache=parse_feature_cache(feature_cache), **switches)


@dataclass
class Engine(Caches):
    """The caches and the packing of one training."""

    options: EngineOptions

    def describe(self, caches: Sequence[DataCache]) -> None:
        """Note the switches and what was prepared anew."""
        super().describe(caches)
        self.facts |= {"share_images": self.options.share_images, "packing": self.options.packing}

    @contextmanager
    def counted(self, model: Any) -> Iterator[None]:
        """Count the calls of the vision tower during the training, on this rank."""
        use = TowerUse(model)
        try:
            yield
        finally:
            use.close()
            self.facts["training_tower"] = {"calls": use.calls, "images": use.images}
