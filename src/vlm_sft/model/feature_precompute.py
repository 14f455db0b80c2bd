"""The preparation pass of frozen vision features: whether it pays, and the pass itself."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.common.formats import size
from vlm_sft.data.cache.encoded import DataCache, record_key
from vlm_sft.data.cache.feature_names import AUTO, OFF, feature_record
from vlm_sft.data.cache.store import CacheFullError, Record, Store, record_bytes
from vlm_sft.data.sample import Sample
from vlm_sft.model.feature_choice import FeatureCost
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.sharing_check import features_doubt
from vlm_sft.model.vision_features import encode_images, features_problem, tower_settings, whole_tower

BATCH_PATCHES = 8192  # patches of one tower call in the preparation pass
PROBES = 4  # images that `auto` measures on
_LOOK = "look at the image; its questions are named if their loss is not finite"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether features are used, and why.

    Attributes:
        used: True when every image has its features.
        reason: one line for the user.
        images, computed: images that were requested, and those of them that the pass computed.
        bytes: approximate size of the features of the images.
        tower_seconds, read_seconds, write_seconds: of one image, where they were measured.
    """

    used: bool
    reason: str
    images: int = 0
    computed: int = 0
    bytes: int = 0
    tower_seconds: float | None = None
    read_seconds: float | None = None
    write_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values for run.json."""
        return asdict(self)


def use_features(
    model: AnyModel,
    cache: DataCache,
    uses: Sequence[tuple[Sequence[Sample], float]],
    budget: int | str,
    device: str = "cpu",
) -> Decision:
    """Decide whether to keep vision features; compute those that are missing, on all ranks, which all must call it.

    Args:
        model: the model, before it is wrapped for training on several devices.
        cache: gives the pixels, and from here on the features; its team shares the work.
        uses: samples, one per image, and how often each image will be used.
        budget: "off", "auto", or bytes of disk for the features of this model.
        device: of this process.

    Returns:
        The decision, the same on every rank.
    """
    cache.features = None
    reason = features_problem(model) or ("switched off with --feature_cache off" if budget == OFF else "")
    if reason or (reason := features_doubt(model, cache.encoder)):
        return Decision(False, reason)
    samples = {record_key(sample.image_key): sample for part, _ in uses for sample in part}
    looks = sum(len(part) * count for part, count in uses)
    try:
        with whole_tower(model, device):
            store = _open(model, cache, samples)
            missing = [sample for key, sample in samples.items() if key not in store]
            decision = cache.team.agree(lambda: _decide(model, cache, missing, len(samples), looks, budget, device))
            if not decision.used:
                return decision
            limit = None if budget == AUTO else int(budget) // cache.team.size
            problem = _compute_missing(model, cache, store, samples, limit)
    except (RunError, DataError) as error:  # the same on every rank
        return Decision(False, error.what)
    if problem:
        return Decision(False, problem, len(samples))
    cache.features = store
    return decision


def _open(model: AnyModel, cache: DataCache, samples: Mapping[str, Sample]) -> Store:
    """Map what is there of the features of images.

    Raises:
        RunError: a rank cannot write to its folder; every rank raises it.
    """
    store, problem = None, None
    try:
        store = cache.feature_store(tower_settings(model))
    except RunError as error:
        problem = error
    for found in cache.team.gather(problem):
        if found is not None:
            raise found
    assert store is not None
    store.open(samples)
    return store


def _decide(
    model: AnyModel,
    cache: DataCache,
    missing: Sequence[Sample],
    images: int,
    looks: float,
    budget: int | str,
    device: str,
) -> Decision:
    """Measure on a few images whether keeping features pays and fits; what is kept already is always used."""
    if not missing:
        return Decision(True, f"all {images:,} images have theirs in the cache", images)
    probes = list(missing[:: max(1, len(missing) // PROBES)])[:PROBES]
    cost = _measure(model, cache, probes, device)
    facts: dict[str, Any] = asdict(cost) | {"images": images, "bytes": round(cost.bytes * images)}
    problem = cost.objection(images, len(missing), looks, budget, shutil.disk_usage(cache.root).free)
    if problem:
        return Decision(False, problem, **facts)
    what = f"{size(cost.bytes * images)} ({cost.summary(looks / images)})"
    return Decision(True, f"computed once for {len(missing):,} images, {what}", computed=len(missing), **facts)


def _measure(model: AnyModel, cache: DataCache, probes: Sequence[Sample], device: str) -> FeatureCost:
    """What one image costs; features are read from the disk to the device."""
    images = [cache.pixel_tensors(sample) for sample in probes]
    encode_images(model, images[:1])
    began = time.perf_counter()
    records = [record for image in images for record in encode_images(model, [image])]
    tower = time.perf_counter() - began
    with tempfile.TemporaryDirectory(dir=cache.root, prefix=".probe") as folder:
        began = time.perf_counter()
        try:
            Store(Path(folder)).publish({str(index): record for index, record in enumerate(records)})
        except OSError as error:
            raise RunError(f"vision features cannot be kept: {error}", "pass another --cache_dir") from error
        write = time.perf_counter() - began
        _forget_pages(Path(folder))  # before it is mapped: mapped pages stay
        store = Store(Path(folder))
        store.open(map(str, range(len(records))))
        began = time.perf_counter()
        for index in range(len(records)):
            for value in (store.get(str(index)) or {}).values():
                value.to(device, copy=True)
        if device != "cpu":
            torch.cuda.synchronize(device)
        read = time.perf_counter() - began
    count = len(probes)
    return FeatureCost(sum(map(record_bytes, records)) / count, tower / count, read / count, write / count)


def _forget_pages(folder: Path) -> None:
    """Let the operating system drop what it holds of files in memory: a training's features are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _compute_missing(
    model: AnyModel, cache: DataCache, store: Store, samples: Mapping[str, Sample], limit: int | None
) -> str:
    """Compute what is missing, each rank of a team its share.

    Returns:
        Why not every image has its features, on this or another rank; "" where all have.
    """
    team, problem = cache.team, ""
    own = {key: sample for key, sample in samples.items() if team.owns(key) and key not in store}
    try:
        _compute(model, cache, store, own, limit)
    except (CacheFullError, OSError, DataError) as error:
        problem = f"they cannot be kept: {error}"
    team.wait(f"compute vision features of {len(samples):,} images{team.share}")
    store.open(samples)
    incomplete = sum(key not in store for key in samples)
    problem = problem or (f"{incomplete} images have none" if incomplete else "")
    return next((text for text in team.gather(problem) if text), "")


