"""Images between words, in later turns and apart from each other: losses and gradients of plain transformers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny_models
from tests.parity.exact_packs import LIMIT, Truth, assert_exact
from tests.parity.test_exactness import SEPARATE, gradients, undiminished
from tests.questions import PROMPT, pack, picture, questions, tiny
from vlm_sft.cli.main import main
from vlm_sft.common.errors import SampleError
from vlm_sft.data.audit import PLACED_NOTE
from vlm_sft.data.cache.encoded import group_key
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.duplicates import find_repeats
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import UNPLACEABLE, ImageRef, Place, Sample, Turn, group_by_image
from vlm_sft.model import families, packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention

FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "llava"]
IMAGE = {"type": "image"}
MOVING = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content | selectattr('type', 'equalto', 'image') %}"
    "<image>\n{% endfor %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
END = "\nShort answer:"  # of the prompt template


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def placed(
    images: tuple[ImageRef, ...],
    words: str,
    target: str,
    places: tuple[tuple[int, int], ...],
    history: tuple[Turn, ...] = (),
) -> Sample:
    where = tuple(Place(*place) for place in places)
    return Sample(f"{words}/{target}", "tiny", "", images, words, target, (target,), history, places=where)


ONE, TWO = picture(5), picture(6, (100, 60))
TALK = (Turn("user", "how many?"), Turn("assistant", "3"))
SEEN = (Turn("user", "sum of red?"), Turn("assistant", "20"))
SAID = {"role": "assistant", "content": [text("3")]}
SUMMED = {"role": "assistant", "content": [text("20")]}
# Each sample beside the content that a user of plain transformers would write; the first three share an opening.
CASES: list[tuple[Sample, list[dict[str, Any]]]] = [
    (placed((ONE,), "red in  or bars?", "7", ((0, 7),)), [user(text("red in "), IMAGE, text(" or bars?" + END))]),
    (placed((ONE,), "red in , 2019?", "12", ((0, 7),)), [user(text("red in "), IMAGE, text(", 2019?" + END))]),
    (placed((ONE,), "red in ", "no", ((0, 7),)), [user(text("red in "), IMAGE, text(END))]),
    (placed((TWO,), "bars?", "15", ((2, 0),), TALK), [user(text("how many?")), SAID, user(IMAGE, text("bars?" + END))]),
    (
        placed((ONE, TWO), "as many in ?", "red", ((0, 0), (2, 11)), SEEN),
        [user(IMAGE, text("sum of red?")), SUMMED, user(text("as many in "), IMAGE, text("?" + END))],
    ),
    (
        placed((TWO, ONE), "red?", "4", ((0, 3), (0, 7)), SEEN),
        [user(text("sum"), IMAGE, text(" of "), IMAGE, text("red?")), SUMMED, user(text("red?" + END))],
    ),
]


def alone(model: Any, encoder: Encoder, sample: Sample, messages: list[dict[str, Any]]) -> torch.Tensor:
    """Token losses of the last answer: the processor's call on the whole conversation, nothing else."""
    processor, eos = encoder.processor, encoder.tokenizer.eos_token_id
    shown = {"images": [[decode_rgb(ref.load(), ref.source) for ref in sample.images]]}
    answer = {"role": "assistant", "content": [text(sample.target)]}
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
def case(family: str) -> tuple[Any, list[EncodedGroup], Truth]:
    """A tiny model, its groups, and what plain transformers gives each question alone; a usual group stands first."""
    model, encoder = tiny(family, torch.float64, "sdpa")
    usual = questions(0, 2)
    written = {sample.id: messages for sample, messages in CASES}
    written |= {
        sample.id: [user(IMAGE, text(PROMPT.template.replace("{question}", sample.question)))] for sample in usual
    }
    members = group_by_image([*usual, *(sample for sample, _ in CASES)])
    assert [len(group) for group in members] == [2, 3, 1, 1, 1]
    truth: Truth = []
    for group in members:
        truth.append([])
        for sample in group:
            with undiminished():
                losses = alone(model, encoder, sample, written[sample.id])
                truth[-1].append((losses.detach(), gradients(model, losses.sum())))
    trim_last_layer(model.get_base_model())
    return model, [encoder.encode(group) for group in members], truth


