"""Kept vision features against the vision tower in the model: the same bits, the same loss, and no tower call."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.parity.test_part_lora import tuned
from tests.questions import PROMPT, picture, questions, tiny
from tests.tiny_models import FAMILIES
from vlm_sft.common.errors import RunError
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.cache.image_tensors import FEATURE_PREFIX, is_pixels
from vlm_sft.data.cache.team import Team
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import feature_precompute, packed_forward
from vlm_sft.model.families import PackMode
from vlm_sft.model.feature_precompute import Decision, _measure, features_problem, tower_settings, use_features
from vlm_sft.model.load import SHARED_SDPA, set_attention
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.vision_features import TowerCounter, start_training

# Not (28, 28): transformers' Mistral 3 cannot compute a single picture of one visual token.
SIZES = [(72, 56), (140, 90), (30, 28), (56, 300)]
LARGE = 10**9


def prepared(family: str, root: Path) -> tuple[torch.nn.Module, PreparedData, DataCache]:
    """A tiny adapted model, questions on images of different sizes, and their cache."""
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    cache = DataCache(encoder, root, family)
    samples = [sample for seed, size in enumerate(SIZES) for sample in questions(seed, 2, size)]
    start_training(model)
    return model, PreparedData(samples, encoder, "preparing", cache), cache


def keep(model: torch.nn.Module, data: PreparedData, cache: DataCache, budget: int | str = LARGE) -> Decision:
    return use_features(model, cache, [(data.image_samples(), 6)], budget)


@lru_cache(maxsize=1)
def mode_of(model: torch.nn.Module, encoder: Encoder) -> PackMode:
    """How a model's packs are computed: decided once, as in a run, because that calls the tower."""
    return choose_mode(model, encoder)


def packs(model: torch.nn.Module, data: PreparedData) -> list[PackedBatch]:
    """The questions in one pack and one by one; only one by one where the family cannot share."""
    alone = [collate([Bundle(group, (0,))], data) for group in range(len(data))]
    if not mode_of(model, data.encoder).shares:
        return alone
    return [collate([Bundle(group, (0, 1)) for group in range(len(data))], data), *alone]


def logits(model: torch.nn.Module, batch: PackedBatch, data: PreparedData) -> torch.Tensor:
    mode = mode_of(model, data.encoder)
    with torch.no_grad(), packed_forward.packed(batch, mode, 0):
        return packed_forward.forward(model, batch, mode).logits


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of matrix products: with several, how the rows are divided depends on the batch, and so do last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_frozen_tower_drops_nothing_in_training() -> None:
    """Granite 4 Vision's projector has dropout: each look at an image would get other features than the kept ones."""
    model, encoder = tiny("granite4_vision", torch.float32, SHARED_SDPA)
    inner = model.get_base_model().model
    tensors = encoder.process_images(questions(0, 1)[0])

    def features() -> torch.Tensor:
        return inner.get_image_features(**tensors, return_dict=True).deepstack_features[0][1][0]

    model.eval()
    expected = features()
    start_training(model)
    assert torch.equal(features(), expected)
    choose_mode(model, encoder)  # computes in evaluation mode, and leaves every module as it was
    assert model.training and inner.language_model.training and not inner.vision_tower.training
    inner.layerwise_projectors.requires_grad_(True)
    start_training(model)
    assert not torch.equal(features(), expected) and not inner.vision_tower.training


SEVERAL = [family for family in FAMILIES if family not in tiny_models.LATER]  # are enough for several threads


@pytest.mark.parametrize(
    ("family", "threads"), [(f, 1) for f in FAMILIES] + [(f, 2) for f in SEVERAL], indirect=["threads"]
)
def test_features_are_what_the_tower_computes(family: str, threads: int, tmp_path: Path) -> None:
    model, data, cache = prepared(family, tmp_path)
    pixels = packs(model, data)
    online = [logits(model, batch, data) for batch in pixels]
    decision = keep(model, data, cache)
    assert decision.used and decision.computed == len(SIZES), decision
    use = TowerCounter(model)
    batches = packs(model, data)
    kept = [logits(model, batch, data) for batch in batches]
    assert use.calls == 0
    assert all(any(name.startswith(FEATURE_PREFIX) for name in image) for batch in batches for image in batch.tensors)
    assert not any(name.startswith("pixel_") for batch in batches for image in batch.tensors for name in image)
    # Where the tower was called with the same images, the values are the same bits, on one thread. In another batch
    # some processors' matrix products round differently (with few rows), and so do several threads.
    together = "image_grid_thw" in pixels[0].tensors[0]
    for left, right, batch in zip(online, kept, batches, strict=True):
        if threads == 1 and len(batch.tensors) == (len(SIZES) if together else 1):
            assert torch.equal(left, right)
        else:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_online_tower_is_counted(tmp_path: Path) -> None:
    model, data, _ = prepared("qwen2_5_vl", tmp_path)
    batch = packs(model, data)[0]
    use = TowerCounter(model)
    logits(model, batch, data)
    assert (use.calls, use.images) == (1, len(SIZES))
    use.close()
    logits(model, batch, data)
    assert use.calls == 1


