"""Text rows, alone and packed beside images, give the losses and gradients of plain transformers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.parity.exact_packs import LIMIT, assert_exact
from tests.parity.test_exactness import SEPARATE, Gradients, alone, gradients, undiminished
from tests.questions import pack, picture, questions, tiny
from tests.text_rows import text_row
from vlm_sft.common.errors import ModelError
from vlm_sft.data.collate import PackedBatch, split_pack
from vlm_sft.data.dataset import PreparedData, followed_turns, group_lengths
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.loader import StepDataset
from vlm_sft.data.packing import Bundle, EpochPlanner, bundle_tokens, supervised_tokens
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import Sample, Turn, group_by_image
from vlm_sft.model import families, packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.vision_features import TowerCounter

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "llava"]
TEXTS = [
    text_row("red bars 2019?", "12", 0),
    text_row("how many?", "red", 1),
    text_row("sum of red, how many bars?", "7", 2),
]


def alone_as_talk(model: Any, encoder: Encoder, sample: Sample) -> torch.Tensor:
    """Token losses of the last answer of a conversation: the processor's call on all of it, nothing else."""
    processor, eos = encoder.processor, encoder.tokenizer.eos_token_id
    shown = {"images": [[decode_rgb(ref.load(), ref.source) for ref in sample.images]]} if sample.images else {}
    turns = [(turn.role, turn.text) for turn in sample.history] + [
        ("user", encoder.prompt.template.replace("{question}", sample.question))
    ]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    messages[0]["content"][:0] = [{"type": "image"} for _ in sample.images]
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}
    asked = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    told = processor.apply_chat_template([*messages, answer], tokenize=False, add_generation_prompt=False)
    inputs = dict(processor(text=[told], **shown, return_tensors="pt"))
    ids = inputs["input_ids"]
    start = processor(text=[asked], **shown, return_tensors="pt")["input_ids"].shape[1]
    end = start + (ids[0, start:] == eos).nonzero()[0].item() + 1
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**inputs, use_cache=False).logits
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
                losses = (alone if sample.images else alone_as_talk)(model, encoder, sample)
                truth[-1].append((losses.detach(), gradients(model, losses.sum())))
    trim_last_layer(model.get_base_model())
    return model, encoder, [encoder.encode(group) for group in members], truth


def check(family: str, bundles: list[Bundle], mode: PackMode) -> None:
    model, _, groups, truth = case(family)
    assert_exact(model, groups, truth, bundles, mode)


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


def test_a_processor_that_wants_an_image_refuses_text_rows_by_name() -> None:
    _, encoder = tiny("paligemma", torch.float32, "sdpa")
    with pytest.raises(ModelError, match="^PaliGemmaProcessor cannot process a question without an image"):
        encoder.encode(TEXTS[:1])


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


def talk_of(first: str, **more: Any) -> list[Sample]:
    """Three turns of a conversation, each with those before it as its history."""
    history: tuple[Turn, ...] = ()
    turns = []
    for number, (question, answer) in enumerate([(first, "12"), ("how many?", "red bars"), ("sum?", "7")]):
        turns.append(replace(text_row(question, answer, number, history), **more))
        history = (*history, Turn("user", question), Turn("assistant", answer))
    return turns


@pytest.mark.parametrize("family", FAMILIES)
def test_the_turns_of_a_conversation_are_one_exact_sequence(family: str) -> None:
    model, encoder = tiny(family, torch.float64, "sdpa")
    encoder = Encoder(encoder.processor, PromptSettings(template="{question}"))
    text, seen = talk_of("red 2019?"), talk_of("what bars?", images=(picture(5),))
    other = replace(text[1], id="other", question="sum of bars?")  # another second turn after the same first one
    members = group_by_image([*text, other, *seen])
    groups = [encoder.encode(group) for group in members]
    groups = [replace(one, follows=followed_turns(of, one)) for of, one in zip(members, groups, strict=True)]
    assert [group.follows for group in groups] == [(-1, 0, 1, 0), (-1, 0, 1)]
    bundles = [Bundle(0, (3, 0, 2, 1)), Bundle(1, (0, 2))]
    batch = pack(bundles, groups, torch.float64)
    assert [len(ends) - 2 for ends in batch.ends] == [2, 1]
    lengths = [group_lengths(group) for group in groups]
    assert batch.tokens == sum(bundle_tokens(bundle, lengths[bundle.group]) for bundle in bundles)
    mode = families.declared_mode(model.get_base_model().config, "blockwise")
    assert mode is not None
    expected, total = [], None
    for sample in (text[0], text[1], text[2], other, seen[0], seen[2]):
        with undiminished():
            losses = alone_as_talk(model, encoder, sample)
            expected.append(losses.detach())
            found = gradients(model, losses.sum())
        total = found if total is None else {name: total[name] + found[name] for name in total}
    assert total is not None
    trim_last_layer(model.get_base_model())
    set_attention(model.get_base_model(), SHARED_SDPA)
    with undiminished(), packed_forward.packed(batch, mode, 0):
        losses = packed_forward.token_losses(model, batch, mode)
        found = gradients(model, losses.sum())
    torch.testing.assert_close(losses, torch.cat(expected), rtol=LIMIT, atol=LIMIT)
    for name, gradient in found.items():
        assert (gradient - total[name]).norm() <= LIMIT * total[name].norm(), name
    # Dropout draws by the first turn, so a turn that is packed apart has the masks that it has in its conversation.
    apart = pack([Bundle(0, (1,)), Bundle(1, (2,))], groups)
    whole, part = (set(zip(one.keys.tolist(), one.input_ids[0].tolist(), strict=True)) for one in (batch, apart))
    assert part <= whole


def test_turns_that_a_template_renders_otherwise_later_stay_separate() -> None:
    _, encoder, _, _ = case("qwen2_5_vl")
    turns = talk_of("red 2019?")  # a history lacks the words that the prompt template puts around a question
    assert followed_turns(turns, encoder.encode(turns)) == ()


def test_where_every_rank_has_to_run_the_tower_packs_without_an_image_get_one_that_counts_nothing() -> None:
    model, encoder, _, _ = case("qwen2_5_vl")
    data = PreparedData([*questions(0, 2), *TEXTS, *questions(1, 1, (100, 60))], encoder, "encoding")
    planner = EpochPlanner(data.lengths, 6, 60, 2, 0)  # tokens for one text row a pack
    set_attention(model.get_base_model(), "sdpa")

    def read(accompany: bool) -> tuple[float, torch.Tensor, list[int]]:
        total, seen, counter = torch.zeros((), dtype=torch.float64), [], TowerCounter(model)
        for rank in range(2):
            step = StepDataset(data, planner, rank, accompany=accompany)[0, 0]
            for batch in step.packs:
                batch.tensors = [
                    {name: value.double() if value.is_floating_point() else value for name, value in image.items()}
                    for image in batch.tensors
                ]
                before = counter.calls
                with torch.no_grad(), packed_forward.packed(batch, SEPARATE, 0):
                    total += batch.weighted_sum(packed_forward.token_losses(model, batch, SEPARATE))
                seen.append(counter.calls - before)
        counter.close()
        return step.supervised, total, seen

    plain, accompanied = read(False), read(True)
    assert 0 in plain[2] and set(accompanied[2]) == {1}
    assert plain[0] == accompanied[0]
    torch.testing.assert_close(plain[1], accompanied[1], rtol=1e-7, atol=0)