def check(family: str, bundles: list[Bundle], mode: PackMode) -> None:
    model, groups, truth = case(family)
    assert_exact(model, groups, truth, bundles, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_where_they_stand_are_exact(family: str) -> None:
    base = case(family)[0].get_base_model()
    mixed = [Bundle(1, (2, 0, 1)), Bundle(0, (1,)), Bundle(3, (0,)), Bundle(4, (0,)), Bundle(2, (0,))]
    for kind in ("blockwise", "dense"):
        mode = families.declared_mode(base.config, kind)
        assert mode is not None and mode.shares
        check(family, mixed, mode)
    check(family, mixed, SEPARATE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_prefix_ends_behind_the_last_image(family: str) -> None:
    """Prefix and question are the tokens of the processor; no image is left behind the prefix."""
    encoder = tiny(family, torch.float64, "sdpa")[1]
    for members in group_by_image([sample for sample, _ in CASES]):
        group = encoder.encode(members)
        again = Encoder(encoder.processor, PROMPT).encode(members[::-1])
        assert np.array_equal(group.prefix_ids, again.prefix_ids)
        for sample, question in zip(members, group.questions, strict=True):
            written = next(messages for one, messages in CASES if one is sample)
            asked = encoder.processor.apply_chat_template(written, tokenize=False, add_generation_prompt=True)
            shown = [[decode_rgb(ref.load(), ref.source) for ref in sample.images]]
            ids = encoder.processor(text=[asked], images=shown, return_tensors="pt")["input_ids"][0]
            assert [*group.prefix_ids, *question.prompt_ids] == ids.tolist()
            assert encoder.image_token_id not in question.prompt_ids
            assert encoder.prompt_text(sample) == asked


def test_a_template_that_moves_images_is_told_by_name() -> None:
    """As the template of llava-hf does: all images of a turn, then its texts."""
    encoder = tiny("llava", torch.float64, "sdpa")[1]
    encoder.processor.chat_template = MOVING
    moved = [sample for sample, _ in CASES if encoder.problem(sample) is not None]
    assert moved == [sample for sample, _ in CASES if any(place.at for place in sample.places)] and len(moved) == 5
    with pytest.raises(SampleError, match=r"red in .*an image stands behind words, .*LlavaProcessor") as caught:
        encoder.encode(moved[:1])
    assert caught.value.reason == UNPLACEABLE


def test_turns_behind_the_image_of_a_later_turn_are_one_sequence() -> None:
    """Their answers are supervised in one branch behind that image, with the losses of each turn alone."""
    model, processor = tiny("qwen2_5_vl", torch.float64, "sdpa")[0], tiny_models.build("qwen2_5_vl")[1]
    encoder = Encoder(processor, PromptSettings(template="{question}"))
    words = [("how many?", "3"), ("red?", "20"), ("sum?", "7"), ("2019?", "no")]
    said = [Turn(*turn) for asked, answer in words for turn in (("user", asked), ("assistant", answer))]
    where = ((0, 0), (2, 0))  # one image before the first question, another one before the second
    talk = [placed((ONE,), *words[0], ())]
    talk += [placed((ONE, TWO), *words[turn], where, tuple(said[: 2 * turn])) for turn in (1, 2, 3)]
    written = [user(IMAGE, text("how many?")), SAID, user(IMAGE, text("red?"))]
    written += [{"role": turn.role, "content": [text(turn.text)]} for turn in said[3:-1]]
    data = PreparedData(talk, encoder, "encoding")
    assert [len(one.questions) for one in data.lengths] == [1, 3] and data.lengths[1].follows == (-1, 0, 1)
    batch = pack([Bundle(1, (0, 1, 2))], [data[0], data[1]], torch.float64)
    assert len(batch.sample_ids) == 1
    with undiminished():
        expected = [alone(model, encoder, sample, written[: 2 * turn + 1]) for turn, sample in enumerate(talk)][1:]
        trim_last_layer(model.get_base_model())
        set_attention(model.get_base_model(), SHARED_SDPA)
        mode = families.declared_mode(model.get_base_model().config, "blockwise")
        assert mode is not None
        with packed_forward.packed(batch, mode, 0):
            losses = packed_forward.token_losses(model, batch, mode)
    torch.testing.assert_close(losses, torch.cat(expected), rtol=LIMIT, atol=LIMIT)


def test_a_check_names_the_row_that_a_model_cannot_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny_models.build("llava")
    processor.chat_template = MOVING
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    (tmp_path / "a.png").write_bytes(ONE.load())
    rows = [{"image": "a.png", "question": question, "answer": "7"} for question in ("Red?", "Sum of\n<image>")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    check = ["data", "check", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main(check) == 0
    assert json.loads((tmp_path / "out" / "data.json").read_text())["notes"] == {PLACED_NOTE: 1}
    assert "Sum of\n&lt;image&gt;" in (tmp_path / "out" / "preview.html").read_text()
    assert main([*check, "--base_model", str(tmp_path / "base")]) == 2
    told = capsys.readouterr().err
    assert "mine.jsonl line 2: an image stands behind words, and the chat template of LlavaProcessor" in told


def test_places_are_part_of_what_is_kept_and_compared() -> None:
    front, between = placed((ONE,), "red bars?", "7", ()), placed((ONE,), "red bars?", "7", ((0, 4),))
    assert group_key([front]) != group_key([between])
    assert not find_repeats([front, between]) and find_repeats([between, between])
    assert (front.shown_question, between.shown_question) == ("red bars?", "red <image>bars?")
