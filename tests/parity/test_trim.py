"""The last layer computed at predicted positions only, RMSNorm in one step, windows in one call: the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.questions import adapted, pack, questions, tiny
from tests.tiny_models import build
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA, SHARED_WINDOWS
from vlm_sft.model.cpu.fuse import fuse_head, fuse_norms, fuse_patches
from vlm_sft.model.families import PLAIN_LAYERS, PackMode
from vlm_sft.model.forward_patch import is_exchanged
from vlm_sft.model.last_layer import is_trimmed, trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.pack_context import PackContext, computing
from vlm_sft.model.vision_features import encode_images

# Of latent attention: head_dim is that of the rotated part, and no head is shared.
LATENT = {"deepseek_v3": {"num_key_value_heads": 4, "qk_rope_head_dim": 8}}
TEXT = sorted(name for name in PLAIN_LAYERS if not name.endswith("_text"))


@pytest.mark.parametrize("model_type", TEXT)
def test_declared_text_models_give_the_same_rows_and_gradients(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        pad_token_id=0,
        **LATENT.get(model_type, {"num_key_value_heads": 2}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    ids = torch.arange(1, 13)[None]
    rows = torch.tensor([4, 9, 11])
    whole = model(ids, use_cache=False).logits[:, rows]
    weights = [weight for weight in model.model.layers[-1].self_attn.parameters() if weight.dim() == 2]
    expected = torch.autograd.grad(whole.square().sum(), weights)
    assert trim_last_layer(model)
    with computing(PackContext(12, rows=rows)):
        trimmed = model(ids, use_cache=False).logits
    found = torch.autograd.grad(trimmed.square().sum(), weights)
    torch.testing.assert_close(trimmed, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["blockwise", "dense"])
def test_the_last_mlp_sees_only_predicted_positions(kind: str) -> None:
    model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA if kind == "blockwise" else "sdpa")
    batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(questions(0, 3))])
    base = model.get_base_model()
    assert trim_last_layer(base) and is_trimmed(base)
    shapes: list[list[int]] = []
    layers = base.get_decoder().layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: shapes.append(list(inputs[0].shape[:2])))
    mode = PackMode(kind)
    with packed_forward.packed(batch, mode, 0):
        logits = packed_forward.forward(model, batch, mode).logits
    assert shapes == [[1, batch.tokens], [1, len(batch.predict)]]
    assert logits.shape[1] == len(batch.predict) < batch.tokens


def test_dropout_of_the_last_layer_goes_with_its_rows() -> None:
    found = []
    for trimmed in (False, True):
        torch.manual_seed(0)
        model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA, dropout=0.3)
        if trimmed:
            assert trim_last_layer(model.get_base_model())
        model.train()
        batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(questions(0, 3))])
        with packed_forward.packed(batch, PackMode(), 7):
            loss = packed_forward.token_losses(model, batch, PackMode()).sum()
            loss.backward()
        found.append([loss.detach(), *(value.grad for value in model.parameters() if value.grad is not None)])
    for trimmed_value, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(trimmed_value, whole, rtol=1e-4, atol=1e-5)


def test_layers_of_another_form_stay_whole() -> None:
    model, _ = build("gemma3")
    assert not trim_last_layer(model)
    assert not is_trimmed(model)


def test_a_norm_in_one_step_has_the_values_and_gradients_of_the_module() -> None:
    model, _ = build("qwen2_5_vl")
    norm = model.model.language_model.norm.double()
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    norm.weight.requires_grad_(False)
    values = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    # The module rounds to float32 inside, so float64 values are compared with the formula.
    expected = norm.weight * values / (values.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    (slope,) = torch.autograd.grad(expected.cos().sum(), values)
    assert fuse_norms(norm) == 1
    torch.testing.assert_close(norm(values), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(norm(values).cos().sum(), values)[0], slope, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(norm, [values])


def test_only_frozen_norms_of_the_formula_change() -> None:
    model, _ = build("qwen2_5_vl")
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    assert fuse_norms(model) == len(norms) > 4
    assert fuse_norms(model) == 0  # once is enough
    other, _ = build("gemma3")
    norm = other.model.language_model.norm
    norm.weight.requires_grad_(False).normal_()
    values = torch.randn(1, 5, len(norm.weight))
    expected = norm(values)
    assert fuse_norms(other) > 0 and is_exchanged(norm)  # 1 + weight
    torch.testing.assert_close(norm(values), expected)
    assert fuse_norms(nn.LayerNorm(8)) == 0
    trained = norms[0]
    values = torch.randn(1, 2, len(trained.weight), requires_grad=True)
    trained.weight.requires_grad_(True)
    trained(values).sum().backward()
    assert trained.weight.grad is not None and trained.weight.grad.abs().sum() > 0


def test_a_patch_embedding_is_the_convolution() -> None:
    model, _ = build("qwen2_5_vl")
    conv = model.model.visual.patch_embed.proj.double()
    patches = torch.randn(5, *conv.weight.shape[1:], dtype=torch.float64)
    wide = torch.randn(1, *(2 * size if axis else size for axis, size in enumerate(conv.weight.shape[1:]))).double()
    expected, expected_wide = conv(patches), conv(wide)
    assert fuse_patches(model) == 1
    assert conv(patches).shape == expected.shape
    torch.testing.assert_close(conv(patches), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(conv(wide), expected_wide)  # more than one window: still a convolution
    assert fuse_patches(build("llava")[0]) == 0


def features(model: Any, images: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return encode_images(model.eval(), images)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_windows_in_one_call_are_those_of_single_calls(family: str) -> None:
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    base = model.get_base_model()
    assert base.config.vision_config._attn_implementation == SHARED_WINDOWS
    images = [encoder.encode(questions(seed, 1, size)).tensors for seed, size in enumerate(((72, 56), (200, 90)))]
    found = features(model, images)
    base.set_attn_implementation("sdpa")
    for ours, stock in zip(found, features(model, images), strict=True):
        assert ours.keys() == stock.keys()
        for name in stock:
            assert torch.equal(ours[name], stock[name]), name


def test_towers_without_windows_keep_their_function() -> None:
    model, _ = build("llava")
    set_attention(model, SHARED_SDPA)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert adapted(model).get_base_model().config.get_text_config()._attn_implementation == SHARED_SDPA


@pytest.mark.parametrize("rows", [1, 2, 13, 64, 65])
def test_a_head_of_few_rows_is_the_projection(rows: int) -> None:
    model, _ = build("qwen2_5_vl")
    head = model.lm_head
    hidden = torch.randn(1, rows, head.in_features)
    with torch.no_grad():
        expected = head(hidden)
        assert fuse_head(model) == 1
        assert fuse_head(model) == 0  # once is enough
        found = head(hidden)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    trained = head(hidden.requires_grad_())  # with gradients it is the module's own
    trained.sum().backward()
    assert trained.is_contiguous() and hidden.grad is not None
