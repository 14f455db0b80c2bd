"""Switches of a family's configuration that change what its model is made of."""

from __future__ import annotations

from typing import Any

import torch

from tests import tiny_models
from tests.questions import PROMPT, adapted, questions
from vlm_sft.data.encode import Encoder
from vlm_sft.export.verify import folder_answers, our_answers
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.load import ready
from vlm_sft.model.sharing_check import choose_mode, features_error, sharing_error


def changed(family: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A tiny model, plain, some of whose settings are others; and its encoder."""
    model, processor = tiny_models.build(family)
    settings = model.config.to_dict()
    settings["text_config"] |= text or {}
    settings["vision_config"] |= vision or {}
    torch.manual_seed(0)
    made = type(model)(type(model.config).from_dict(settings)).eval()
    return made, Encoder(processor, PROMPT)


def test_a_model_without_attention_shares_and_is_verified() -> None:
    """transformers' cache asks a layer of attention how long the sequence is."""
    model, encoder = changed("qwen3_5", {"layer_types": ["linear_attention"] * 4})
    ready(model, SHARED_SDPA)
    assert choose_mode(model, encoder).kind == "blockwise" and sharing_error(model, encoder, "blockwise") < 1e-4
    samples = questions(0, 2)
    ours = our_answers(model, encoder, samples, "ours")
    theirs = folder_answers(model, encoder.processor, encoder, samples, "theirs")
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.tokens) > 1 and torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_features_of_a_tower_that_adds_none_to_deeper_layers() -> None:
    model, encoder = changed("qwen3_vl", vision={"deepstack_visual_indexes": []})
    ready(model, SHARED_SDPA)
    assert features_error(adapted(model).eval(), encoder) < 1e-6
