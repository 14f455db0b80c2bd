"""The caches of a run: what is prepared once for all epochs, ranks, models and commands. Imports data and model.

Training and evaluation share them. Every switch changes speed, disk and memory only; the mathematics stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_sft.console import say
from vlm_sft.data.cache import DataCache
from vlm_sft.data.cache_folder import default_cache_dir
from vlm_sft.data.encode import Encoder
from vlm_sft.data.features import AUTO, parse_feature_cache
from vlm_sft.data.sample import Sample
from vlm_sft.errors import RunError, quoted
from vlm_sft.evaluate.run import barrier
from vlm_sft.launch import Launch
from vlm_sft.model.feature_pass import Ranks, use_features

_ON = {"on": True, "true": True, "off": False, "false": False}


def read_switches(**values: str) -> dict[str, bool]:
    """Read flags that are on (true) or off (false).

    Raises:
        RunError: names every flag with another value.
    """
    wrong = [f"--{name} {quoted(value)}" for name, value in values.items() if value.lower() not in _ON]
    if wrong:
        raise RunError(f"{', '.join(wrong)}: neither on nor off", "pass on (true) or off (false)")
    return {name: _ON[value.lower()] for name, value in values.items()}


@dataclass(frozen=True)
class CacheOptions:
    """What is kept on disk.

    Attributes:
        cache_dir: the cache folder; None for `$VLM_SFT_CACHE` or ~/.cache/vlm_sft.
        prepared_cache: keep processed images and tokens on disk.
        feature_cache: "auto", "off" or a budget in bytes for frozen vision features.
    """

    cache_dir: Path | None = None
    prepared_cache: bool = True
    feature_cache: int | str = AUTO

    @classmethod
    def read(cls, cache_dir: Path | None, prepared_cache: str, feature_cache: str) -> CacheOptions:
        """Read the flags.

        Raises:
            RunError: a value is not one that the flag takes.
        """
        return cls(cache_dir, feature_cache=parse_feature_cache(feature_cache),
                   **read_switches(prepared_cache=prepared_cache))  # fmt: skip


@dataclass
class Caches:
    """The caches of one run.

    Attributes:
        options: what is kept.
        launch: the ranks.
        name, path: of the base model; its folder, or Hub id.
        facts: what run.json says under "engine".
    """

    options: CacheOptions
    launch: Launch
    name: str
    path: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The cache folder."""
        return self.options.cache_dir or default_cache_dir()

    def cache(self, encoder: Encoder) -> DataCache:
        """The cache of an encoder; one rank of a node checks what it opens."""
        first = self.launch.local_rank == 0
        return DataCache(encoder, self.root, self.name, first, self.options.prepared_cache, self.path)

    @contextmanager
    def node_in_turn(self) -> Iterator[None]:
        """Let the first rank of every node prepare and write; the others come after it and find it done."""
        waits = self.options.prepared_cache and self.launch.local_rank != 0
        if waits:
            barrier(self.launch.world_size)
        yield
        if self.options.prepared_cache and not waits:
            barrier(self.launch.world_size)

    def keep_features(
        self, model: Any, cache: DataCache, uses: Sequence[tuple[Sequence[Sample], float]], stage: str
    ) -> None:
        """Decide on vision features for images, compute what is missing, and say so.

        Args:
            model: the model, not yet wrapped for several devices.
            cache: gives the images from here on.
            uses: samples, one an image, and how often each image will be looked at.
            stage: "training" or "evaluation", for the line and for run.json.
        """
        launch = self.launch
        ranks = Ranks(
            launch.rank,
            launch.world_size,
            launch.local_rank,
            int(os.environ.get("LOCAL_WORLD_SIZE", launch.world_size)),
            "cpu" if launch.cpu else f"cuda:{launch.local_rank}",
        )
        decision = use_features(model, cache, uses, self.options.feature_cache, ranks)
        self.facts.setdefault("feature_cache", {})[stage] = decision.to_dict()
        kept = "kept" if decision.used else "computed anew each time"
        say(f"vision features ({stage}): {kept}: {decision.reason}")

    def evaluation_cache(self, model: Any, encoder: Encoder, samples: Sequence[Sample]) -> DataCache:
        """Prepare the images of benchmarks, and keep their vision features where that pays.

        Two models are expected to look at each image, in this command or in another one: a base and its adapter.

        Args:
            model: the model, on its device.
            encoder: of the backend that answers.
            samples: the questions.
        """
        firsts = one_an_image(samples)
        with self.node_in_turn():
            cache = self.cache(encoder)
            cache.prepare_images(firsts, "preparing (benchmarks)")
        self.keep_features(model, cache, [(firsts, 2.0)], "evaluation")
        return cache

    def describe(self, caches: Sequence[DataCache]) -> None:
        """Note the switches and what was prepared anew."""
        self.facts |= {
            "cache_dir": str(self.root),
            "prepared_cache": self.options.prepared_cache,
            "processed_images": sum(cache.processed_images for cache in caches),
            "tokenised_images": sum(cache.tokenised_groups for cache in caches),
        }


def one_an_image(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each image."""
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(sample.image_key, sample)
    return list(found.values())
