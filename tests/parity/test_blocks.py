"""Answer losses without scores and gated MLPs in blocks: the values and gradients of the plain formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.questions import pack, questions, tiny
from tests.tiny_models import build
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu import cross_entropy, fuse, matmul
from vlm_sft.model.families import PackMode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention

LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "mkl":
        monkeypatch.setattr(matmul, "_onednn", lambda: None)
    elif matmul._onednn() is None:
        pytest.skip("this PyTorch has no oneDNN")
    yield request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the projection have so few rows that the vocabularies here are several of them."""
    monkeypatch.setattr(cross_entropy, "_BLOCK_WEIGHTS", 0)


def head(vocabulary_size: int, channels: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(channels, vocabulary_size, bias=False, dtype=dtype)
    made.weight.requires_grad_(False)
    return made


@pytest.mark.parametrize("dtype", LIMIT)
def test_smoothed_losses_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype, library: str) -> None:
    projection = head(cross_entropy._BLOCK + 123, 24, dtype)
    hidden = torch.randn(37, 24, dtype=dtype).requires_grad_()
    targets = torch.randint(len(projection.weight), (37,))
    weights = torch.linspace(-1, 2, 37, dtype=dtype)
    scores = projection(hidden)
    expected = F.cross_entropy(scores, targets, reduction="none", label_smoothing=0.2)
    (slope,) = torch.autograd.grad((expected * weights).sum(), hidden, retain_graph=True)
    shares = torch.full_like(scores, 0.2 / len(projection.weight)).scatter_add_(
        1, targets[:, None], torch.full_like(scores[:, :1], 0.8)
    )
    torch.testing.assert_close(expected, -(shares * scores.log_softmax(1)).sum(1))
    for found in (
        cross_entropy.token_losses(hidden, projection, targets, 0.2),
        cross_entropy.score_losses(scores, targets, 0.2),
    ):
        (gradient,) = torch.autograd.grad((found * weights).sum(), hidden, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT[dtype])
        torch.testing.assert_close(gradient, slope, rtol=0, atol=LIMIT[dtype])
    assert (expected - F.cross_entropy(scores, targets, reduction="none")).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["even", "peaked"])
