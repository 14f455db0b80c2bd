"""rsLoRA, DoRA, projector, tower and full training: a pack has the losses and gradients of separate sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.parity.test_exactness import Case, Truth, alone, check, declared, gradients, undiminished
from tests.questions import PROMPT, questions
from vlm_sft.common.errors import ModelError
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.load import SHARED_SDPA, set_attention
from vlm_sft.model.parts import saved_modules
from vlm_sft.model.trainable import described, tune
from vlm_sft.model.vision_features import loose_parameters
from vlm_sft.recipe.load import load_recipe

VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "projector": {"train": "language,projector"},
    "projector alone": {"train": "projector"},
    "vision": {"train": "language,vision"},
    "all": {"train": "all"},
    "vision lora": {"train": "language,vision_lora", "vision_lora_rank": 3},
    "tower and projector lora": {"train": "language,vision_lora,projector_lora", "projector_lora_rank": 8},
    "projector lora alone": {"train": "projector_lora"},
}


def tuned(family: str, dropout: float = 0.0, **recipe: Any) -> tuple[Any, Encoder]:
    """A tiny model in training, its new weights moved away from where they have no effect."""
    model, processor = tiny_models.build(family)
    set_attention(model, SHARED_SDPA)
    settings = load_recipe(None, {"lora_r": 4, "lora_alpha": 8, "lora_dropout": dropout, **recipe})
    wrapped, _ = tune(model, settings, "tiny", master=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return wrapped, Encoder(processor, PROMPT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_packs_are_exact(family: str, variant: str) -> None:
    model, encoder = tuned(family, **VARIANTS[variant])
    groups, truth = [], Truth({}, {})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.eval()
    base.set_attn_implementation("sdpa")
    for index in range(2):
        samples = questions(index, 3)
        groups.append(encoder.encode(samples))
        for number, sample in enumerate(samples):
            with undiminished():
                losses = alone(model, encoder, sample)
                truth.losses[index, number] = losses.detach()
                truth.gradients[index, number] = used_gradients(model, losses.sum())
    case = Case(_Wrapped(model, base), encoder, groups, truth, torch.float32)
    check(case, [Bundle(0, (2, 0)), Bundle(1, (0, 1, 2))], declared(case, "blockwise"))


def used_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that the loss depends on: LLaVA leaves the last layer of its tower unused."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Wrapped:
    """A model whose parameters without effect are not looked at; `get_base_model` works without an adapter too."""

    def __init__(self, model: Any, base: Any) -> None:
        self.model, self.base = model, base

    def get_base_model(self) -> Any:
        return self.base

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def parameters(self) -> Any:
        return self.model.parameters()

    def named_parameters(self) -> Any:
        # Softmax does not see a bias of the keys: the gradient of such a bias is rounding alone.
        return [(name, p) for name, p in self.model.named_parameters() if p.grad is not None and p.grad.norm() > 1e-5]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("recipe", [{"use_dora": True}, {"use_rslora": True}, {"train": "language,projector"}])
def test_keyed_dropout_does_not_see_the_packing(recipe: dict[str, Any]) -> None:
    """In training, with dropout: a question's loss and the sum of gradients are those of other packs."""
    model, encoder = tuned("qwen2_5_vl", dropout=0.3, **recipe)
    model.train()
    groups = [encoder.encode(questions(index, 3)) for index in range(2)]

    def losses(*bundles: Bundle) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = collate(list(bundles), groups)
        mode = declared_mode(model)
        with packed_forward.packed(batch, mode, 5):
            scores = packed_forward.token_losses(model, batch, mode)
            return scores.detach(), gradients(model, scores.sum())

    together, summed = losses(Bundle(0, (0, 2)), Bundle(1, (1,)))
    first, second = losses(Bundle(0, (0, 2))), losses(Bundle(1, (1,)))
    torch.testing.assert_close(together, torch.cat([first[0], second[0]]), rtol=1e-5, atol=1e-5)
    for name, gradient in summed.items():
        expected = first[1][name] + second[1][name]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name
    model.eval()
    assert (losses(Bundle(0, (0, 2)), Bundle(1, (1,)))[0] - together).abs().max() > 1e-3, "dropout did nothing"


def declared_mode(model: Any) -> Any:
    from vlm_sft.model.families import declared_mode as declare

    mode = declare(packed_forward.unwrap(model).config, "blockwise")
    assert mode is not None
    return mode


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for recipe, scale in (({}, 2.0), ({"use_rslora": True}, 4.0)):
        model, _ = tuned("qwen2_5_vl", **recipe)
        layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale  # alpha 8, rank 4


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_parts_of_every_family(family: str) -> None:
    """Projector and tower together are all that is no language model; alone they do not overlap."""
    model, _ = tiny_models.build(family)
    decoder = {id(p) for p in model.get_decoder().parameters()}
    # A vector of no module (LLaVA-OneVision's end of a row) cannot be wrapped; it is trained with everything only.
    decoder |= {id(p) for p in loose_parameters(model).values()}
    outside = {name for name, p in model.named_parameters() if id(p) not in decoder and not name.startswith("lm_head")}
    outside = {name for name in outside if "audio" not in name}  # Gemma 3n hears, too; no sample has sound

    def held(*train: str) -> set[str]:
        paths = saved_modules(model, train)
        return {name for name in outside if any(name.startswith(path + ".") for path in paths)}

    assert held("language") == set()
    assert held("projector") and held("vision") and not held("projector") & held("vision")
    assert held("projector") | held("vision") == held("projector", "vision") == outside


def test_a_model_whose_projector_is_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build("smolvlm")
    monkeypatch.setattr("vlm_sft.model.families.FAMILIES", {})
    with pytest.raises(ModelError, match="smolvlm has no model.multi_modal_projector"):
        saved_modules(model, ["projector"])


def test_what_is_trained_is_told_and_counted() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    merger = sum(p.numel() for p in model.model.visual.merger.parameters())
    wrapped, facts = tune(model, load_recipe(None, {"train": "projector"}), "tiny", master=True)
    assert facts["trainable_parameters"] == merger == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert f"in full: projector (1 modules); {merger:,} of" in described(facts)


def test_trained_weights_are_held_in_float32() -> None:
    for train in ("language,projector", "all"):
        model, _ = tiny_models.build("qwen2_5_vl")
        wrapped, _ = tune(model.bfloat16(), load_recipe(None, {"train": train}), "tiny", master=True)
        assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert {
        p.dtype
        for p in tune(
            tiny_models.build("qwen2_5_vl")[0].bfloat16(), load_recipe(None, {"train": "all"}), "tiny", master=False
        )[0].parameters()
    } == {torch.bfloat16}
