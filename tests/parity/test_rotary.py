"""Queries and keys turned by liger-kernel: the values and gradients of the functions of transformers, or left alone."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_models import build
from vlm_sft.model.gpu import liger, rotary
from vlm_sft.model.gpu.rotary import FUNCTION, fused_rotary

CPU = torch.device("cpu")
TURNED = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3")
OTHERS = {
    "glm4": "gives other values than",  # pairs neighbouring channels
    "gpt_oss": "gives other values than",  # angles without a second half
}


class Rope(torch.autograd.Function):
    """What `LigerRopeFunction` documents, in PyTorch's operators: it reads half of the angles, and writes in place."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, cos: Any, sin: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        return tuple(_turn(states, cos, sin) for states in (query, key))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return *(_turn(slope, cos, -sin) for slope in slopes), None, None


def _turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rows = states.detach().transpose(1, 2).contiguous()
    half = min(cos.shape[-1], rows.shape[-1]) // 2
    cos, sin = (angle[..., :half].unsqueeze(2) for angle in (cos, sin))
    first, second = rows[..., :half].clone(), rows[..., half : 2 * half].clone()
    rows.data[..., :half], rows.data[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    return rows.transpose(1, 2)


class Absent:
    @staticmethod
    def apply(*args: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")


def provide(monkeypatch: pytest.MonkeyPatch, model: Any, function: Any = Rope) -> ModuleType:
    """Put a function with the contract of liger-kernel in its place; returns the file of a model's attention."""
    package = ModuleType("liger_kernel")
    package.ops = SimpleNamespace(LigerRopeFunction=function)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", package.ops)
    monkeypatch.setattr(liger, "missing", lambda: None)
    taken = rotary._takes
    monkeypatch.setattr(rotary, "_takes", lambda *states: taken(*(SimpleOnGpu(one) for one in states)))
    file = sys.modules[type(model.rotary_emb).__module__]
    monkeypatch.setattr(file, FUNCTION, getattr(file, FUNCTION))  # what it is now is there again after the test
    return file


class SimpleOnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, states: torch.Tensor) -> None:
        self.dtype, self.shape, self.dim = states.dtype, states.shape, states.dim


def language_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = build(family)[0].to(dtype)
    return next(module for module in model.modules() if hasattr(module, "rotary_emb") and hasattr(module, "layers"))


def outcome(model: Any) -> list[torch.Tensor]:
    """Values and gradients of a few tokens, the last of them far away."""
    values = torch.randn(1, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    values = values.to(model.device, model.dtype).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 3, 4, 5, 90, 700]], device=model.device)
    output = model(inputs_embeds=values, position_ids=positions, use_cache=False).last_hidden_state
    weights = [layer.self_attn.k_proj.weight for layer in model.layers]
    return [output.detach(), *torch.autograd.grad(output.float().cos().sum(), [values, *weights])]


def compare(family: str, device: torch.device, dtype: torch.dtype, limit: float) -> None:
    expected = outcome(language_model(family, dtype).to(device))
    model = language_model(family, dtype)  # on the CPU still, as a training has it at that moment
    assert list(fused_rotary(model, device)) == [("rotary", 1, None)]
    assert list(fused_rotary(model, device)) == [("rotary", 1, None)], "exchanged once, and found again"
    found = outcome(model.to(device))
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.float() - exact.float()).norm() <= limit * exact.float().norm()


@pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("liger_kernel")), reason="no GPU or no liger-kernel")
@pytest.mark.parametrize("family", TURNED)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_liger_kernel_itself(family: str, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sys.modules[type(language_model(family).rotary_emb).__module__]
    monkeypatch.setattr(file, FUNCTION, getattr(file, FUNCTION))
    compare(family, torch.device("cuda", torch.cuda.current_device()), dtype, limit)


@pytest.mark.parametrize("family", TURNED)
def test_a_model_is_turned_by_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counted(Rope):
        @classmethod
        def apply(cls, *states: Any) -> Any:
            calls.append(states[0].shape)
            return Rope.apply(*states)

    model = language_model(family)
    provide(monkeypatch, model, Counted)
    compare(family, CPU, torch.float32, 1e-5)
    assert sum(shape[2] == 9 for shape in calls) == len(model.layers)


def test_what_has_no_gradients_keeps_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("qwen2_5_vl")
    file = provide(monkeypatch, model)
    assert list(fused_rotary(model, CPU)) == [("rotary", 1, None)]
    turned = getattr(file, FUNCTION)
    provide(monkeypatch, model, Absent)
    with torch.no_grad():
        model(inputs_embeds=torch.ones(1, 3, model.config.hidden_size), use_cache=False)
    query, key, angle = torch.rand(1, 4, 3, 16), torch.rand(1, 2, 1, 16), torch.rand(2, 1, 3, 16)
    for states in ((query, key, *angle), (query.bfloat16(), key.expand(1, 2, 3, 16), *angle)):
        assert all(torch.equal(one, two) for one, two in zip(turned(*states), turned.stepwise(*states), strict=True))
    with pytest.raises(RuntimeError, match="no kernel image"):
        turned(query, key.expand(1, 2, 3, 16), *angle)


def test_a_state_that_was_kept_for_a_gradient_is_never_overwritten_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("qwen2_5_vl")
    provide(monkeypatch, model)
    query = (torch.ones(1, 3, 4, 16, requires_grad=True) * 2).exp()  # exp keeps its result
    turned, _ = rotary._kernel(query.transpose(1, 2), torch.ones(1, 2, 3, 16), *torch.rand(2, 1, 3, 16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned.sum().backward()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (SimpleNamespace(apply=lambda q, k, cos, sin: Rope.apply(q, k, cos, -sin)), "gives other values than"),
        (SimpleNamespace(apply=lambda q, k, cos, sin: (q * 1, Rope.apply(q, k, cos, sin)[1])), "gives other values"),
        (Absent, "does not run here (no kernel image)"),
    ],
)
def test_a_kernel_that_differs_is_not_used(function: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("qwen2_5_vl")
    file = provide(monkeypatch, model, function)
    before = getattr(file, FUNCTION)
    ((name, count, problem),) = fused_rotary(model, CPU)
    assert (name, count) == ("rotary", 0) and reason in str(problem)
    assert getattr(file, FUNCTION) is before


@pytest.mark.parametrize("kind", OTHERS)
def test_another_way_to_turn_is_left_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        kind, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2
    )
    config.intermediate_size, config.vocab_size, config.pad_token_id = 64, 64, 0
    model = AutoModelForCausalLM.from_config(config).model
    before = getattr(provide(monkeypatch, model), FUNCTION)
    ((_, count, problem),) = fused_rotary(model, CPU)
    assert count == 0 and OTHERS[kind] in str(problem)
    assert getattr(sys.modules[type(model).__module__], FUNCTION) is before


@pytest.mark.skipif(bool(find_spec("liger_kernel")), reason="it is installed")
def test_without_liger_kernel_nothing_is_exchanged() -> None:
    ((name, count, problem),) = fused_rotary(language_model("qwen2_5_vl"), CPU)
    assert (name, count) == ("rotary", 0) and "liger-kernel is not installed" in str(problem)