def _compute(model: AnyModel, cache: DataCache, store: Store, samples: Mapping[str, Sample], limit: int | None) -> None:
    """Run the tower over images and keep its output.

    Raises:
        CacheFullError: budget or disk have no room.
        OSError: the folder cannot be written.
        DataError: an image cannot be read, or has features that are not finite.
    """
    if not samples:
        return
    writer = store.writer(limit)
    with progress(len(samples), "vision features", "images") as bar:
        for keys, images in _batches(cache, samples):
            for key, image, features in zip(keys, images, encode_images(model, images), strict=True):
                if not all(value.isfinite().all() for value in features.values()):
                    raise DataError(f"{samples[key].images[0].source}: its vision features are not finite", _LOOK)
                writer.add(key, feature_record(features, image))
            bar.advance(len(keys))
    writer.close()


def _batches(cache: DataCache, samples: Mapping[str, Sample]) -> Iterator[tuple[list[str], list[Record]]]:
    """Images in batches of at most `BATCH_PATCHES`; one by one where patches of images are not simply in a row."""
    keys: list[str] = []
    images: list[Record] = []
    patches = 0
    for key, sample in samples.items():
        image = cache.pixel_tensors(sample)
        grid = image.get("image_grid_thw")
        added = BATCH_PATCHES if grid is None else int(grid.prod(-1).sum())
        if keys and patches + added > BATCH_PATCHES:
            yield keys, images
            keys, images, patches = [], [], 0
        keys.append(key)
        images.append(image)
        patches += added
    if keys:
        yield keys, images
