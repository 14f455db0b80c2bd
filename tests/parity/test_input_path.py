"""What travels to the device and what is waited for there: the same values in fewer bytes, without stops in between."""

from __future__ import annotations

import inspect
import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny_models
from tests.questions import PROMPT, questions, tiny
from vlm_sft.common.errors import RecipeError
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.cache.image_tensors import FEATURE_PREFIX
from vlm_sft.data.collate import PackedBatch, collate, split_pack
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.loader import StepDataset, StepLoader
from vlm_sft.data.packing import Bundle, EpochPlanner
from vlm_sft.distributed.launch import Launch, expand_segments
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA, PackLayout
from vlm_sft.model.cpu import matmul
from vlm_sft.model.families import FAMILIES, PackMode
from vlm_sft.model.feature_precompute import use_features
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.packed_forward import Positions
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.model.vision_features import encode_images, inner_model
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.recipe.load import load_recipe

SIZES = [(72, 56), (140, 90), (56, 300)]
SHARING = [family for family in tiny_models.FAMILIES if not FAMILIES.get(family) or not FAMILIES[family].reason]
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
    "aten::is_nonzero",
}

# Functions of transformers that run once a pack, in front of the first layer.
AT_THE_IMAGES = {"get_placeholder_mask", "torch_compilable_check"}
IN_THE_TOWER = {
    "get_vision_position_ids",
    "get_vision_cu_seqlens",
    "get_vision_window_index",
    "get_max_seqlen",
    "get_image_features",
}


def prepare(root: Path, coded: bool, family: str = "qwen2_5_vl") -> tuple[PreparedData, DataCache]:
    _, processor = tiny_models.build(family)
    encoder = Encoder(processor, PROMPT)
    cache = DataCache(encoder, root, "tiny")
    cache.coded = coded
    asked = [sample for seed, size in enumerate(SIZES) for sample in questions(seed, 3, size)]
    return PreparedData(asked, encoder, "preparing", cache), cache


def tensor_bytes(batch: PackedBatch) -> int:
    return sum(value.numel() * value.element_size() for image in batch.tensors for value in image.values())


