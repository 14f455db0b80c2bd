"""Exchanged forwards: all of them can be switched off with the same result, and none is used that was not proven."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.questions import PROMPT, adapted, pack, questions
from tests.tiny_models import build
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import last_layer, packed_forward
from vlm_sft.model.attention import SHARED_SDPA, SHARED_WINDOWS, attention_name
from vlm_sft.model.cpu import lora_linear
from vlm_sft.model.cpu.cross_entropy import is_covered
from vlm_sft.model.cpu.fuse import fuse_modules
from vlm_sft.model.families import PackMode
from vlm_sft.model.forward_patch import PLAIN, agrees, exchange_forward, is_exchanged
from vlm_sft.model.gpu import liger
from vlm_sft.model.gpu.flash import flash_problem
from vlm_sft.model.gpu.kernels import choose_kernels
from vlm_sft.model.last_layer import is_trimmed, trim_last_layer
from vlm_sft.model.load import ready
from vlm_sft.model.pack_context import PackContext, computing, current_pack
from vlm_sft.model.trainable import checkpoint_layers

FAMILY = "qwen2_5_vl"


def trained(checkpointing: bool = False) -> Any:
    """A tiny model as a training has it, with LoRA and dropout."""
    model = ready(build(FAMILY)[0], SHARED_SDPA)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped = adapted(model, dropout=0.3)
    if checkpointing:
        checkpoint_layers(wrapped)
    return wrapped.train()


def outcome(model: Any) -> list[torch.Tensor]:
    """Losses and gradients of a pack of two images."""
    encoder = Encoder(build(FAMILY)[1], PROMPT)
    groups = [encoder.encode(questions(seed, 3)) for seed in range(2)]
    batch = pack([Bundle(0, (0, 2)), Bundle(1, (1,))], groups)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with packed_forward.packed(batch, PackMode(), 4):
        losses = packed_forward.token_losses(model, batch, PackMode())
        return [losses.detach(), *torch.autograd.grad(losses.sum(), parameters)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_and_without_exchanged_forwards_a_training_is_the_same(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    assert is_trimmed(model.get_base_model()) and is_covered(model.get_base_model().lm_head)
    kinds = {type(module).__name__ for module in model.modules() if is_exchanged(module)}
    for ending in ("Linear", "Conv3d", "RMSNorm", "MLP", "DecoderLayer"):
        assert any(kind.endswith(ending) for kind in kinds), ending
    assert attention_name(model.get_base_model().config.vision_config) == SHARED_WINDOWS
    found = outcome(trained(checkpointing))
    monkeypatch.setenv(PLAIN, "1")
    plain = trained()
    assert not any(is_exchanged(module) for module in plain.modules())
    base = plain.get_base_model()
    assert not is_trimmed(base) and not is_covered(base.lm_head)
    assert attention_name(base.config.vision_config) == "sdpa"
    for ours, exact in zip(found, outcome(plain), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_the_switch_reaches_the_kernels_of_gpus_and_run_json(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    monkeypatch.setenv(PLAIN, "1")
    kernels, notes = choose_kernels(model, torch.device("cuda", 0))
    assert kernels == {PLAIN: "1", "dropout": "stepwise", "norm": "stepwise", "mlp": "stepwise", "rotary": "stepwise"}
    assert len(notes) == 4 and all(f"{PLAIN}=1" in note for note in notes)
    assert choose_kernels(model, torch.device("cpu"))[0] == {PLAIN: "1", "dropout": "stepwise"}
    assert f"{PLAIN}=1" in str(flash_problem(torch.bfloat16))
    monkeypatch.delenv(PLAIN)
    assert PLAIN not in choose_kernels(model, torch.device("cpu"))[0]


class GatedNorm(nn.Module):
    """As Qwen3.5's Qwen3_5RMSNormGated: it looks like an RMSNorm and wants a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, (8,), self.weight, self.variance_epsilon) * F.silu(gate)


