"""States turned by their positions in fewer steps: values and gradients of transformers' functions, or left alone."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.tiny_models import build
from vlm_sft.model.cpu.rotary import FUNCTIONS, Rotation, fuse_rotary, rotation_of
from vlm_sft.model.forward_patch import PLAIN, exchange_function, forms_of
from vlm_sft.model.vision_features import decoder_of

TEXT, VISION = FUNCTIONS
TURNED = {
    ("qwen2_5_vl", VISION): Rotation(2, -2),
    ("qwen3_vl", TEXT): Rotation(2, 1),
    ("qwen3_vl", VISION): Rotation(2, -2),
    ("qwen3_5", TEXT): Rotation(2, 1, narrower=True),
    ("gemma4", TEXT): Rotation(1, 1),
}
# They pair neighbouring channels, take other angles, or turn the patches of an image only.
OTHERS = (("glm4", TEXT), ("cohere", TEXT), ("gpt_oss", TEXT), ("dinov3_vit", TEXT), ("inkling2", VISION))


def modeling(family: str) -> ModuleType:
    return import_module(f"transformers.models.{family}.modeling_{family}")


def plain(family: str, name: str = TEXT) -> Any:
    """transformers' own function, whatever another test has made of it."""
    function = getattr(modeling(family), name)
    while hasattr(function, "stepwise"):
        function = function.stepwise
    return function


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of transformers are its own, during a test and after it."""
    for family, name in TURNED:
        earlier = getattr(modeling(family), name)
        monkeypatch.setattr(modeling(family), name, earlier)
        setattr(modeling(family), name, plain(family, name))


@pytest.mark.parametrize(("family", "name"), TURNED)
def test_functions_of_the_formula_are_recognized(family: str, name: str) -> None:
    assert rotation_of(plain(family, name)) == TURNED[family, name]


@pytest.mark.parametrize(("family", "name"), OTHERS)
def test_other_functions_are_left_alone(family: str, name: str) -> None:
    if find_spec(f"transformers.models.{family}") is None:
        pytest.skip("this version of transformers has no such family")
    assert rotation_of(plain(family, name)) is None


def outcome(family: str, fused: bool) -> list[torch.Tensor]:
    """Values and gradients of a tiny language model in float64, and its tower's output."""
    torch.manual_seed(0)
    model = build(family)[0].double()
    if fused:
        assert fuse_rotary(model) > 0
    decoder = decoder_of(model)
    positions = torch.tensor([[0, 1, 2, 3, 3, 4, 5, 90, 700]])
    output = decoder(input_ids=torch.arange(3, 12)[None], position_ids=positions, use_cache=False).last_hidden_state
    weights = [one.weight for name, one in decoder.named_modules() if name.endswith(("q_proj", "k_proj"))]
    found = [output.detach(), *torch.autograd.grad(output.cos().sum(), weights)]
    if family.startswith("qwen"):
        tower = model.model.visual
        patches = torch.randn(
            32, tower.patch_embed.proj.weight[0].numel(), generator=torch.Generator().manual_seed(2)
        ).double()
        with torch.no_grad():
            found.append(tower(patches, grid_thw=torch.tensor([[1, 4, 8]])).pooler_output)
    return found


@pytest.mark.parametrize("family", sorted({family for family, _ in TURNED}))
def test_a_model_keeps_its_values_and_gradients(family: str, files: None) -> None:
    expected = outcome(family, fused=False)
    found = outcome(family, fused=True)
    assert all(forms_of(getattr(modeling(one), name)) for one, name in TURNED if one == family)
    for index, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        tower = family.startswith("qwen") and index == len(found) - 1  # transformers 5.10 turns patches in float32
        assert exact.abs().max() > 0
        assert (ours - exact).abs().max() <= (1e-6 if tower else 1e-12) * exact.abs().max()


def test_an_exchanged_function_is_found_again_and_not_wrapped_twice(files: None) -> None:
    model = build("qwen3_vl")[0]
    assert fuse_rotary(model) == fuse_rotary(model) == 2
    exchange_function(modeling("qwen3_vl"), TEXT, "another", lambda *_: None)  # as liger-kernel on a GPU
    assert fuse_rotary(model) == 2
    assert getattr(modeling("qwen3_vl"), TEXT).stepwise.stepwise is plain("qwen3_vl")


def test_calls_of_another_kind_go_to_the_function_of_the_library(files: None) -> None:
    fuse_rotary(build("qwen3_vl")[0])
    ours, theirs = getattr(modeling("qwen3_vl"), TEXT), plain("qwen3_vl")
    query, key, (cos, sin) = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(2, 1, 3, 8)

    def same(*values: Any, exactly: bool, **named: Any) -> None:
        for found, expected in zip(ours(*values, **named), theirs(*values, **named), strict=True):
            assert torch.equal(found, expected) if exactly else torch.allclose(found, expected, atol=1e-6)
            assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad

    same(query.bfloat16(), key.bfloat16(), cos.bfloat16(), sin.bfloat16(), exactly=True)
    same(query, key.bfloat16(), cos, sin, exactly=True)
    same(query, key, cos.clone().requires_grad_(), sin, exactly=True)
    same(query, key, *torch.randn(2, 5, 3, 8), exactly=True)  # the angles make the states larger
    same(query.transpose(1, 2), key.transpose(1, 2), cos, sin, unsqueeze_dim=2, exactly=False)
    same(query.transpose(1, 2), key.transpose(1, 2), cos, sin, 2, exactly=False)
    same(query.clone().requires_grad_(), key, cos, sin, exactly=False)
    with pytest.raises(RuntimeError, match="size of tensor"):  # narrower angles, which this family does not take
        ours(query, key, cos[..., :4], sin[..., :4])


def test_the_switch_gives_the_function_of_the_library_back(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_vl")[0]
    fuse_rotary(model)
    values = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 3, 8)
    monkeypatch.setenv(PLAIN, "1")
    assert fuse_rotary(model) == 0
    found = getattr(modeling("qwen3_vl"), TEXT)(*values)
    assert all(torch.equal(one, two) for one, two in zip(found, plain("qwen3_vl")(*values), strict=True))


def test_what_is_no_rotation_at_all_is_left_alone() -> None:
    def rotation(query: Any, key: Any, value: Any, cos: Any, sin: Any) -> Any:
        return query, key, value

    for function in (rotation, inspect.signature, print):
        assert rotation_of(function) is None
