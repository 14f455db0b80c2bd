"""Gated MLPs of an unaligned width: a wider one gives the same values, and the module keeps its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from vlm_sft.model.cpu.fuse import gated_parameters
from vlm_sft.model.forward_patch import PLAIN
from vlm_sft.model.gpu.aligned_mlp import _gated, align_gated, widened


def mlp(width: int = 30, dtype: torch.dtype = torch.float64) -> Any:
    """A gated MLP of a Qwen2.5-VL tower, frozen."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(hidden_size=16, intermediate_size=width)
    return Qwen2_5_VLMLP(config, bias=True).to(dtype).requires_grad_(False)


def test_a_wider_mlp_gives_the_same_values() -> None:
    module = mlp()
    rows = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = module(rows)
    parameters = gated_parameters(module)
    assert parameters is not None
    wide = widened(module, parameters)
    assert [tuple(one.shape) for one in wide if one is not None] == [(64, 16), (64,), (64, 16), (64,), (16, 64), (16,)]
    found = _gated(rows, wide)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    slopes = [torch.autograd.grad(one.cos().sum(), rows)[0] for one in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-14, atol=1e-14)


def test_the_module_keeps_its_parameters_and_there_is_one_copy() -> None:
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = gated_parameters(module)
    assert parameters is not None
    wide = widened(module, parameters)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert module.gate_proj.weight.data_ptr() == wide[0].data_ptr()  # type: ignore[union-attr]
    assert widened(module, parameters) is wide
    for parameter in module.parameters():  # as a move to another device leaves them
        parameter.data = parameter.data.clone()
    again = widened(module, gated_parameters(module) or [])
    assert again is not wide and torch.equal(again[4], wide[4])  # type: ignore[arg-type]


def test_only_unaligned_widths_in_half_precision_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [mlp(30, torch.bfloat16), mlp(32, torch.bfloat16), mlp(30, torch.float32), nn.Linear(3, 4)]
    assert align_gated(nn.ModuleList(parts)) == 1 and hasattr(parts[0], "forward_stepwise")
    rows = torch.randn(5, 16, dtype=torch.bfloat16)
    assert torch.equal(parts[0](rows), parts[0].forward_stepwise(rows))  # on a CPU nothing is gained
    monkeypatch.setenv(PLAIN, "1")
    assert align_gated(mlp(30, torch.bfloat16)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_wider_one_is_computed() -> None:
    module = mlp(30, torch.bfloat16).cuda()
    rows = torch.randn(300, 16, dtype=torch.bfloat16, device="cuda")
    expected = module(rows)
    assert align_gated(module) == 1
    torch.testing.assert_close(module(rows), expected, rtol=0.02, atol=0.02)
    assert module.widened_parameters[0].shape == (64, 16)
