"""Sizes and operations of the forecast against real models: parameters, FLOPs, kept activations, adapters on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tests import tiny_models
from tests.pictures import png
from tests.questions import questions
from vlm_sft.cli.main import main
from vlm_sft.data.collate import collate
from vlm_sft.data.dataset import group_lengths
from vlm_sft.data.encode import Encoder
from vlm_sft.data.image_tokens import qwen_grid
from vlm_sft.data.packing import Bundle, EpochPlanner
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.forecast import disk, flops, memory
from vlm_sft.forecast.flops import Adapter, Work
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.setting import RankLayout, Setting
from vlm_sft.forecast.shapes import FAMILIES as SIZED
from vlm_sft.forecast.shapes import find_published, model_shape, published_models
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import add_lora, parameter_counts, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu.fuse import fuse_gated
from vlm_sft.model.cpu.narrow import narrow_products
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.planning.run_setting import _counted_shape

TARGETS = ("q_proj", "v_proj", "o_proj")
RATES = Rates("test", 1e12, 1e11, 1e-6, 10**10, False, "made up", 1.3)
# Counts that the Hub shows for the published weights.
HUB_PARAMETERS = {
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}


def targets_of(family: str) -> tuple[str, ...]:
    """The modules that get LoRA: below the first of them no layer keeps anything, and Qwen3.5's has a state."""
    return ("in_proj_qkv", "in_proj_z", "out_proj", *TARGETS) if family == "qwen3_5" else TARGETS


def adapted(family: str, dropout: float = 0.0) -> tuple[Any, Encoder]:
    model, processor = tiny_models.build(family)
    set_attention(model, SHARED_SDPA)
    targets = resolve_targets(model, targets_of(family))
    return add_lora(model, targets, r=4, alpha=8, dropout=dropout, seed=0, base_name="tiny"), Encoder(
        processor, PromptSettings()
    )


def pack_of(model: Any, encoder: Encoder) -> tuple[Any, Any, Work]:
    """A pack, how it is computed, and its work."""
    groups = [encoder.encode(questions(seed, 3)) for seed in range(2)]
    mode = choose_mode(model, encoder)
    pack = [Bundle(0, (0, 1, 2)), Bundle(1, (0, 1))]
    lengths, visual = [group_lengths(group) for group in groups], [group.image_tokens for group in groups]
    work = flops.pack_work(pack, lengths, visual, not mode.shares)
    return collate(pack, groups), mode, work


