"""Norms and gated MLPs by liger-kernel: the values and gradients of the modules, or not used, with the reason."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_models import build
from vlm_sft.model.gpu import kernels, liger
from vlm_sft.model.gpu.kernels import choose_kernels

CPU = torch.device("cpu")


def language_model() -> Any:
    torch.manual_seed(0)
    model = build("qwen2_5_vl")[0].model.language_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def outcome(model: Any) -> list[torch.Tensor]:
    values = torch.randn(1, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    values = values.to(model.device, model.dtype).requires_grad_()
    output = model(inputs_embeds=values, use_cache=False).last_hidden_state
    norm = model.layers[0].input_layernorm.weight
    return [output.detach(), *torch.autograd.grad(output.float().cos().sum(), [values, norm])]


def compare(device: torch.device, dtype: torch.dtype, limit: float) -> None:
    """Exchange the parts of a model, and compare what it computes."""
    model = language_model()
    layers = len(model.layers)
    model.to(dtype)  # on the CPU still, as a training has it at that moment
    found = {name: (count, problem) for name, count, problem in liger.fused_parts(model, device)}
    assert found == {"norm": (2 * layers + 1, None), "mlp": (layers, None)}
    expected = outcome(language_model().to(device, dtype))
    for ours, exact in zip(outcome(model.to(device)), expected, strict=True):
        assert (ours.float() - exact.float()).norm() < limit * exact.float().norm()


@pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("liger_kernel")), reason="no GPU or no liger-kernel")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_liger_kernel_itself(dtype: torch.dtype, limit: float) -> None:
    compare(torch.device("cuda", torch.cuda.current_device()), dtype, limit)


class Norm:
    """What `LigerRMSNormFunction` documents, in PyTorch's operators."""

    @staticmethod
    def apply(
        values: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, casting: str, in_place: bool
    ) -> torch.Tensor:
        assert (casting, in_place) == ("llama", False)
        wide = values.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (offset + weight) * normed.to(values.dtype)


class Product:
    """What `LigerSiLUMulFunction` documents."""

    @staticmethod
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up


class Absent:
    @staticmethod
    def apply(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")


def provide(monkeypatch: pytest.MonkeyPatch, norm: Any = Norm, product: Any = Product) -> None:
    """Put functions with the contract of liger-kernel in its place."""
    package = ModuleType("liger_kernel")
    package.ops = SimpleNamespace(LigerRMSNormFunction=norm, LigerSiLUMulFunction=product)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", package.ops)
    monkeypatch.setattr(liger, "missing", lambda: None)


def test_every_norm_and_mlp_of_a_model_is_computed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch)
    monkeypatch.setattr(liger, "_trains", lambda values, dtype: values.dtype == dtype and torch.is_grad_enabled())
    compare(CPU, torch.float32, 1e-5)
    compare(CPU, torch.bfloat16, 0.03)


def test_what_has_no_gradients_or_another_format_keeps_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch)
    model = language_model()
    expected = outcome(model)
    assert [count for _, count, _ in liger.fused_parts(model, CPU)] == [2 * len(model.layers) + 1, len(model.layers)]
    provide(monkeypatch, Absent, Absent)
    assert all(torch.equal(ours, exact) for ours, exact in zip(outcome(model), expected, strict=True))


@pytest.mark.parametrize(
    ("norm", "product", "reason"),
    [
        (SimpleNamespace(apply=lambda v, w, e, *rest: Norm.apply(v, w, e, 1.0, *rest[1:])), Product, "other values"),
        (Norm, SimpleNamespace(apply=lambda gate, up: F.gelu(gate) * up), "other values"),
        (Absent, Absent, "does not run here (no kernel image)"),
    ],
)
def test_a_kernel_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, norm: Any, product: Any, reason: str
) -> None:
    provide(monkeypatch, norm, product)
    model = language_model()
    found = {name: (count, problem) for name, count, problem in liger.fused_parts(model, CPU)}
    wrong = [name for name, used in (("norm", norm is not Norm), ("mlp", product is not Product)) if used]
    for name, (count, problem) in found.items():
        assert (count == 0, problem is not None) == (name in wrong, name in wrong)
        assert name not in wrong or reason in str(problem)
    monkeypatch.setattr(liger, "fused_parts", lambda *_: [(name, *one) for name, one in found.items()])
    monkeypatch.setattr(kernels, "fused_rotary", lambda *_: [("rotary", 1, None)])
    used, notes = choose_kernels(model, torch.device("cuda", 0))
    assert used == {name: "stepwise" if name in wrong else "fused" for name in ("norm", "mlp", "rotary")}
    assert len(notes) == len(wrong) and all(reason in note for note in notes)


def test_weights_that_zero3_has_shared_out_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch)
    model = language_model()
    for parameter in model.parameters():
        parameter.ds_id = 0
        parameter.data = parameter.data.new_empty(0)
    assert [(name, count) for name, count, _ in liger.fused_parts(model, CPU)] == [("mlp", len(model.layers))]


@pytest.mark.skipif(bool(find_spec("liger_kernel")), reason="it is installed")
def test_a_gpu_without_liger_kernel_is_told_how_to_get_it() -> None:
    used, notes = choose_kernels(language_model(), torch.device("cuda", 0))
    assert used == {"norm": "stepwise", "mlp": "stepwise", "rotary": "stepwise"}
    assert all("liger-kernel is not installed (pip install 'vlm-sft[liger]')" in note for note in notes)