def test_deepstack_features_are_kept(tmp_path: Path) -> None:
    model, data, cache = prepared("qwen3_vl", tmp_path)
    keep(model, data, cache)
    names = {name for name in data[0].tensors if name.startswith(FEATURE_PREFIX)}
    assert f"{FEATURE_PREFIX}pooled.0" in names and any("deepstack" in name for name in names)


def test_many_pictures_of_a_question_keep_their_order(tmp_path: Path) -> None:
    model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    cache = DataCache(encoder, tmp_path, "tiny")
    sample = replace(questions(0, 1)[0], images=tuple(picture(seed, (28, 28)) for seed in range(12)))
    data = PreparedData([sample], encoder, "preparing", cache)
    online = logits(model, collate([Bundle(0, (0,))], data), data)
    assert keep(model, data, cache).used
    assert torch.equal(online, logits(model, collate([Bundle(0, (0,))], data), data))


def gradients(model: torch.nn.Module, batch: PackedBatch, mode: PackMode) -> dict[str, torch.Tensor]:
    """The losses of a pack, and the gradients of everything that is trained."""
    model.zero_grad()
    with packed_forward.packed(batch, mode, 0):
        losses = packed_forward.token_losses(model, batch, mode)
        losses.sum().backward()
    grown = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"losses": losses.detach(), **grown}


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("train", ["language,projector_lora", "projector"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava", "ovis2", "llama4"])
def test_a_trained_projector_is_fed_from_the_cache(family: str, train: str, threads: int, tmp_path: Path) -> None:
    """Several mergers, a projector that is called twice, one that the model calls itself.

    Images are alone when they are kept, and together in a pack: some processors round differently then.
    """
    if family not in FAMILIES or (family, train) == ("ovis2", "language,projector_lora"):  # an embedding takes no LoRA
        pytest.skip("nothing to compare")
    model, processor, _ = tuned(family, train=train, lora_dropout=0)
    set_attention(model.get_base_model(), SHARED_SDPA)
    encoder = Encoder(processor, PROMPT)
    cache = DataCache(encoder, tmp_path, family)
    data = PreparedData(
        [one for seed, size in enumerate(SIZES) for one in questions(seed, 2, size)], encoder, "", cache
    )
    start_training(model)
    mode = mode_of(model, encoder)
    chosen = [[Bundle(group, (0, 1)) for group in range(len(data))], [Bundle(1, (0,))]]
    online = [gradients(model, collate(bundles, data), mode) for bundles in chosen]
    decision = keep(model, data, cache)
    assert decision.used and decision.computed == len(SIZES), decision
    with torch.no_grad():  # what is trained changes nothing of what is kept
        moved = [(value, value.clone()) for value in model.parameters() if value.requires_grad]
        before = tower_settings(model)
        for value, _ in moved:
            value.zero_()
        assert tower_settings(model) == before
        for value, former in moved:
            value.copy_(former)
    use = TowerCounter(model)
    for bundles, expected in zip(chosen, online, strict=True):
        batch = collate(bundles, data)
        assert not any(name.startswith("pixel_") for image in batch.tensors for name in image)
        found = gradients(model, batch, mode)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))
        assert any("projector" in name or "merger" in name or "connector" in name or "table" in name for name in found)
    assert use.calls == 0
    (entry,) = (tmp_path / "features").iterdir()
    assert json.loads((entry / "entry.json").read_text())["settings"]["kept"] == "inputs of the projector"


@pytest.mark.parametrize(
    ("family", "reason"), [("llava_next", "no rows of what the projector"), ("mistral3", "takes more than the output")]
)
def test_a_projector_that_cannot_be_run_apart(family: str, reason: str, tmp_path: Path) -> None:
    model, processor, _ = tuned(family, train="projector")
    encoder = Encoder(processor, PROMPT)
    cache = DataCache(encoder, tmp_path, family)
    decision = use_features(model, cache, [(questions(0, 1), 6)], LARGE)
    assert not decision.used and "cannot be run apart from its tower" in decision.reason and reason in decision.reason


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    model, data, cache = prepared("qwen2_5_vl", tmp_path)
    keep(model, data, cache)
    _, again, other = prepared("qwen2_5_vl", tmp_path)
    use = TowerCounter(model)
    decision = keep(model, again, other, "auto")
    assert decision.used and decision.computed == 0 and use.calls == 0


def test_other_weights_have_other_features(tmp_path: Path) -> None:
    model, data, cache = prepared("qwen2_5_vl", tmp_path)
    keep(model, data, cache)
    before = tower_settings(model)
    tower = packed_forward.unwrap(model).model.visual
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1e-6
    assert tower_settings(model) != before
    assert keep(model, data, cache).computed == len(SIZES)


