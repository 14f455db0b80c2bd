"""Frozen products in bfloat16 and all else in float32, on a CPU: near the values in float32, and resumed exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny_models
from tests.faults.training import ALONE, RECIPE, loop_of, prepared, samples
from tests.questions import PROMPT, adapted, pack, questions
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle, EpochPlanner
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import add_lora, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu import cross_entropy, fuse, matmul
from vlm_sft.model.cpu.lora_linear import _covered_adapter
from vlm_sft.model.cpu.matmul import multiply, narrows, stream_dtype
from vlm_sft.model.cpu.narrow import narrow_products
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.feature_precompute import tower_settings
from vlm_sft.model.load import ready
from vlm_sft.model.vision_features import encode_images, whole_tower
from vlm_sft.recipe.schedule import resolve_schedule
from vlm_sft.train.optimization import TorchOptimization

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes all in bfloat16")
ROUNDING = 2.0**-8  # of one value in bfloat16


def narrow_model(family: str) -> tuple[Any, Any]:
    """A tiny model as a run in bfloat16 loads it, and its processor."""
    model, processor = tiny_models.build(family)
    return ready(model.to(torch.bfloat16), SHARED_SDPA), processor


def losses_and_gradients(model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses of a pack, and the gradients of what is trained as one vector."""
    wrapped = adapted(model).train()
    encoder = Encoder(processor, PROMPT)
    mode = declared_mode(model.config, "blockwise")
    assert mode is not None
    batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(questions(0, 3))])
    with packed_forward.packed(batch, mode, 0):
        losses = packed_forward.token_losses(wrapped, batch, mode)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        slopes = torch.autograd.grad(losses.sum(), trained)
    return losses.detach(), torch.cat([slope.flatten() for slope in slopes])


# One of each kind: M-RoPE, experts, states, and one that computes with the weights of its linear layers itself.
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe", "lfm2_vl", "gemma3n", "paligemma"])
def test_losses_and_gradients_are_near_those_in_float32(family: str) -> None:
    if family not in tiny_models.FAMILIES:
        pytest.skip("this transformers lacks it")
    model, processor = narrow_model(family)
    weights = {parameter.dtype for parameter in model.parameters()}
    assert weights == {torch.float32, torch.bfloat16}
    losses, slopes = losses_and_gradients(model, processor)
    exact, processor = tiny_models.build(family)
    expected, expected_slopes = losses_and_gradients(ready(exact.bfloat16().float(), SHARED_SDPA), processor)
    assert losses.dtype == torch.float32
    assert 0 < float((losses - expected).abs().max()) < 0.01 * float(expected.mean())
    assert float(F.cosine_similarity(slopes, expected_slopes, dim=0)) > 0.999


def test_what_is_narrow_and_what_is_not() -> None:
    model, _ = narrow_model("qwen2_5_vl")
    assert narrows("cpu") and not narrows("cuda")
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    assert all(module.weight.dtype == torch.bfloat16 for module in linears)
    assert all(module.bias is None or module.bias.dtype == torch.float32 for module in linears)
    kept = {id(module.weight) for module in linears} | {id(model.get_input_embeddings().weight)}
    assert all(one.dtype == torch.float32 for one in model.parameters() if id(one) not in kept)
    assert model.get_input_embeddings()(torch.tensor([[1, 2]])).dtype == torch.float32
    assert narrow_products(model) == 0  # once is enough
    exact, _ = tiny_models.build("qwen2_5_vl")
    assert narrow_products(exact) == 0 and {one.dtype for one in exact.parameters()} == {torch.float32}


def test_faster_forms_cover_it() -> None:
    model, _ = narrow_model("qwen2_5_vl")
    wrapped = adapted(model)
    rows = torch.randn(1, 5, model.config.get_text_config().hidden_size)
    layer: Any = model.get_decoder().layers[0]
    assert _covered_adapter(layer.self_attn.q_proj, rows) is not None
    assert fuse._gated_forward(layer.mlp, rows) is not None
    assert cross_entropy.is_covered(wrapped.get_output_embeddings())


def test_the_best_token_is_that_of_scores_that_are_not_rounded() -> None:
    model, _ = narrow_model("qwen2_5_vl")
    head = model.get_output_embeddings()
    torch.manual_seed(0)
    rows = 8 * torch.randn(1, 300, head.in_features)
    exact = rows.bfloat16().double() @ head.weight.double().T
    with torch.no_grad():
        found, rounded = head(rows), multiply(rows[0], head.weight)
    assert torch.equal(found.argmax(-1), exact.argmax(-1))
    assert not torch.equal(rounded.argmax(-1), exact[0].argmax(-1)), "rounding must make ties"
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(head(rows), found, rtol=ROUNDING, atol=ROUNDING)  # recorded: for training


@pytest.mark.parametrize("bias", [True, False])
def test_products_round_the_values_once(bias: bool) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(70, 48), torch.randn(32, 48).bfloat16()
    added = torch.randn(32) if bias else None
    exact = F.linear(rows.bfloat16().double(), weight.double(), None if added is None else added.double())
    found = multiply(rows, weight, added)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=ROUNDING * 4)


def test_a_layer_that_is_trained_computes_in_float32() -> None:
    model, _ = narrow_model("qwen2_5_vl")
    linear = next(module for module in model.modules() if type(module) is nn.Linear)
    rows = torch.randn(3, linear.in_features)
    rounded = linear(rows)
    linear.weight.data = linear.weight.data.float()
    expected = F.linear(rows, linear.weight, linear.bias)
    assert torch.equal(linear(rows), expected) and not torch.equal(rounded, expected)


