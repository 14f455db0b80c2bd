"""Text rows, alone and packed beside images, give the losses and gradients of plain transformers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.test_exactness import SEPARATE, Gradients, alone, gradients, undiminished
from tests.questions import pack, questions, tiny
from tests.text_rows import text_row
from vlm_sft.data.collate import PackedBatch, split_pack
from vlm_sft.data.dataset import group_lengths
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.packing import Bundle, supervised_tokens
from vlm_sft.data.sample import Sample, group_by_image
from vlm_sft.model import families, packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.vision_features import TowerCounter

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "llava"]
LIMIT = 1e-10
TEXTS = [
    text_row("red bars 2019?", "12", 0),
    text_row("how many?", "red", 1),
    text_row("sum of red, how many bars?", "7", 2),
]


def alone_as_text(model: Any, encoder: Encoder, sample: Sample) -> torch.Tensor:
    """Token losses of a text row: the tokenizer's call on the whole conversation, nothing else given to the model."""
    processor, tokenizer = encoder.processor, encoder.tokenizer
    turns = [(turn.role, turn.text) for turn in sample.history] + [("user", encoder.prompt.fill(sample.question))]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}
    asked = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    told = processor.apply_chat_template([*messages, answer], tokenize=False, add_generation_prompt=False)
    ids = tokenizer(told, return_tensors="pt")["input_ids"]
    start = len(tokenizer(asked)["input_ids"])
    end = start + (ids[0, start:] == tokenizer.eos_token_id).nonzero()[0].item() + 1
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[0, start - 1 : end - 1], ids[0, start:end], reduction="none")


@functools.cache
def case(family: str) -> tuple[Any, Encoder, list[EncodedGroup], list[list[tuple[torch.Tensor, Gradients]]]]:
    """A tiny model, two images and three text rows as groups, and what plain transformers gives each question alone."""
    model, encoder = tiny(family, torch.float64, "sdpa")
    members = group_by_image([*questions(0, 3), *TEXTS, *questions(1, 2, (100, 60))])
    assert [len(group) for group in members] == [3, 1, 1, 1, 2]
    truth: list[list[tuple[torch.Tensor, Gradients]]] = []
    for group in members:
        truth.append([])
        for sample in group:
            with undiminished():
                losses = (alone if sample.images else alone_as_text)(model, encoder, sample)
                truth[-1].append((losses.detach(), gradients(model, losses.sum())))
    trim_last_layer(model.get_base_model())
    return model, encoder, [encoder.encode(group) for group in members], truth


def check(family: str, bundles: list[Bundle], mode: PackMode) -> None:
    model, _, groups, truth = case(family)
    set_attention(model.get_base_model(), SHARED_SDPA if mode.kind == "blockwise" else "sdpa")
    batch = pack(bundles, groups, torch.float64)
    with undiminished(), packed_forward.packed(batch, mode, 0):
        losses = packed_forward.token_losses(model, batch, mode)
        found = gradients(model, losses.sum())
    expected = [truth[bundle.group][number] for bundle in bundles for number in bundle.questions]
    torch.testing.assert_close(losses, torch.cat([one for one, _ in expected]), rtol=LIMIT, atol=LIMIT)
    for name, gradient in found.items():
        total = torch.stack([one[name] for _, one in expected]).sum(0)
        assert (gradient - total).norm() <= LIMIT * total.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_images_and_text_rows_is_exact(family: str) -> None:
    base = case(family)[0].get_base_model()
    mixed = [Bundle(0, (2, 0)), Bundle(1, (0,)), Bundle(4, (1, 0)), Bundle(3, (0,))]
    for kind in ("blockwise", "dense"):
        mode = families.declared_mode(base.config, kind)
        assert mode is not None and mode.shares
        check(family, mixed, mode)
        check(family, [Bundle(1, (0,)), Bundle(2, (0,)), Bundle(3, (0,))], mode)
    check(family, mixed, SEPARATE)
    check(family, [Bundle(2, (0,)), Bundle(1, (0,))], SEPARATE)


def test_text_rows_run_no_tower() -> None:
    model, encoder, groups, _ = case("qwen2_5_vl")
    assert all(not groups[place].tensors and not groups[place].image_tokens for place in (1, 2, 3))
    counter = TowerCounter(model)
    check("qwen2_5_vl", [Bundle(1, (0,)), Bundle(2, (0,))], SEPARATE)
    assert counter.calls == 0
    check("qwen2_5_vl", [Bundle(1, (0,)), Bundle(0, (0,))], SEPARATE)
    assert (counter.calls, counter.images) == (1, 1)
    counter.close()


def test_weights_multiply_the_losses_of_their_answers() -> None:
    model, _, groups, truth = case("qwen2_5_vl")
    groups = [
        replace(
            group, questions=tuple(replace(one, weight=1 + 0.5 * n + place) for n, one in enumerate(group.questions))
        )
        for place, group in enumerate(groups)
    ]
    bundles = [Bundle(0, (2, 0)), Bundle(1, (0,)), Bundle(4, (1,))]
    batch = pack(bundles, groups, torch.float64)
    asked = [(bundle.group, number) for bundle in bundles for number in bundle.questions]
    weights = [1 + 0.5 * number + place for place, number in asked]
    expected = sum(weight * truth[place][n][0].sum() for weight, (place, n) in zip(weights, asked, strict=True))

    def total(part: PackedBatch) -> torch.Tensor:
        with torch.no_grad(), undiminished(), packed_forward.packed(part, SEPARATE, 0):
            return part.weighted_sum(packed_forward.token_losses(model, part, SEPARATE))

    set_attention(model.get_base_model(), "sdpa")
    torch.testing.assert_close(total(batch), expected, rtol=LIMIT, atol=0)
    halves = split_pack(batch)  # where memory does not suffice
    assert halves is not None
    torch.testing.assert_close(total(halves[0]) + total(halves[1]), expected, rtol=LIMIT, atol=0)
    lengths = [group_lengths(group) for group in groups]
    tokens = [len(groups[place].questions[number].answer_ids) for place, number in asked]
    counted = sum(supervised_tokens(bundle, lengths[bundle.group]) for bundle in bundles)
    assert counted == sum(weight * count for weight, count in zip(weights, tokens, strict=True))