def test_adapter_weights_change_no_features(tmp_path: Path) -> None:
    model, _, _ = prepared("qwen2_5_vl", tmp_path)
    before = tower_settings(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert tower_settings(model) == before


def test_reasons_against(tmp_path: Path) -> None:
    model, data, cache = prepared("qwen2_5_vl", tmp_path)
    assert "switched off" in keep(model, data, cache, "off").reason
    assert "do not fit" in keep(model, data, cache, 1000).reason
    once = use_features(model, cache, [(data.image_samples(), 1)], "auto")
    assert not once.used and "recomputing is faster" in once.reason  # one look at an image is what computing it takes
    assert cache.features is None
    next(packed_forward.unwrap(model).model.visual.parameters()).requires_grad_(True)
    assert features_problem(model) == "the vision tower is trained"
    assert not keep(model, data, cache).used


def from_disk() -> int:
    """Bytes that the disk, not memory, has given this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not tell what it has read")
def test_reading_is_measured_from_the_disk(tmp_path: Path) -> None:
    """What was written a moment ago lies in memory, where the features of a large training do not."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout.strip()
    if kind not in ("ext2/ext3", "xfs", "btrfs"):
        pytest.skip(f"{kind} need not have a disk")
    model, data, cache = prepared("qwen2_5_vl", tmp_path)
    keep(model, data, cache, 1000)  # whatever else has to be read is in memory from here on
    before = from_disk()
    decision = keep(model, data, cache, 1000)
    assert "do not fit" in decision.reason and decision.bytes > 0
    assert from_disk() - before >= decision.bytes  # of the four images that are measured, which are all there are


def test_all_ranks_measure_at_the_same_time_and_the_slowest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, _ = prepared("qwen2_5_vl", tmp_path)
    meeting = threading.Barrier(2, timeout=60)
    boxes: list[Any] = [None, None]
    together: list[int] = []

    def on_rank(index: int) -> Any:
        def gather(value: Any) -> list[Any]:
            boxes[index] = value
            meeting.wait()
            found = list(boxes)
            meeting.wait()
            return found

        cache = DataCache(data.encoder, tmp_path, "tiny", Team(index, 2, 2, 2, lambda what: meeting.wait(), gather))
        return _measure(model, cache, data.image_samples(), "cpu")

    def read(folder: Path, count: int, device: str) -> float:
        meeting.wait()  # passed only where both are here
        together.append(count)
        return float(len(together))

    monkeypatch.setattr(feature_precompute, "_read_seconds", read)
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(on_rank, range(2))
    assert first == second and together == [2, 2], "each on its own half of the four images"
    assert first.read_seconds == 1.0 and first.tower_seconds > 0


def test_small_images_are_measured_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, cache = prepared("qwen2_5_vl", tmp_path)
    samples = [one for seed in range(40) for one in questions(seed, 1, (56, 56))]
    use = TowerCounter(model)
    assert _measure(model, cache, samples, "cpu") is not None
    assert (use.calls, use.images) == (2, 1 + 32), "once before the clock runs"
    monkeypatch.setattr(feature_precompute, "PROBE_PATCHES", 1)
    chosen = feature_precompute._probes(cache, samples)
    expected = [cache.pixel_tensors(samples[index]) for index in (0, 8, 16, 24)]
    for image, sample in zip(chosen.values(), expected, strict=True):
        assert all(torch.equal(image[name], sample[name]) for name in sample)


def test_what_one_rank_cannot_write_stops_all(tmp_path: Path) -> None:
    model, data, cache = prepared("qwen2_5_vl", tmp_path)
    elsewhere = RunError("vision features cannot be kept: no room", "pass another --cache_dir")
    team = Team(0, 2, 2, 1, gather=lambda value: [value, elsewhere if value is None else value])
    cache = DataCache(data.encoder, tmp_path, "tiny", team)
    assert keep(model, data, cache).reason == elsewhere.what
    assert not list(tmp_path.glob(".probe*"))


def test_features_without_prepared_images(tmp_path: Path) -> None:
    model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    cache = DataCache(encoder, tmp_path, "tiny", prepared=False)
    data = PreparedData(questions(0, 3), encoder, "preparing", cache)
    online = logits(model, collate([Bundle(0, (0, 1, 2))], data), data)
    assert keep(model, data, cache).used
    assert torch.equal(online, logits(model, collate([Bundle(0, (0, 1, 2))], data), data))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_damaged_features_are_computed_when_they_are_needed(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, cache = prepared(family, tmp_path)
    assert keep(model, data, cache).used
    whole = [logits(model, batch, data) for batch in packs(model, data)]
    (shard,) = (tmp_path / "features").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.unlink()
    shard.write_bytes(content)
    model, data, cache = prepared(family, tmp_path)
    assert keep(model, data, cache).computed == 0 and "damaged" not in capsys.readouterr().err
    batches = packs(model, data)
    assert capsys.readouterr().err.count("the checksum of a record does not match") == 1
    kinds = {is_pixels(name) for image in batches[0].tensors for name in image}
    assert kinds == {True, False}  # some images of the pack have features, one has pixels
    for batch, expected in zip(batches, whole, strict=True):
        torch.testing.assert_close(logits(model, batch, data), expected, rtol=1e-4, atol=1e-5)
