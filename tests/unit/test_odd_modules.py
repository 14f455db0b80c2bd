"""Modules of an unknown model may be anything: what cannot be exchanged is left as it is, and no probe ends a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity.test_liger import provide
from tests.questions import PROMPT, pack, questions, tiny
from tests.tiny_models import build
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import families, packed_forward, sharing_check
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu import fuse
from vlm_sft.model.forward_patch import is_exchanged
from vlm_sft.model.gpu import liger
from vlm_sft.model.load import ready
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.trainable import tune
from vlm_sft.model.vision_features import TowerCounter, encode_images
from vlm_sft.recipe.load import load_recipe


class Norm(nn.Module):
    """An RMSNorm as transformers has it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(values, values.shape[-1:], eps=self.variance_epsilon)


class GatedNorm(Norm):
    """Wants a further argument, like that of Gated DeltaNet."""

    def forward(self, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(values) * F.silu(gate)


class OtherEpsilon(Norm):
    """Differs for values near 0 only."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(values, values.shape[-1:], eps=100 * self.variance_epsilon)


class ZeroCentred(Norm):
    """Its weight is added to 1."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * F.rms_norm(values, values.shape[-1:], eps=self.variance_epsilon)


class NumberWeight(Norm):
    """Its weight is empty: a row for a probe has no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(0), requires_grad=False)


class Raising(nn.Module):
    """Every attribute that a probe looks at raises what no probe expects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    @property
    def weight(self) -> torch.Tensor:
        raise RuntimeError("there is no weight")

    @property
    def variance_epsilon(self) -> float:
        raise ZeroDivisionError

    @property
    def gate_proj(self) -> nn.Linear:
        raise StopIteration

    def forward(self, *values: torch.Tensor, scale: float) -> torch.Tensor:
        return self.linear(values[0]) * scale


class Forbidding(Raising):
    """Attributes that it does not have raise no AttributeError."""

    def __getattr__(self, name: str) -> Any:
        if name in ("linear", "_modules", "_parameters", "_buffers"):
            return super().__getattr__(name)
        raise LookupError(f"{name} is asked for")


class MLP(nn.Module):
    """A gated MLP."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.limit = limit
        self.requires_grad_(False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.gate_proj(values)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(values).clamp(-self.limit, self.limit))


class RoutedMLP(MLP):
    """Wants a further argument."""

    def forward(self, values: torch.Tensor, *, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(values) * scores


class Empty(nn.Module):
    """Has the names of a gated MLP and no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Identity(), nn.Identity(), nn.Identity()


class ScaledConvolution(nn.Conv3d):
    """Does more than its class."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(values)


class ScaledLinear(nn.Linear):
    """A linear layer whose forward has an argument more."""

    def forward(self, values: torch.Tensor, *, factor: float = 3.0) -> torch.Tensor:
        return factor * super().forward(values)


ODD: list[Any] = [
    GatedNorm,
    OtherEpsilon,
    NumberWeight,
    Raising,
    Forbidding,
    RoutedMLP,
    Empty,
    lambda: MLP(limit=10.0),
    lambda: ScaledConvolution(3, 8, 2, stride=2),
    lambda: nn.Conv3d(3, 8, 2, stride=2, dilation=2),
    lambda: ScaledLinear(8, 8, bias=False),
    lambda: nn.LayerNorm(8, bias=False),
]


@pytest.mark.parametrize("make", ODD)
def test_an_odd_module_is_left_as_it_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"odd": make(), "norm": Norm(), "mlp": MLP()})
    assert fuse.fuse_modules(model) == 2, "the usual ones beside it"
    assert not is_exchanged(model["odd"])
    provide(monkeypatch)
    model = nn.ModuleDict({"odd": make(), "norm": Norm(), "mlp": MLP()})
    assert {name: count for name, count, _ in liger.fused_parts(model, torch.device("cpu"))} == {"norm": 1, "mlp": 1}
    assert not is_exchanged(model["odd"])


def test_a_weight_that_is_added_to_1_is_never_taken_for_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 8)
    for norm in (ZeroCentred(), Norm()):
        expected = norm(values)
        assert fuse.fuse_norms(norm) == 1
        torch.testing.assert_close(norm(values), expected)
    provide(monkeypatch)
    assert [count for _, count, _ in liger.fused_parts(ZeroCentred(), torch.device("cpu"))] == [0]


def test_modules_of_one_class_with_other_settings_are_compared_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of Step 3.7 limit the activations of their MLPs, and the others do not."""
    provide(monkeypatch)
    model = nn.ModuleList([MLP(), MLP(10.0), MLP()])
    ((_, count, problem),) = liger.fused_parts(model, torch.device("cpu"))
    assert count == 2 and "other values" in str(problem)
    assert [is_exchanged(module) for module in model] == [True, False, True]
    model = nn.ModuleList([MLP(), MLP(10.0), MLP()])
    assert fuse.fuse_gated(model) == 2


@pytest.mark.parametrize("odd_head", [False, True])
def test_a_model_of_odd_modules_takes_a_step(odd_head: bool) -> None:
    """In the places where modules are exchanged: norms, MLPs, patches, linear layers with LoRA, the head."""
    model, processor = build("qwen2_5_vl")
    torch.manual_seed(0)
    for layer in model.get_decoder().layers:
        layer.odd, layer.mlp.odd = Raising(), GatedNorm()
        for name in ("q_proj", "o_proj"):
            plain = getattr(layer.self_attn, name)
            made = ScaledLinear(plain.in_features, plain.out_features, bias=plain.bias is not None)
            setattr(layer.self_attn, name, made)
    model.model.visual.odd = ScaledConvolution(3, 8, 2, stride=2)
    if odd_head:
        model.lm_head = ScaledLinear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    ready(model.requires_grad_(False), SHARED_SDPA)
    counter = TowerCounter(model)
    recipe = load_recipe(None, {"lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-3})
    tuned, facts = tune(model, recipe, "odd", master=True)
    assert facts["by_name"] == {"q_proj": 2, "v_proj": 2, "o_proj": 2}
    encoder = Encoder(processor, PROMPT)
    mode = choose_mode(tuned, encoder)
    batch = pack([Bundle(0, (0, 1))], [encoder.encode(questions(0, 2))])
    with packed_forward.packed(batch, mode, 0):
        loss = packed_forward.token_losses(tuned, batch, mode).sum()
    loss.backward()
    assert loss.isfinite() and counter.calls
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    assert trained and all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)
    counter.close()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_vision_features_of_an_unknown_family_are_checked_before_they_are_kept(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    monkeypatch.delitem(families.FAMILIES, family)
    assert sharing_check.features_error(model, encoder) < 1e-5
    assert sharing_check.features_doubt(model, encoder) == ""

    def encode(*_: Any) -> Any:
        return [{name: 2 * value for name, value in record.items()} for record in encode_images(*_)]

    monkeypatch.setattr(sharing_check, "encode_images", encode)
    assert "answers differ behind them" in sharing_check.features_doubt(model, encoder)
    monkeypatch.setattr(sharing_check, "encode_images", lambda *_: [])
    assert "cannot be computed by themselves" in sharing_check.features_doubt(model, encoder)