@pytest.mark.parametrize("count", [1, 16, 37])
@pytest.mark.parametrize("dtype", LIMIT)
def test_losses_and_gradients_are_those_of_cross_entropy(
    dtype: torch.dtype, count: int, scale: float, library: str
) -> None:
    """A vocabulary of two blocks and a rest; with peaked scores exp would overflow without the running maximum."""
    projection = head(2 * cross_entropy._BLOCK + 123, 24, dtype)
    hidden = (torch.randn(count, 24, dtype=dtype) * scale).requires_grad_()
    targets = torch.randint(len(projection.weight), (count,))
    weights = torch.linspace(-1, 2, count, dtype=dtype)
    expected = F.cross_entropy(projection(hidden), targets, reduction="none")
    (slope,) = torch.autograd.grad((expected * weights).sum(), hidden)
    assert cross_entropy.is_covered(projection)
    found = cross_entropy.token_losses(hidden, projection, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    limit = LIMIT[dtype] * scale
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    torch.testing.assert_close(gradient, slope, rtol=limit, atol=limit)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy.token_losses(hidden, projection, targets), found, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["even", "peaked"])
@pytest.mark.parametrize("block", [512, cross_entropy._BLOCK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_the_head_does(
    dtype: torch.dtype, block: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes: products in the head's format, sums in float32; no loss below 0."""
    monkeypatch.setattr(cross_entropy, "_BLOCK", block)
    projection = head(2 * cross_entropy._BLOCK + 123, 24, dtype)
    hidden = (torch.randn(37, 24) * scale).to(dtype).requires_grad_()
    targets = projection(hidden).argmax(1)
    targets[::2] = torch.randint(len(projection.weight), (19,))
    expected = F.cross_entropy(projection(hidden).float(), targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy.token_losses(hidden, projection, targets)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert found.dtype == torch.float32 and gradient.dtype == dtype and found.min() >= 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.float(), slope.float(), rtol=0.02, atol=0.02 * float(slope.abs().max()))


@pytest.mark.parametrize("part", [1, 300, 2**26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_of_scores_are_those_of_cross_entropy_bit_by_bit(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_PART", part)
    torch.manual_seed(0)
    scores = (torch.randn(7, 101) * 5).to(dtype).requires_grad_()
    targets, weights = torch.randint(101, (7,)), torch.linspace(-1, 2, 7)
    plain = F.cross_entropy(scores if dtype == torch.float64 else scores.float(), targets, reduction="none")
    (slope,) = torch.autograd.grad((plain * weights).sum(), scores)
    kept: list[tuple[torch.Size, torch.dtype]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append((x.shape, x.dtype)) or x, lambda x: x):
        found = cross_entropy.score_losses(scores, targets)
    assert kept == [(scores.shape, dtype), (targets.shape, targets.dtype)], "no other copy of the scores is kept"
    (gradient,) = torch.autograd.grad((found * weights).sum(), scores)
    assert torch.equal(found, plain) and torch.equal(gradient, slope) and gradient.dtype == dtype


def test_a_score_that_is_not_finite_is_seen_in_its_own_loss_only() -> None:
    projection = head(100, 8, torch.float32)
    hidden = torch.randn(3, 8)
    hidden[1, 2] = float("nan")
    found = cross_entropy.token_losses(hidden, projection, torch.tensor([1, 2, 3]))
    assert found.isfinite().tolist() == [True, False, True]


def test_heads_that_are_trained_or_have_more_than_a_weight_keep_their_scores() -> None:
    projection = head(10, 4, torch.float32)
    assert cross_entropy.is_covered(projection)
    assert not cross_entropy.is_covered(nn.Linear(4, 10))
    assert not cross_entropy.is_covered(nn.Sequential(projection))
    assert not cross_entropy.is_covered(None)
    assert not cross_entropy.is_covered(projection.half())
    assert cross_entropy.is_covered(projection.bfloat16()), "beside hidden states in float32"
    projection.float().weight.requires_grad_(True)
    assert not cross_entropy.is_covered(projection)
    elsewhere = nn.Linear(4, 10, bias=False, device="meta", dtype=torch.bfloat16)
    assert not cross_entropy.is_covered(elsewhere)
    elsewhere.weight.requires_grad_(False)
    assert cross_entropy.is_covered(elsewhere), "on other devices than CPUs half precision is what there is"
    elsewhere.weight.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks it
    assert not cross_entropy.is_covered(elsewhere)


def test_training_never_holds_the_scores_of_its_answers() -> None:
    model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    base = model.get_base_model()
    assert trim_last_layer(base)
    batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(questions(0, 3))])
    calls: list[int] = []
    base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    size = len(batch.targets) * base.config.get_text_config().vocab_size
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.shape[0] == len(batch.targets) else 0)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        packed_forward.packed(batch, PackMode(), 0),
    ):
        fused = packed_forward.token_losses(model, batch, PackMode())
    assert not calls and 0 < max(kept) < size
    with packed_forward.packed(batch, PackMode(), 0):
        scores = packed_forward.forward(model, batch, PackMode()).logits
    assert calls
    torch.testing.assert_close(fused, F.cross_entropy(scores[0], batch.targets, reduction="none"))


class GatedMLP(nn.Module):
    """A gated MLP as transformers has it."""

    def __init__(self, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)
        self.down_proj = nn.Linear(20, 12, bias=bias)
        self.act_fn = activation
        self.requires_grad_(False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(values)) * self.up_proj(values))


@pytest.mark.parametrize("tokens", [3, fuse._BLOCK, 2 * fuse._BLOCK + 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", LIMIT)
def test_blocks_of_a_gated_mlp_have_the_values_and_gradients_of_the_module(
    dtype: torch.dtype, bias: bool, tokens: int, library: str
) -> None:
    torch.manual_seed(0)
    module = GatedMLP(bias, nn.SiLU()).to(dtype)
    values = torch.randn(1, tokens, 12, dtype=dtype, requires_grad=True)
    expected = module(values)
    (slope,) = torch.autograd.grad(expected.cos().sum(), values)
    assert fuse.fuse_gated(module) == 1
    assert fuse.fuse_gated(module) == 0  # once is enough
    found = module(values)
    limit = LIMIT[dtype]
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    (gradient,) = torch.autograd.grad(found.cos().sum(), values)
    torch.testing.assert_close(gradient, slope, rtol=limit, atol=limit)
    with torch.no_grad():
        torch.testing.assert_close(module(values), expected, rtol=limit, atol=limit)


def test_other_activations_and_trained_projections_are_left_to_the_module() -> None:
    assert fuse.fuse_gated(GatedMLP(False, nn.GELU())) == 0
    module = GatedMLP(False, nn.SiLU())
    assert fuse.fuse_gated(module) == 1
    module.up_proj.weight.requires_grad_(True)
    module(torch.randn(2, 12)).sum().backward()
    assert module.up_proj.weight.grad is not None and module.up_proj.weight.grad.norm() > 0


def test_the_gated_mlps_of_language_model_and_tower_are_found() -> None:
    model, _ = build("qwen2_5_vl")
    expected = len(model.get_decoder().layers) + len(model.model.visual.blocks)
    assert fuse.fuse_gated(model) == expected
    assert fuse.fuse_gated(build("gemma3")[0]) == 0  # GELU


def test_an_adapter_on_the_projections_is_trained_after_fusing() -> None:
    base, processor = build("qwen2_5_vl")
    set_attention(base, SHARED_SDPA)
    towers = len(base.model.visual.blocks)
    assert fuse.fuse_gated(base) == towers + len(base.get_decoder().layers)
    targets = resolve_targets(base, ["model.language_model.layers.0.mlp.gate_proj", "self_attn.q_proj"])
    model = add_lora(base, targets, r=4, alpha=8, dropout=0.0, seed=0, base_name="tiny")
    encoder = Encoder(processor, PromptSettings())
    batch = pack([Bundle(0, (0, 1))], [encoder.encode(questions(0, 2))])
    with packed_forward.packed(batch, PackMode(), 0):
        packed_forward.token_losses(model, batch, PackMode()).sum().backward()
    trained = [parameter for name, parameter in model.named_parameters() if "gate_proj.lora_B" in name]
    assert len(trained) == 1 and all(one.grad is not None and one.grad.norm() > 0 for one in trained)
