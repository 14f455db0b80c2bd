"""The preparation pass of frozen vision features: whether it pays, and the pass itself."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError, InterruptedRunError, RunError, VlmSftError
from vlm_sft.common.formats import size
from vlm_sft.data.cache.encoded import DataCache, record_key
from vlm_sft.data.cache.image_tensors import BEFORE_PROJECTOR, KEPT, feature_record
from vlm_sft.data.cache.store import CacheFullError, Record, Store, record_bytes
from vlm_sft.data.cache.team import Team
from vlm_sft.data.engine_options import AUTO, OFF
from vlm_sft.data.sample import Sample
from vlm_sft.model.attention import attention_name
from vlm_sft.model.cpu.matmul import stream_dtype
from vlm_sft.model.families import family_of
from vlm_sft.model.feature_choice import FeatureCost
from vlm_sft.model.forward_patch import reason_of
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.sharing_check import features_doubt
from vlm_sft.model.vision_features import (
    encode_images,
    inner_model,
    loose_parameters,
    tower_modules,
    trained_projector,
    unwrap,
    whole_tower,
)

BATCH_PATCHES = 8192  # patches of one tower call in the preparation pass
PROBES, MOST_PROBES = 4, 32  # images that each rank measures on: more than these few while they are small together
PROBE_PATCHES = 1024
Result = TypeVar("Result")
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
            cost = _measure(model, cache, missing, device)
            decision = cache.team.agree(lambda: _decide(cost, cache, len(missing), len(samples), looks, budget))
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


def features_problem(model: AnyModel) -> str:
    """Why a model cannot use kept features; "" when it can."""
    base = unwrap(model)
    name = type(base).__name__
    if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        return f"{name} of transformers {version('transformers')} does not take them"
    towers = tower_modules(model)
    if not towers or not hasattr(inner_model(model), "get_image_features"):
        return f"{name} has no separate vision tower"
    behind = {id(part) for projector in trained_projector(model) for part in projector.modules()}
    parts = [part for tower in towers.values() for part in tower.modules() if id(part) not in behind]
    if any(parameter.requires_grad for part in parts for parameter in part.parameters(recurse=False)):
        return "the vision tower is trained"
    # An adapter with a tower or projector of its own gives other features than its base, behind the same switch.
    if any(isinstance(part, BaseTunerLayer | ModulesToSaveWrapper) for part in parts):
        return "the adapter has its own vision tower or projector"
    return ""


def tower_settings(model: AnyModel) -> dict[str, Any]:
    """All that the features of an image depend on, besides its pixels; call it inside `whole_tower`."""
    base = unwrap(model)
    digest = hashlib.sha256()
    trained = tuple(f"{path}." for path in family_of(base.config).projector) if trained_projector(model) else ()
    values = {
        name: value
        for path, part in tower_modules(model).items()
        for name, value in part.state_dict(prefix=f"{path}.").items()
        if not name.startswith(trained)
    }
    for name, value in (values | loose_parameters(model)).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    weight = next(base.get_input_embeddings().parameters())
    vision = getattr(base.config, "vision_config", base.config)
    device = next(next(iter(tower_modules(model).values())).parameters()).device
    return {
        "model": type(base).__name__,
        "tower": digest.hexdigest(),
        "dtype": " in ".join(dict.fromkeys((str(weight.dtype), str(stream_dtype(weight))))),
        "attention": attention_name(vision),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    } | ({KEPT: BEFORE_PROJECTOR} if trained else {})


def _everywhere(team: Team, work: Callable[[], Result]) -> Result:
    """Do something on every rank; what one of them raises, all raise."""
    result: Result | None = None
    problem: VlmSftError | InterruptedRunError | None = None
    try:
        result = work()
    except (VlmSftError, InterruptedRunError) as error:
        problem = error
    except OSError as error:
        problem = RunError(f"vision features cannot be kept: {error}", "pass another --cache_dir")
    for found in team.gather(problem):
        if found is not None:
            raise found
    return cast(Result, result)


def _open(model: AnyModel, cache: DataCache, samples: Mapping[str, Sample]) -> Store:
    """Map what is there of the features of images.

    Raises:
        RunError: a rank cannot write to its folder; every rank raises it.
    """
    store = _everywhere(cache.team, lambda: cache.feature_store(tower_settings(model)))
    store.open(samples)
    return store


def _decide(
    cost: FeatureCost | None, cache: DataCache, missing: int, images: int, looks: float, budget: int | str
) -> Decision:
    """Whether keeping features pays and fits; what is kept already is always used.

    Args:
        cost: of one image; None where nothing is missing.
        cache, budget: as of `use_features`.
        missing, images: how many have no features yet, and how many there are.
        looks: how often an image will be used, over all of them.
    """
    if cost is None:
        return Decision(True, f"all {images:,} images have theirs in the cache", images)
    facts: dict[str, Any] = asdict(cost) | {"images": images, "bytes": round(cost.bytes * images)}
    problem = cost.objection(images, missing, looks, budget, shutil.disk_usage(cache.root).free)
    if problem:
        return Decision(False, problem, **facts)
    what = f"{size(cost.bytes * images)} ({cost.summary(looks / images)})"
    return Decision(True, f"computed once for {missing:,} images, {what}", computed=missing, **facts)


def _measure(model: AnyModel, cache: DataCache, missing: Sequence[Sample], device: str) -> FeatureCost | None:
    """What one image costs on the slowest rank, while all ranks write and read at the same time, as in a training.

    All ranks must call it.

    Args:
        model: with its whole tower.
        cache: whose disk is measured.
        missing: images without features; each rank measures a few of its own.
        device: to which features are read.

    Returns:
        None where no rank misses any.

    Raises:
        VlmSftError: an image cannot be read or the disk not be written, on this or another rank.
    """
    team = cache.team
    if not any(team.gather(len(missing))):
        return None
    own = missing[team.index :: team.size]
    probes = _everywhere(team, lambda: _probes(cache, own))
    with _everywhere(team, lambda: tempfile.TemporaryDirectory(dir=cache.root, prefix=".probe")) as name:
        folder = Path(name)
        bytes_, tower, write = _everywhere(team, lambda: _write_probes(model, probes, folder))
        _forget_pages(folder)  # before it is mapped: mapped pages stay
        team.wait("write vision features")
        read = _read_seconds(folder, len(probes), device)
        team.wait("read vision features")  # nobody's folder is removed while others still read
    found = [one for one in team.gather((bytes_, len(probes), tower, read, write)) if one[1]]
    slowest = (max(one[part] / one[1] for one in found) for part in (2, 3, 4))
    return FeatureCost(sum(one[0] for one in found) / sum(one[1] for one in found), *slowest)


def _probes(cache: DataCache, samples: Sequence[Sample]) -> dict[str, Record]:
    """A few images from all over the samples by number; many small ones, as the pass has them in one call."""
    chosen: dict[str, Record] = {}
    patches = 0
    spread = samples[:: max(1, len(samples) // MOST_PROBES)][:MOST_PROBES]
    stride = MOST_PROBES // PROBES  # the first few come from all over, too
    for sample in (one for first in range(stride) for one in spread[first::stride]):
        chosen[str(len(chosen))] = image = cache.pixel_tensors(sample)
        patches += _patches(image)
        if patches >= PROBE_PATCHES and len(chosen) >= PROBES:
            break
    return chosen


def _write_probes(model: AnyModel, probes: Mapping[str, Record], folder: Path) -> tuple[float, float, float]:
    """Bytes of the features of some images, and the seconds of computing and of writing them."""
    if not probes:
        return 0.0, 0.0, 0.0
    try:
        encode_images(model, list(probes.values())[:1])
    except VlmSftError:
        raise
    except Exception as error:  # an unknown tower may raise anything, and none of it may end a run
        why = f"the vision tower cannot be called alone ({reason_of(error)})"
        raise RunError(why, "pass --feature_cache off") from error
    began = time.perf_counter()
    records: dict[str, Record] = {}
    for keys, images in _batches(probes.items()):
        records.update(zip(keys, encode_images(model, images), strict=True))
    tower = time.perf_counter() - began
    began = time.perf_counter()
    Store(folder).publish(records)
    return float(sum(map(record_bytes, records.values()))), tower, time.perf_counter() - began


def _read_seconds(folder: Path, count: int, device: str) -> float:
    """Seconds of reading so many records from the disk to a device."""
    store = Store(folder)
    store.open(map(str, range(count)))
    began = time.perf_counter()
    for index in range(count):
        for value in (store.get(str(index)) or {}).values():
            value.to(device, copy=True)  # on a CPU, too: only a copy reads what is mapped
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


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
        for keys, images in _batches((key, cache.pixel_tensors(sample)) for key, sample in samples.items()):
            for key, image, features in zip(keys, images, encode_images(model, images), strict=True):
                if not all(value.isfinite().all() for value in features.values()):
                    raise DataError(f"{samples[key].images[0].source}: its vision features are not finite", _LOOK)
                writer.add(key, feature_record(features, image))
            bar.advance(len(keys))
    writer.close()


def _patches(image: Record) -> int:
    """Patches of an image; as many as a call takes where patches of images are not simply in a row."""
    grid = image.get("image_grid_thw")
    return BATCH_PATCHES if grid is None else int(grid.prod(-1).sum())


def _batches(found: Iterable[tuple[str, Record]]) -> Iterator[tuple[list[str], list[Record]]]:
    """Images by their keys, in batches of at most `BATCH_PATCHES`."""
    keys: list[str] = []
    images: list[Record] = []
    patches = 0
    for key, image in found:
        added = _patches(image)
        if keys and patches + added > BATCH_PATCHES:
            yield keys, images
            keys, images, patches = [], [], 0
        keys.append(key)
        images.append(image)
        patches += added
    if keys:
        yield keys, images
