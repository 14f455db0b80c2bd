"""Linear layers with LoRA in one step: the values and gradients of PEFT's module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.tiny_models import build
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.cpu.lora_linear import _covered_adapter, _one_step, fuse_lora
from vlm_sft.model.dropout import KeyedDropout
from vlm_sft.model.pack_context import PackContext, computing

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def layer(dtype: torch.dtype, bias: bool = True, **config: Any) -> tuple[Any, Any]:
    """A small network with one adapted linear layer, and that layer."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 20, bias=bias, dtype=dtype))
    wrapped = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **config))  # type: ignore[arg-type]
    found = wrapped.base_model.model[0].to(dtype)
    with torch.no_grad():
        found.lora_B["default"].weight.normal_(0, 0.2)
    return wrapped, found


def outcome(module: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    output = module(rows)
    trained = [module.lora_A["default"].weight, module.lora_B["default"].weight]
    wanted = [*trained, rows] if rows.requires_grad else trained
    return [output.detach(), *torch.autograd.grad(output.cos().sum(), wanted)]


@pytest.mark.parametrize("rows_trained", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LIMIT)
def test_values_and_gradients_are_those_of_peft(
    dtype: torch.dtype, bias: bool, dropout: float, rows_trained: bool
) -> None:
    _, module = layer(dtype, bias, use_rslora=True)
    if dropout:
        module.lora_dropout["default"] = KeyedDropout(dropout, 5)
    rows = torch.randn(1, 7, 12, dtype=dtype, requires_grad=rows_trained)
    with computing(PackContext(keys=torch.arange(7), step=3)):
        expected = outcome(module, rows)
        assert fuse_lora(module) == 1
        assert fuse_lora(module) == 0  # once is enough
        assert _covered_adapter(module, rows) == "default"
        found = outcome(module, rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=LIMIT[dtype], atol=LIMIT[dtype])
    with torch.no_grad(), computing(PackContext(keys=torch.arange(7), step=3)):
        torch.testing.assert_close(module(rows), found[0])


def half_precision(device: str, dtype: torch.dtype, master: bool, dropout: float) -> None:
    """Training in half precision is nearer to the values in float32 than PEFT's steps are, with the same masks."""
    _, exact = layer(torch.float32)
    exact.lora_dropout["default"] = KeyedDropout(dropout, 5) if dropout else nn.Identity()
    rows = torch.randn(1, 700, 12).to(dtype)
    results = []
    for fused in (None, False, True):
        module = copy.deepcopy(exact).to(device).requires_grad_(False)
        module.base_layer.to(torch.float32 if fused is None else dtype)
        for part in (module.lora_A, module.lora_B):
            part.to(torch.float32 if master or fused is None else dtype).requires_grad_(True)
        inputs = rows.to(device, torch.float32 if fused is None else dtype).requires_grad_()
        narrow = torch.autocast(device, dtype, enabled=fused is not None)
        with narrow, computing(PackContext(keys=torch.arange(700, device=device), step=3)):
            output = _one_step(module, "default", inputs) if fused else module(inputs)
        trained = [module.lora_A["default"].weight, module.lora_B["default"].weight, inputs]
        slopes = torch.autograd.grad(output.float().cos().sum(), trained)
        assert [one.dtype for one in slopes] == [one.dtype for one in trained]
        results.append([one.detach().float().cpu() for one in (output, *slopes)])
    for true, peft, ours in zip(*results, strict=True):
        assert (ours - true).norm() <= 1.1 * (peft - true).norm() + 1e-6 * true.norm()
        assert (ours - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("master", [True, False])
def test_half_precision_loses_no_more_than_peft(master: bool, dropout: float) -> None:
    half_precision("cpu", torch.bfloat16, master, dropout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_computes_training_in_one_step(dtype: torch.dtype, master: bool, dropout: float) -> None:
    half_precision("cuda", dtype, master, dropout)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_what_a_gpu_computes_in_one_step(adapter: torch.dtype) -> None:
    """Decided by formats and devices alone; tensors without storage stand for those of a GPU."""
    _, module = layer(torch.bfloat16)
    for part in (module.lora_A, module.lora_B):
        part.to(adapter)
    module.to("meta")
    rows = torch.empty(5, 12, dtype=torch.bfloat16, device="meta")
    same = adapter == torch.bfloat16
    assert _covered_adapter(module, rows) == ("default" if same else None)
    assert _covered_adapter(module, rows.float()) is None
    assert _covered_adapter(module, torch.empty(5, 12, dtype=torch.bfloat16)) is None
    with torch.no_grad():
        assert _covered_adapter(module, rows) is None, "evaluation rounds as PEFT does"
    module.base_layer.weight.requires_grad_(True)
    assert _covered_adapter(module, rows) is None


def test_switched_off_and_merged_adapters_are_left_to_peft() -> None:
    wrapped, module = layer(torch.float64)
    fuse_lora(wrapped)
    rows = torch.randn(5, 12, dtype=torch.float64)
    adapted = module(rows)
    with wrapped.disable_adapter():
        assert _covered_adapter(module, rows) is None
        torch.testing.assert_close(module(rows), module.base_layer(rows))
    module.merge()
    assert _covered_adapter(module, rows) is None
    torch.testing.assert_close(module(rows), adapted)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_left_to_peft(config: dict[str, Any]) -> None:
    _, module = layer(torch.float32, **config)
    rows = torch.randn(5, 12)
    expected = module(rows)
    fuse_lora(module)
    assert _covered_adapter(module, rows) is None
    assert torch.equal(module(rows), expected)


def test_half_precision_and_trained_bases_are_left_to_peft() -> None:
    _, module = layer(torch.float32)
    fuse_lora(module)
    assert _covered_adapter(module, torch.randn(5, 12)) == "default"
    assert _covered_adapter(module, torch.randn(5, 12).bfloat16()) is None
    module.base_layer.weight.requires_grad_(True)
    assert _covered_adapter(module, torch.randn(5, 12)) is None


def test_every_layer_of_a_new_adapter_is_fused() -> None:
    model, _ = build("qwen2_5_vl")
    targets = resolve_targets(model, ["q_proj", "v_proj"])
    wrapped = add_lora(model, targets, r=4, alpha=8, dropout=0.1, seed=0, base_name="tiny")
    fused = [name for name, module in wrapped.named_modules() if hasattr(module, "forward_stepwise")]
    assert len(fused) == len(targets.paths) > 0
    assert fuse_lora(wrapped) == 0
