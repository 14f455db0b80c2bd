"""The caches of a run: what is prepared once for all epochs, ranks, models and commands.

Training and evaluation share them. Every switch changes speed, disk and memory only; the mathematics stays the same.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_sft.common.console import detail
from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.cache.team import ALONE, Team
from vlm_sft.data.encode import Encoder
from vlm_sft.data.engine_options import AUTO, OFF, CacheOptions, EngineOptions
from vlm_sft.data.sample import Sample
from vlm_sft.distributed.collectives import agree, barrier, gather
from vlm_sft.distributed.launch import Launch
from vlm_sft.model.feature_precompute import use_features
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.vision_features import TowerCounter


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
        """The cache of an encoder; all ranks must call it."""
        return DataCache(encoder, self.root, self.name, self.team, self.options.prepared_cache, self.path)

    @cached_property
    def team(self) -> Team:
        """The ranks that share the work of filling the cache folder: those that find this rank's file in theirs."""
        return find_team(self.root, self.launch)

    def keep_features(
        self,
        model: AnyModel,
        cache: DataCache,
        uses: Sequence[tuple[Sequence[Sample], float]],
        stage: str,
        before: bool | None = None,
    ) -> None:
        """Decide on vision features for images, compute what is missing, and say so.

        Args:
            model: the model, not yet wrapped for several devices.
            cache: gives the images from here on.
            uses: samples, one per image, and how often each image will be used.
            stage: "training" or "evaluation", for the line and for run.json.
            before: what `auto` decided before a resume; None lets it decide.
        """
        budget = self.options.feature_cache
        if budget == AUTO and before is not None:
            budget = sys.maxsize if before else OFF
        decision = use_features(model, cache, uses, budget, self.launch.device)
        if budget == OFF and before is False and self.options.feature_cache == AUTO:
            decision = replace(decision, reason="as before the resume")
        self.facts.setdefault("feature_cache", {})[stage] = decision.to_dict()
        kept = "cached" if decision.used else "not cached"
        detail(f"vision features ({stage}): {kept}: {decision.reason}")

    def evaluation_cache(self, model: AnyModel, encoder: Encoder, samples: Sequence[Sample]) -> DataCache:
        """Prepare the images of benchmarks, and keep their vision features where that pays.

        Two models are expected to look at each image, in this command or in another one: a base and its adapter.

        Args:
            model: the model, on its device.
            encoder: of the backend that answers.
            samples: the questions.
        """
        firsts = one_an_image(samples)
        cache = self.cache(encoder)
        cache.prepare_images(firsts, "preparing (benchmarks)")
        self.keep_features(model, cache, [(firsts, 2.0)], "evaluation")
        return cache

    def describe(self, caches: Sequence[DataCache]) -> None:
        """Record the switches and what all ranks had to prepare; all ranks must call it."""
        counts = [(cache.processed_images, cache.tokenised_groups) for cache in caches]
        images, groups = (sum(numbers) for numbers in zip(*sum(gather(counts), []), strict=True))
        self.facts |= {
            "cache_dir": str(self.root),
            "prepared_cache": self.options.prepared_cache,
            "processed_images": images,
            "tokenised_images": groups,
        }


def find_team(root: Path, launch: Launch) -> Team:
    """Find the ranks that see the same cache folder: those of one machine, or of several that share a disk.

    All ranks must call it. A rank that cannot write there is in a team of its own.

    Args:
        root: the cache folder.
        launch: the ranks.
    """
    if launch.world_size == 1:
        return ALONE
    folder = root / f".probe-{agree(lambda: uuid.uuid4().hex)}"
    own = folder / str(launch.rank)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    barrier("look at the cache folder")
    try:
        # By their names: a list of the folder may be an old one where the disk is a network's.
        seen = [rank for rank in range(launch.world_size) if (folder / str(rank)).is_file()]
    except OSError:
        seen = []
    seen = seen if launch.rank in seen else [launch.rank]
    members = [rank for rank, others in enumerate(gather(seen)) if others == seen]
    with suppress(OSError):  # the last one removes the folder
        own.unlink(missing_ok=True)
        folder.rmdir()
    return Team(members.index(launch.rank), len(members), launch.world_size, launch.local_size, barrier, gather, agree)


def one_an_image(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each image; of text rows none."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.images:
            found.setdefault(sample.image_key, sample)
    return list(found.values())


@dataclass
class Engine(Caches):
    """The caches and the packing of one training."""

    options: EngineOptions

    def describe(self, caches: Sequence[DataCache]) -> None:
        """Record the switches and what had to be prepared."""
        super().describe(caches)
        self.facts |= {"share_images": self.options.share_images, "packing": self.options.packing}

    @contextmanager
    def counted(self, model: AnyModel) -> Iterator[None]:
        """Count the calls of the vision tower during the training, on this rank."""
        use = TowerCounter(model)
        try:
            yield
        finally:
            use.close()
            self.facts["training_tower"] = {"calls": use.calls, "images": use.images}