def test_dora_and_kept_features() -> None:
    model, processor = narrow_model("qwen2_5_vl")
    group = Encoder(processor, PROMPT).encode(questions(0, 2))
    model.requires_grad_(False)
    with whole_tower(model, "cpu"):
        (record,) = encode_images(model, [group.tensors])
        settings = tower_settings(model)
    assert {value.dtype for value in record.values()} == {torch.float32}
    assert settings["dtype"] == "torch.bfloat16 in torch.float32"
    assert stream_dtype(model.get_input_embeddings().weight) == torch.float32
    targets = resolve_targets(model, tiny_models.targets(model))
    wrapped = add_lora(model, targets, r=4, alpha=8, dropout=0.0, seed=0, base_name="tiny", use_dora=True)
    batch = pack([Bundle(0, (0, 1))], [group])
    with packed_forward.packed(batch, PackMode(), 0):
        loss = packed_forward.token_losses(wrapped, batch, PackMode()).sum()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def train(folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """Six steps in bfloat16 with dropout, a checkpoint at the third; returns the adapter."""
    data = prepared(samples())
    model, _ = narrow_model("qwen2_5_vl")
    recipe = replace(RECIPE, save_steps=3, lora_dropout=0.05)
    adapter = add_lora(
        model, resolve_targets(model, recipe.target_modules), r=4, alpha=8, dropout=0.05, seed=0, base_name="tiny"
    )
    planner = EpochPlanner(data.lengths, 6, 1000, 1, recipe.seed)
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    optimization = TorchOptimization(adapter, recipe, schedule, ALONE, torch.bfloat16)
    loop_of(data, planner, recipe, schedule, adapter, optimization, ALONE, folder).run(checkpoint=resume)
    assert all(one.dtype == torch.float32 for state in optimization.optimizer.state.values() for one in state.values())
    return {name: one.detach().clone() for name, one in adapter.named_parameters() if one.requires_grad}


def test_a_resume_is_exact(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert whole.keys() == resumed.keys() and any(
        one.abs().max() > 0 for name, one in whole.items() if "lora_B" in name
    )
    assert all(torch.equal(resumed[name], one) for name, one in whole.items())


def test_products_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel with its memory for each: packs of any length meet at most 19 of them."""
    weight = torch.randn(32, 48).bfloat16()
    product, shapes = torch.mm, set()

    def noted(rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(rows.shape))
        return product(rows, other)

    monkeypatch.setattr(torch, "mm", noted)
    for count in [*range(70), *range(70, 1700, 19)]:
        rows = torch.randn(count, 48)
        exact = F.linear(rows.bfloat16().float(), weight.float())
        torch.testing.assert_close(multiply(rows, weight), exact, rtol=ROUNDING, atol=ROUNDING)
    shapes.discard((0, 48))  # no kernel
    assert len(shapes) <= 19


def gated_mlp_parameters(bias: bool) -> list[torch.Tensor | None]:
    """Weight and bias of gate, up and down, frozen; the biases are values of bfloat16, as those of a loaded model."""
    torch.manual_seed(0)
    sizes = [(40, 24), (40, 24), (24, 40)]
    weights = [(torch.randn(size) / size[1] ** 0.5).bfloat16() for size in sizes]
    biases = [torch.randn(size[0]).bfloat16().float() if bias else None for size in sizes]
    return [one for pair in zip(weights, biases, strict=True) for one in pair]


@pytest.mark.parametrize("tokens", [3, matmul.NARROW_BLOCK, 2 * matmul.NARROW_BLOCK + 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gated_mlp_is_the_formula_up_to_rounding(
    tokens: int, bias: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = gated_mlp_parameters(bias)
    if not fused:
        monkeypatch.setattr(fuse, "gating_operators", lambda: None)
    elif matmul.gating_operators() is None:
        pytest.skip("this PyTorch has no such operators")
    rows, weights = torch.randn(tokens, 24, requires_grad=True), torch.randn(tokens, 24)
    exact = rows.detach().double().requires_grad_()
    gate, gate_bias, up, up_bias, down, down_bias = (None if one is None else one.double() for one in parameters)
    assert gate is not None and up is not None and down is not None
    inner = F.silu(F.linear(exact, gate, gate_bias)) * F.linear(exact, up, up_bias)
    expected = F.linear(inner, down, down_bias)
    (slope,) = torch.autograd.grad((expected * weights).sum(), exact)
    found = fuse.gated_rows(rows, parameters)
    (gradient,) = torch.autograd.grad((found * weights).sum(), rows)
    unrecorded = fuse.gated_rows(rows.detach(), parameters)
    for one, right in ((found, expected), (unrecorded, expected), (gradient, slope)):
        assert one.dtype == torch.float32
        assert (one.detach().double() - right).norm() / right.norm() < 2 * ROUNDING
    assert torch.equal(found, unrecorded) != fused, "one rounding less where no gradients are recorded"


def test_a_gated_mlp_has_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    for owner, name in ((torch, "mm"), (F, "linear")):
        product = getattr(owner, name)

        def noted(rows: torch.Tensor, *others: Any, product: Any = product) -> torch.Tensor:
            shapes.add((len(rows), *others[0].shape))
            return product(rows, *others)

        monkeypatch.setattr(owner, name, noted)
    parameters = gated_mlp_parameters(bias=False)
    for count in [*range(1, 70), *range(70, 1300, 29)]:
        rows = torch.randn(count, 24, requires_grad=True)
        fuse.gated_rows(rows, parameters).sum().backward()
    assert len(shapes) <= 19 * len({shape[1:] for shape in shapes})