@pytest.mark.parametrize("family", SIZED)
def test_parameters_and_operations(family: str) -> None:
    model, encoder = adapted(family)
    base = model.get_base_model()
    shape = model_shape(base.config.to_dict())
    assert shape is not None
    adapter = Adapter(4, TARGETS, dropout=False)
    trained, total = parameter_counts(model)
    assert (adapter.parameters(shape), shape.parameters) == (trained, total - trained)
    batch, mode, work = pack_of(model.train(), encoder)
    assert work.tokens == (batch.tokens if mode.shares else batch.padded_tokens) and work.supervised == len(
        batch.targets
    )
    with sdpa_kernel(SDPBackend.MATH), packed_forward.packed(batch, mode, 0), FlopCounterMode(display=False) as counter:
        loss = packed_forward.token_losses(model, batch, mode).sum()
        forward = counter.get_total_flops()
        loss.backward()
    tower = flops.tower_flops(shape, work.visual, work.visual_squares)
    assert flops.forward_flops(shape, work, adapter) + tower == pytest.approx(forward, rel=1e-3)
    # The plain kernel keeps the scores, and the first layer's keys, which are not adapted, need no gradient.
    product = 2 * shape.text.heads * shape.text.head_dim * work.squares
    said = flops.training_flops(shape, work, adapter) + tower - product * (shape.text.layers + 1)
    assert said == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize(
    ("family", "gpu", "narrow"),
    [
        ("qwen2_5_vl", False, False),
        ("qwen2_5_vl", True, False),
        ("qwen2_5_vl", False, True),
        ("qwen3_5", False, False),
        ("qwen3_5", False, True),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_what_autograd_keeps(dropout: float, family: str, gpu: bool, narrow: bool) -> None:
    """On a CPU with the fused modules that run there, in both formats; what runs on a GPU is the model without them."""
    model, encoder = adapted(family, dropout)
    assert not narrow or narrow_products(model.get_base_model().to(torch.bfloat16)) > 0
    assert trim_last_layer(model.get_base_model())
    assert gpu or fuse_gated(model) > 0
    batch, mode, work = pack_of(model.train(), encoder)
    config = tiny_models.build(family)[0].config
    shape = model_shape(config.to_dict()) or _counted_shape(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), packed_forward.packed(batch, mode, 0):
        packed_forward.token_losses(model, batch, mode).sum()
    setting = Setting(
        shape, Adapter(4, targets_of(family), dropout > 0), 2 if narrow else 4, False, replace(RATES, gpu=gpu)
    )
    assert memory.weight_bytes(setting) == (2 if narrow else 4) * shape.parameters
    assert (setting.scored, setting.blockwise_mlp) == (gpu, not gpu)
    said = memory.activation_bytes(setting, work) + memory.logit_bytes(setting, work.supervised)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert said == pytest.approx(real, rel=0.2)


def test_published_models_have_their_published_sizes() -> None:
    models = published_models()
    assert {name: models[name].shape.parameters for name in HUB_PARAMETERS} == HUB_PARAMETERS
    assert len(models) == 9 and all(model.source for model in models.values())
    with pytest.raises(ValueError, match="neither be opened here nor found"):
        find_published("Qwen/Qwen9-VL")


@pytest.mark.parametrize("size", [(600, 850), (20, 3000), (28, 28), (4000, 3000), (1, 1), (333, 777)])
def test_image_grid_is_the_processors(size: tuple[int, int]) -> None:
    for patch, low, high in ((14, 3136, 200_704), (16, 65_536, 1_000_000)):
        if max(size) / min(size) > 200:
            continue
        rows, columns = smart_resize(*size, factor=2 * patch, min_pixels=low, max_pixels=high)
        assert qwen_grid(*size, patch, 2, low, high) == (rows // patch, columns // patch)


def test_epoch_adds_up_its_packs() -> None:
    lengths = tuple(group_lengths(adapted("qwen2_vl")[1].encode(questions(seed, 4))) for seed in range(6))
    visual = [length.prefix - 5 for length in lengths]
    alone = flops.epoch_work(EpochPlanner(lengths, 8, 400, 1, 0), visual)
    assert alone.slowest == alone.total and alone.total.questions == 24
    assert alone.total.supervised == sum(sum(length.supervised) for length in lengths)
    assert alone.largest.tokens <= 400
    two = flops.epoch_work(EpochPlanner(lengths, 8, 400, 2, 0), visual)
    assert two.total.questions == 24
    assert two.total.tokens / 2 <= two.slowest.tokens < two.total.tokens


def test_zero_and_four_bits_save_what_they_should() -> None:
    shape = find_published("Qwen/Qwen2.5-VL-7B-Instruct").shape
    adapter = Adapter(16, TARGETS)
    setting = Setting(shape, adapter, 2, True, Rates("gpu", 1e14, 1e12, 1e-6, 80 * 2**30, True, "", 1.5))
    largest = Work(packs=1, tokens=8192, squares=8 * 1024**2, supervised=100, questions=16, images=8, visual=7000)

    def items(parallel: str, count: int, four_bit: bool = False) -> dict[str, float]:
        ranks = RankLayout(count, parallel)
        changed = Setting(shape, adapter, 2, True, setting.rates, four_bit, ranks=ranks)
        return memory.peak_items(changed, largest, 0, True)

    whole, shared, split = items("ddp", 8), items("zero2", 8), items("zero3", 8)
    assert whole["weights"] == shared["weights"] == 8_292_166_656 * 2 == 8 * split["weights"]
    assert shared["optimizer"] < whole["optimizer"] / 4
    assert items("single", 1, four_bit=True)["weights"] < 0.45 * whole["weights"]


@pytest.mark.parametrize("rounds", [1, 4])
def test_full_training_by_a_hand_count(rounds: int) -> None:
    """All of Qwen2.5-VL-7B on 8 GPUs; activations are whatever they are."""
    shape = find_published("Qwen/Qwen2.5-VL-7B-Instruct").shape
    weights, ranks = 8_292_166_656, 8
    setting = Setting(shape, Adapter(0, (), False, everything=True), 2, True, replace(RATES, gpu=True))
    pack = Work(packs=1, tokens=2048, squares=1024**2, supervised=20, questions=4, images=2, visual=1800)
    activations = memory.activation_bytes(setting, pack) + memory.logit_bytes(setting, 20)
    activations += memory.image_bytes(setting, pack, False)

    def said(parallel: str) -> float:
        shared = replace(setting, ranks=RankLayout(ranks, parallel))
        return sum(memory.peak_items(shared, pack, 0, False, rounds=rounds).values())

    sums = 2 if rounds > 1 else 1  # those of the step so far, and of the pack that is added
    buckets = 2 * 500_000_000 * 2
    # bfloat16 weights; a partition of float32 weights with two moments; whole bfloat16 gradients.
    kept = 2 * weights + 12 * weights / ranks
    reducing = 2 * weights + (2 + 4) * weights / ranks + buckets
    assert said("zero2") == pytest.approx(kept + max(2 * weights * sums + activations, reducing), rel=1e-6)
    assert said("zero2") > 53.8e9, "without the whole gradients it was said to be 45.7 GB"
    # float32 weights with two moments, their bfloat16 copies under autocast, whole float32 gradients.
    assert said("ddp") == pytest.approx((4 + 8 + 2 + 4 * sums) * weights + activations, rel=1e-6)
    assert said("zero3") < said("zero2") / 2


def test_adapter_bytes_are_those_on_disk(tmp_path: Any) -> None:
    model, _ = adapted("qwen2_5_vl")
    shape = model_shape(model.get_base_model().config.to_dict())
    assert shape is not None
    model.save_pretrained(tmp_path)
    said = disk.adapter_bytes(shape, Adapter(4, TARGETS))
    assert said == pytest.approx((tmp_path / "adapter_model.safetensors").stat().st_size, rel=0.02)
    state = {
        f"{name}.{part}": parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for part in ("exp_avg", "exp_avg_sq")
    }
    save_file(state, tmp_path / "state.safetensors")
    moments = disk.optimizer_bytes(shape, Adapter(4, TARGETS), "adamw_torch")
    assert moments == pytest.approx((tmp_path / "state.safetensors").stat().st_size, rel=0.1)


def test_tokens_that_stand_for_an_image_of_ovis_2_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.save("ovis2", tmp_path / "model")
    (tmp_path / "a.png").write_bytes(png(size=(56, 56)))
    row = {"image": "a.png", "question": "What?", "answer": "1"}
    rows = [row | {"split": split} for split in ("train", "validation", "test")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main(["plan", "--base_model", str(model), "--dataset", str(tmp_path / "own.jsonl")]) == 0
    assert "tokens of an image: 4 /" in capsys.readouterr().out
