"""Separate sequences in one padded batch are what each is alone: dropout, checkpoints, a head without hooks, checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.questions import pack, questions, tiny
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.packing import Bundle
from vlm_sft.model import families, packed_forward, repeated_images, sharing_check, vision_features
from vlm_sft.model.families import PackMode
from vlm_sft.model.padded_rows import padded_rows
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.trainable import checkpoint_layers

SEPARATE = PackMode("separate")
PACK = [Bundle(0, (3, 1, 2)), Bundle(1, (0, 1))]
FAMILIES = ["paligemma", "qwen2_5_vl", "qwen3_5", "lfm2_vl"]


def alone(bundles: list[Bundle]) -> list[list[Bundle]]:
    return [[Bundle(bundle.group, (number,))] for bundle in bundles for number in bundle.questions]


def trained(model: Any, packs: list[list[Bundle]], groups: list[EncodedGroup]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Losses and gradients of some packs, in training."""
    model.train()
    model.zero_grad()
    losses = []
    for part in packs:
        batch = pack(part, groups, next(model.parameters()).dtype)
        with packed_forward.packed(batch, SEPARATE, 3):
            found = packed_forward.token_losses(model, batch, SEPARATE)
            found.sum().backward()
        losses.append(found.detach())
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return torch.cat(losses), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_drops_what_it_drops_alone(family: str) -> None:
    model, encoder = tiny(family, torch.float32, "sdpa", dropout=0.3)
    groups = [encoder.encode(questions(0, 4)), encoder.encode(questions(1, 2, (56, 72)))]
    losses, gradients = trained(model, [PACK], groups)
    expected, single = trained(model, alone(PACK), groups)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == single.keys()
    for name, gradient in gradients.items():
        assert (gradient - single[name]).norm() <= 1e-3 * single[name].norm(), name
    model.eval()
    batch = pack(PACK, groups)
    with torch.no_grad(), packed_forward.packed(batch, SEPARATE, 3):
        plain = packed_forward.token_losses(model, batch, SEPARATE)
    assert (plain - losses).abs().max() > 1e-3, "dropout is really on"


@pytest.mark.parametrize("family", ["paligemma", "qwen2_5_vl"])
def test_checkpointed_layers_drop_the_same(family: str) -> None:
    model, encoder = tiny(family, torch.float32, "sdpa", dropout=0.3)
    groups = [encoder.encode(questions(0, 4)), encoder.encode(questions(1, 2, (56, 72)))]
    _, expected = trained(model, alone(PACK), groups)
    checkpoint_layers(model)
    _, gradients = trained(model, [PACK], groups)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


def test_a_trained_projector_gets_gradients_from_every_question() -> None:
    model, encoder = tiny("paligemma", torch.float32, "sdpa")
    for parameter in model.get_base_model().model.multi_modal_projector.parameters():
        parameter.requires_grad = True
    groups = [encoder.encode(questions(0, 4)), encoder.encode(questions(1, 2))]
    _, gradients = trained(model, [PACK], groups)
    _, expected = trained(model, alone(PACK), groups)
    names = [name for name in gradients if "projector" in name]
    assert names
    for name in names:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize(("missing", "images"), [("units", 4), ("features", 5), ("head", 2)])
def test_other_ways_to_the_same_losses(missing: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images one by one where it is unclear what the tower's output belongs to, pixels of every row, all positions."""
    model, encoder = tiny("paligemma", torch.float32, "sdpa")
    groups = [encoder.encode(questions(0, 4)), encoder.encode(questions(1, 2))]
    expected, _ = trained(model, [PACK], groups)
    counter = vision_features.TowerCounter(model)
    if missing == "units":
        monkeypatch.setattr(repeated_images, "_units", lambda *_: None)
    elif missing == "features":
        monkeypatch.setattr(repeated_images, "_takes_features", lambda *_: False)
    else:
        monkeypatch.setattr(packed_forward, "scoring_rows", lambda *_: nullcontext())
    losses, _ = trained(model, [PACK], groups)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert counter.images == images


def test_the_vocabulary_is_scored_where_an_answer_is_predicted() -> None:
    model, encoder = tiny("paligemma", torch.float32, "sdpa")
    batch = pack(PACK, [encoder.encode(questions(0, 4)), encoder.encode(questions(1, 2))])
    seen = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, output: seen.append(output.shape[:2]))
    with torch.no_grad(), packed_forward.packed(batch, SEPARATE, 0):
        packed_forward.token_losses(model, batch, SEPARATE)
    handle.remove()
    assert seen == [(1, len(batch.targets))]


def test_rows_are_the_processors_own_padded_batch() -> None:
    _, encoder = tiny("paligemma", torch.float32, "sdpa")
    samples = questions(0, 3)
    batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(samples, with_answers=False)])
    pictures = [[vision_image(sample)] for sample in samples]
    texts = [encoder.prompt_text(sample) for sample in samples]
    for side in ("right", "left"):
        encoder.tokenizer.padding_side = side
        expected = encoder.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        rows = padded_rows(batch, left=side == "left")
        valid = expected["attention_mask"].bool()
        assert torch.equal(rows.valid, valid)
        assert torch.equal(rows.take(batch.input_ids[0])[valid], expected["input_ids"][valid])


def vision_image(sample: Any) -> Any:
    from vlm_sft.data.images import decode_rgb

    return decode_rgb(sample.images[0].load(), "test")


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No family is declared, and none can share."""
    monkeypatch.setattr(families, "FAMILIES", {})
    monkeypatch.setattr(sharing_check, "sharing_error", lambda *_: 1.0)
    yield monkeypatch


def test_an_unknown_family_is_asked_whether_it_may_be_padded(unknown: pytest.MonkeyPatch) -> None:
    model, encoder = tiny("llava", torch.float32, "sdpa")
    mode = choose_mode(model, encoder)
    assert (mode.kind, mode.rows) == ("separate", "padded")
    assert "differ from separate ones" in mode.note and "together" not in mode.note

    plain = packed_forward.separate_inputs

    def careless(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in plain(*arguments).items() if name != "position_ids"} | shifted(
            plain(*arguments)
        )

    def shifted(inputs: dict[str, Any]) -> dict[str, Any]:
        """Positions that count padding from behind: only rows without padding are right."""
        length = inputs["input_ids"].shape[1]
        padding = length - inputs["attention_mask"].sum(1, keepdim=True)
        return {"position_ids": torch.arange(length)[None] * (1 + padding)}

    unknown.setattr(packed_forward, "separate_inputs", careless)
    mode = choose_mode(model, encoder)
    assert mode.rows == "equal" and "only questions of one length run together" in mode.note

    def one_only(*arguments: Any) -> dict[str, Any]:
        inputs = plain(*arguments)
        if len(inputs["input_ids"]) > 1:
            raise ValueError("batches are not\nfor me")
        return inputs

    unknown.setattr(packed_forward, "separate_inputs", one_only)
    mode = choose_mode(model, encoder)
    assert mode.rows == "single" and "one by one: a batch of them cannot be computed (batches are not)" in mode.note