class RoutedMLP(nn.Module):
    """It looks like a gated MLP and wants to know an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor, expert: int) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)) * expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_that_want_more_than_hidden_states_are_left_as_they_are(dtype: torch.dtype) -> None:
    parts = nn.ModuleList([GatedNorm(), RoutedMLP()]).to(dtype)
    assert fuse_modules(parts) == 0
    assert not any(is_exchanged(module) for module in parts.modules())


def test_liger_kernel_says_which_modules_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "missing", lambda: None)
    model = nn.ModuleList([GatedNorm(), RoutedMLP()])
    found = {name: (count, problem) for name, count, problem in liger.fused_parts(model, torch.device("cpu"))}
    assert found["norm"][0] == found["mlp"][0] == 0
    assert "GatedNorm is left as it is" in str(found["norm"][1])
    assert "RoutedMLP is left as it is" in str(found["mlp"][1])


def test_the_gated_norm_of_qwen3_5_does_not_end_a_run() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    assert fuse_modules(nn.Sequential(modeling.Qwen3_5RMSNormGated(8).requires_grad_(False))) == 0


def test_a_call_with_other_inputs_goes_to_the_module_itself() -> None:
    layer = nn.Bilinear(3, 3, 2)
    assert exchange_forward([layer], lambda _: True, lambda module, values: values) == 1
    one, other = torch.randn(2, 4, 3)
    assert torch.equal(layer(one, other), F.bilinear(one, other, layer.weight, layer.bias))
    assert layer(one) is one and layer(input1=one) is one


def scaled_residual(layer: Any) -> Callable[..., torch.Tensor]:
    """A layer of the same parts and another formula, as a new version of a library might bring it."""

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        hidden = hidden_states + 0.9 * attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


def refused(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    raise KeyError("an argument that only this layer wants")


@pytest.mark.parametrize("kind", ["another formula", "an exception"])
def test_a_last_layer_that_differs_is_left_as_it_is(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = build(FAMILY)
    model.train()
    layer = model.get_decoder().layers[-1]
    layer.forward = scaled_residual(layer) if kind == "another formula" else refused
    before = torch.get_rng_state()
    assert not trim_last_layer(model) and not is_trimmed(model)
    assert torch.equal(torch.get_rng_state(), before), "a probe draws nothing from the global generator"
    assert all(module.training for module in model.modules())
    said = "".join(capsys.readouterr())
    assert "is left as it is" in said and ("other values" in said or "only this layer wants" in said)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_last_layer_passes_its_probe_in_every_format(dtype: torch.dtype) -> None:
    model = build(FAMILY)[0].to(dtype)
    assert last_layer._problem(model.get_decoder(), model.get_decoder().layers[-1]) is None


def test_a_peft_that_computes_something_else_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    lora_linear._peft_agrees.cache_clear()
    assert lora_linear._peft_agrees(torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    lora_linear._peft_agrees.cache_clear()
    real = lora_linear._one_step
    monkeypatch.setattr(lora_linear, "_one_step", lambda module, name, rows: 1.01 * real(module, name, rows))
    assert lora_linear.fuse_lora(trained()) == 0
    lora_linear._peft_agrees.cache_clear()


def test_agreement_is_measured_by_the_largest_value() -> None:
    exact = torch.tensor([100.0, 0.0])
    assert agrees(exact + 0.09, exact, 1e-3) and not agrees(exact + 0.11, exact, 1e-3)
    assert agrees(exact, exact, 0.0) and not agrees(exact[:1], exact, 1.0)
    assert not agrees(torch.tensor([float("nan"), 0.0]), exact, 1.0)


def test_every_thread_sees_the_pack_that_is_computed() -> None:
    """A GPU's backward pass recomputes checkpointed layers in threads of autograd."""
    seen: list[PackContext] = []
    pack_ = PackContext(5, keys=torch.arange(5), rows=torch.tensor([1, 3]))
    with computing(pack_):
        with computing(PackContext(3)):
            assert current_pack().tokens == 3
        thread = threading.Thread(target=lambda: seen.append(current_pack()))
        thread.start()
        thread.join()
    assert seen == [pack_] and current_pack().tokens == 0
    keys = pack_.keys_for(2)
    assert keys is not None and keys.tolist() == [1, 3] and pack_.keys_for(5) is pack_.keys
    with pytest.raises(AssertionError, match="4 tokens"):
        pack_.keys_for(4)
