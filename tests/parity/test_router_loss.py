"""The load-balancing loss of experts: that of every question alone in plain transformers, whatever the packs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.parity.test_exactness import Gradients, gradients, undiminished
from tests.questions import pack, questions, tiny
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.packing import Bundle
from vlm_sft.evaluate.generate import generate
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.model.trainable import checkpoint_layers

COEFFICIENT = 0.5
# transformers adds up probabilities in float32, and computes the routers of ERNIE in it whatever they are given.
FAMILIES = [("qwen3_vl_moe", torch.float64), ("qwen3_5_moe", torch.float64), ("ernie4_5_vl_moe", torch.float32)]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
SIZES = ((72, 56), (100, 60))
WHOLE = [[Bundle(0, (0, 2, 1)), Bundle(1, (1, 0))]]
PARTS = [[Bundle(0, (2,)), Bundle(1, (0,))], [Bundle(0, (1, 0))], [Bundle(1, (1,))]]
ALONE = [[Bundle(0, (2,))], [Bundle(1, (0,))], [Bundle(0, (1,))], [Bundle(0, (0,))], [Bundle(1, (1,))]]


def counted(
    family: str, dtype: torch.dtype = torch.float64, answers: bool = True
) -> tuple[Any, list[EncodedGroup], PackMode]:
    """A model whose configuration asks for the router loss, and questions about two pictures."""
    model, encoder = tiny(family, dtype, SHARED_SDPA)
    base = model.get_base_model()
    text = base.config.get_text_config()
    text.output_router_logits, text.router_aux_loss_coef = True, COEFFICIENT
    assert not trim_last_layer(base)  # its routers are asked about all tokens
    groups = [encoder.encode(questions(seed, 3, size), answers) for seed, size in enumerate(SIZES)]
    mode = declared_mode(base.config, "blockwise")
    assert mode is not None and mode.shares
    return model, groups, mode


def plain(model: Any, groups: list[EncodedGroup]) -> tuple[float, Gradients]:
    """The loss of a step of all questions, each alone with the model's own router loss, and its gradients."""
    set_attention(model.get_base_model(), "sdpa")
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for bundles in ALONE:
        batch = pack(bundles, groups, model.dtype)
        inputs = packed_forward.separate_inputs(model, batch)
        output = model(**inputs, output_router_logits=True, use_cache=False)
        kept = output.logits[0, batch.predict]
        total = total + torch.nn.functional.cross_entropy(kept, batch.targets, reduction="sum")
        total = total + len(batch.targets) * COEFFICIENT * output.aux_loss
        tokens += len(batch.targets)
    found = gradients(model, total / tokens)
    set_attention(model.get_base_model(), SHARED_SDPA)
    return float(total) / tokens, found


def packed(
    model: Any, groups: list[EncodedGroup], mode: PackMode, packs: list[list[Bundle]]
) -> tuple[float, Gradients]:
    """The same by packs, as a training computes it."""
    batches = [pack(bundles, groups, model.dtype) for bundles in packs]
    scale = 1 / sum(len(batch.targets) for batch in batches)
    step = StepGradients(model, mode, 0, scale, nullcontext)
    for batch in batches:
        step.add(batch)
    return float(step.loss), {name: value for name, value in step.named().items() if value is not None}


@pytest.mark.parametrize(("family", "dtype"), FAMILIES)
def test_packs_have_the_loss_and_gradients_of_questions_alone(family: str, dtype: torch.dtype) -> None:
    model, groups, mode = counted(family, dtype)
    limit = TOLERANCE[dtype]
    with undiminished():
        expected, slopes = plain(model, groups)
        for packs, how in (
            (WHOLE, mode),
            (PARTS, mode),
            (ALONE, mode),
            (ALONE, PackMode("separate")),
            (WHOLE, PackMode("separate")),
        ):
            loss, found = packed(model, groups, how, packs)
            assert loss == pytest.approx(expected, rel=limit)
            for name, gradient in found.items():
                assert (gradient - slopes[name]).norm() <= limit * slopes[name].norm(), name
        model.get_base_model().config.get_text_config().output_router_logits = False
        without, _ = packed(model, groups, mode, WHOLE)
        assert expected - without > 0.3 * COEFFICIENT


def test_checkpointed_layers_and_all_packings_agree() -> None:
    model, groups, mode = counted("qwen3_vl_moe")
    with undiminished():
        expected, slopes = packed(model, groups, mode, WHOLE)
        checkpoint_layers(model)
        model.train()
        for packs in (WHOLE, PARTS):
            loss, found = packed(model, groups, mode, packs)
            assert loss == pytest.approx(expected, rel=1e-12)
            for name, gradient in found.items():
                assert (gradient - slopes[name]).norm() <= 1e-10 * slopes[name].norm(), name


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_answers_and_evaluations_have_none(kind: str) -> None:
    model, groups, shared = counted("qwen3_vl_moe", torch.float32)
    model.eval()
    bundles = [Bundle(0, (0, 2))] if kind == "shared" else [Bundle(0, (0,))]
    mode = shared if kind == "shared" else PackMode("separate")
    asked = pack(bundles, counted("qwen3_vl_moe", torch.float32, answers=False)[1])
    batch, found = pack(bundles, groups), []
    for asks in (True, False):
        model.get_base_model().config.get_text_config().output_router_logits = asks
        with torch.no_grad(), packed_forward.packed(batch, mode, 0):
            losses = packed_forward.token_losses(model, batch, mode)
        answers = generate(model, asked, mode=mode, max_new_tokens=4, stop_ids=[0])
        found.append((losses, answers.tokens))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
