"""Answers generated behind shared prefixes, or by the fallback, are those of transformers' own generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests import tiny_models
from tests.questions import asked_types, pack, questions, tiny
from tests.tiny_models import FAMILIES
from vlm_sft.data.encode import Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.sample import Sample
from vlm_sft.evaluate.generate import generate
from vlm_sft.evaluate.generate_rows import generate_rows, rows_agree
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import FAMILIES as DECLARED
from vlm_sft.model.families import Kind, PackMode, declared_mode
from vlm_sft.model.load import set_attention

ONE_BY_ONE = ("llama4",)  # its chunks of attention are counted with the padding in front
LENGTH = 30  # longer than the sliding window of the tiny Gemma 3


def kinds(family: str) -> tuple[Kind, ...]:
    """How a family is computed; the later families only as they are by default."""
    if DECLARED[family].reason:
        return ("separate",)
    return ("blockwise",) if family in tiny_models.LATER else ("blockwise", "dense", "separate")


def transformers_answer(model: torch.nn.Module, encoder: Encoder, sample: Sample) -> list[int]:
    pictures = [decode_rgb(ref.load(), ref.source) for ref in sample.images]
    inputs = encoder.processor(
        text=[encoder.prompt_text(sample)], images=[pictures], return_tensors="pt", **asked_types(encoder.processor)
    )
    inputs = dict(inputs.to(torch.float32))  # Llama 4's makes bfloat16
    inputs.pop("labels", None)
    stop = list(encoder.stop_ids)
    config = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, eos_token_id=stop, pad_token_id=stop[0])
    output = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :].tolist()
    return output[: output.index(stop[0])] if stop[0] in output else output


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in FAMILIES for kind in kinds(family)])
def test_generated_tokens(family: str, kind: Kind) -> None:
    model, encoder = tiny(family, torch.float32, SHARED_SDPA if kind == "blockwise" else "sdpa")
    samples = [questions(0, 3), questions(1, 2, (56, 72))]
    groups = [encoder.encode(members, with_answers=False) for members in samples]
    mode = PackMode("separate") if kind == "separate" else declared_mode(model.get_base_model().config, kind)
    assert mode is not None
    bundles = [Bundle(0, (0, 1, 2)), Bundle(1, (0, 1))]
    packs = [bundles] if mode.shares else [[Bundle(b.group, (q,))] for b in bundles for q in b.questions]
    settings: dict[str, Any] = {"max_new_tokens": LENGTH, "stop_ids": encoder.stop_ids}
    with torch.no_grad():
        answers = []
        for part in packs:
            answers += generate(model, pack(part, groups), mode=mode, **settings).tokens
        together = generate_rows(model, pack(bundles, groups), **settings)
        set_attention(model.get_base_model(), "sdpa")
        expected = [transformers_answer(model, encoder, sample) for members in samples for sample in members]
    assert answers == expected
    if rows_agree(model, encoder):
        assert together.tokens == expected
        assert together.cut == [number for number, answer in enumerate(expected) if len(answer) == LENGTH]
    else:
        assert family in ONE_BY_ONE
    assert any(expected)