@pytest.mark.parametrize("family", SHARING)
def test_positions_need_no_model(family: str) -> None:
    """From another process they are what transformers computes for each question alone behind its image."""
    model, processor = tiny_models.build(family)
    encoder = Encoder(processor, PROMPT)
    groups = [encoder.encode(questions(seed, 3, size)) for seed, size in enumerate(SIZES)]
    batch = collate([Bundle(0, (2, 0)), Bundle(2, (1,)), Bundle(1, (0, 1, 2))], groups)
    place = pickle.loads(pickle.dumps(Positions(model)))
    assert not list(place._bare.parameters()) if place._bare is not None else True
    found = place(batch)
    rope_index = getattr(inner_model(model), "get_rope_index", None)
    for image, ends in enumerate(batch.ends):
        begin, end = ends[:2]
        for start, stop in zip(ends[1:], ends[2:], strict=False):
            alone = torch.cat([torch.arange(begin, end), torch.arange(start, stop)])
            expected = torch.arange(len(alone))[None]
            if rope_index is not None:
                ids = batch.input_ids[:, alone]
                given = batch.tensors[image] | {"mm_token_type_ids": batch.prefix_types[None, alone]}
                given["attention_mask"] = torch.ones_like(ids)
                wanted = inspect.signature(rope_index).parameters
                taken = {name: value for name, value in given.items() if name in wanted}
                expected = rope_index(ids, **taken)[0][-len(found) :, 0]
            assert torch.equal(found.reshape(-1, batch.tokens)[:, alone], expected)
    batch.positions = found
    assert packed_forward.position_ids(model, batch) is found
    for half in split_pack(batch) or ():
        assert torch.equal(half.positions, place(half))


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_travel_as_codes(tmp_path: Path, workers: int) -> None:
    """An eighth of the bytes from worker to device, and the same bits there, also in two halves and for the tower."""
    model, _ = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    batches: list[list[PackedBatch]] = []
    for coded in (False, True):
        data, cache = prepare(tmp_path, coded)
        planner = EpochPlanner(data.lengths, 9, 10_000, 1, 0)
        (step,) = StepLoader(StepDataset(data, planner, 0, place=Positions(model)), workers)
        (batch,) = step.packs
        batches.append([batch, *(split_pack(batch) or ())])
        pixels = [cache.pixel_tensors(sample) for sample in data.image_samples()]
        features = encode_images(model, pixels)
        assert len(features) == len(SIZES)
        batches[-1][0].positions = None if not coded else batch.positions
    whole, packed = batches[0][0], batches[1][0]
    assert tensor_bytes(packed) < tensor_bytes(whole) / 7
    assert all("pixel_values.codes" in image for image in packed.tensors)
    device = torch.device("cpu")
    for plain, coded_batch in zip(*batches, strict=True):
        for left, right in zip(plain.to(device).tensors, coded_batch.to(device).tensors, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    losses = []
    for batch in (whole, packed):
        gradients = StepGradients(model, PackMode(), 0, 1.0, lambda: torch.autocast("cpu", enabled=False))
        gradients.add(batch)
        assert gradients.problem(float(gradients.loss)) is None
        # What a table holds for codes that do not occur is not a number; that is no fault of the image.
        found = gradients.problem(float("nan"))
        assert found is not None and found["source"] == "loss" and not found["sample_ids"]
        losses.append(gradients.loss)
    assert torch.equal(*losses)


def test_features_of_coded_pixels(tmp_path: Path) -> None:
    model, _ = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    found = []
    for coded in (False, True):
        data, cache = prepare(tmp_path, coded)
        pixels = [cache.pixel_tensors(sample) for sample in data.image_samples()]
        found.append(encode_images(model, pixels))
    for exact, ours in zip(*found, strict=True):
        assert exact.keys() == ours.keys() and all(torch.equal(exact[name], ours[name]) for name in exact)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_features_are_kept_of_coded_pixels(tmp_path: Path, family: str) -> None:
    """The whole pass, as a GPU has it: measured, computed in batches, stored, and read by the packs."""
    model, _ = tiny(family, torch.float32, SHARED_SDPA)
    kept = []
    for name, coded in (("plain", False), ("coded", True)):
        data, cache = prepare(tmp_path / name, coded, family)
        decision = use_features(model, cache, [(data.image_samples(), 6)], 10**9)
        assert decision.used and decision.computed == len(SIZES), decision
        kept.append([data[index].tensors for index in range(len(SIZES))])
    for exact, ours in zip(*kept, strict=True):
        assert exact.keys() == ours.keys() and any(name.startswith(FEATURE_PREFIX) for name in ours)
        assert all(torch.equal(exact[name], ours[name]) for name in exact)


class Waits(TorchDispatchMode):
    """Notes the operations whose result the CPU has to wait for on a GPU, and the line that asked for each."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        ours = [frame for frame in frames if "vlm_sft/" in frame.filename or "/transformers/" in frame.filename]
        last = ours[-1]
        self.places.append(f"{last.filename.rpartition('/src/')[2].rpartition('site-packages/')[2]}:{last.name} {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = args[1] if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        if func.name() in WAITING or any(one is not None and one.dtype == torch.bool for one in masks):
            self.note(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Notes operations, and the methods that read a tensor without one."""
    with monkeypatch.context() as patch, Waits() as found:
        for name in ("tolist", "cpu", "numpy"):
            method = getattr(torch.Tensor, name)

            def noted(tensor: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                found.note(name)
                return method(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, noted)
        yield found


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_pack_is_computed_without_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool, trimmed: bool
) -> None:
    """Forward and backward of a pack: our code asks for no value; transformers asks at the images, once a pack."""
    model, _ = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA, dropout=0.1)
    if trimmed:
        trim_last_layer(packed_forward.unwrap(model))
    data, _ = prepare(tmp_path, coded=True)
    place = Positions(model)
    batch = collate([Bundle(0, (2, 0)), Bundle(2, (1,)), Bundle(1, (0, 1, 2))], data)
    batch.positions = place(batch)
    if kept:
        features = encode_images(model, batch.tensors)
        sizes = [image["image_grid_thw"] for image in batch.tensors]
        batch.tensors = [
            {FEATURE_PREFIX + name: value for name, value in image.items()} | {"image_grid_thw": size}
            for image, size in zip(features, sizes, strict=True)
        ]
    gradients = StepGradients(model, PackMode(), 0, 1.0, lambda: torch.autocast("cpu", enabled=False))
    matmul._onednn()  # checked once a process, on CPUs only
    with waits(monkeypatch) as found:
        gradients.add(batch)
    assert gradients.loss > 0
    ours = [place for place in found.places if "vlm_sft/" in place and "restore" not in place]
    assert set(ours) <= {"vlm_sft/model/attention.py:_window_sizes tolist"} and len(ours) <= (0 if kept else 2)
    theirs = {place.split(":", 1)[1].split()[0] for place in found.places if "vlm_sft/" not in place}
    assert theirs <= AT_THE_IMAGES | (set() if kept else IN_THE_TOWER), found.places


@pytest.mark.parametrize(
    ("given", "flags", "on_cpu", "on_gpu"),
    [
        (0, {}, 0, 4),
        (2, {}, 2, 2),
        ("auto", {}, 0, 4),
        (0, {"dataloader_num_workers": "0"}, 0, 0),
        (6, {"dataloader_num_workers": "6"}, 6, 6),
        ("auto", {"dataloader_num_workers": "auto"}, 0, 4),
    ],
)
def test_a_gpu_has_workers_where_nobody_chose(given: Any, flags: dict[str, object], on_cpu: int, on_gpu: int) -> None:
    recipe = load_recipe(None, {"dataloader_num_workers": given} | flags)
    assert recipe.dataloader_num_workers == given, "the recipe stays as it was given"
    for cpu, expected in ((True, on_cpu), (False, on_gpu)):
        launch = Launch(0, 0, 1, cpu, None, "single")
        record: Any = None
        run = TrainingRun(TrainOptions(output_dir=Path("run"), overrides=flags), recipe, [], launch, record, None)
        assert run.data_workers == expected


@pytest.mark.parametrize("value", ["-1", "many", "257", "0.5"])
def test_a_number_of_workers_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match='allowed: "auto" or a whole number at least 0 and at most 256'):
        load_recipe(None, {"dataloader_num_workers": value})


@pytest.mark.parametrize("given", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("cpu", [True, False])
def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, cpu: bool, given: str) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:128")
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", dict(before))
    expand_segments(Launch(0, 0, 1, cpu, None, "single"))
    added = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert added == ({} if cpu or given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_the_rows_of_a_layout_are_known_or_counted() -> None:
    branches = [[0, 7, 12, 15], [15, 20, 29]]
    rows = torch.tensor([8, 10, 13, 22, 23, 28])
    for known in ([3, 3], None):
        parts = PackLayout(29, branches, rows=known).parts(rows)
        assert [part.tolist() for part in parts] == [[8, 10, 13], [7, 8, 13]]
