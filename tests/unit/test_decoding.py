"""Attention of generation steps without masks is that of SDPA under the mask of what each question may see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.questions import pack, questions, tiny
from vlm_sft.data.packing import Bundle
from vlm_sft.evaluate import generate as generation
from vlm_sft.evaluate.generate import generate
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.decoding import DecodingStep, OwnTokens
from vlm_sft.model.encoding import encoder_of
from vlm_sft.model.families import declared_mode
from vlm_sft.model.load import find_base, load_model
from vlm_sft.model.vision_features import unwrap

# For each image (start of the prefix, its end, end of each question …): three questions, one, and none but text.
ENDS = [[0, 9, 12, 13, 20], [20, 41, 44], [44, 46, 50, 55]]
KEY_WIDTH, VALUE_WIDTH = 8, 6


def visible(cached: list[int], step: DecodingStep, fed: list[int]) -> torch.Tensor:
    """The mask of a step, from what each token in the cache belongs to: 100 + image of a prefix, or its question."""
    images = [image for image, ends in enumerate(ENDS) for _ in ends[2:]]
    assert len(cached) == step.length
    return torch.tensor([[owner in (question, 100 + images[question]) for owner in cached] for question in fed])


@pytest.mark.parametrize(("heads", "kinds"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_masked_attention(heads: int, kinds: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    owners, question = [], 0
    for image, (start, middle, *rest) in enumerate(ENDS):
        owners += [100 + image] * (middle - start)
        for begin, end in zip([middle, *rest], rest, strict=False):
            owners += [question] * (end - begin)
            question += 1
    own = OwnTokens(SimpleNamespace(ends=ENDS, group=torch.zeros(55), index=torch.arange(24), tokens=55))  # type: ignore[arg-type]
    for fed in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [1, 2, 4], [1, 4], [4]):
        step = own.step(torch.tensor(fed))
        owners += fed
        query = torch.randn(1, heads, len(fed), KEY_WIDTH, dtype=dtype)
        key, value = (torch.randn(1, kinds, len(owners), width, dtype=dtype) for width in (KEY_WIDTH, VALUE_WIDTH))
        mask = visible(owners, step, fed)
        assert step.computes(key, step.marker()) and not step.computes(key, mask[None, None])
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        assert torch.allclose(step.attend(query, key, value, 0.3), expected, atol=1e-6)
    assert own.longest == 24 + 5


@pytest.mark.parametrize(("family", "followed"), [("pocket", "all"), ("gemma3", "some"), ("qwen3_5", "some")])
def test_a_layer_follows_the_step_where_it_reaches_far_enough(
    family: str, followed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "pocket":
        base = find_base("pocket", bf16=True)  # its products are in bfloat16, its keys are not
        model, encoder = load_model(base).eval(), encoder_of(base)
    else:
        model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    groups = [encoder.encode(members, with_answers=False) for members in (questions(0, 3), questions(1, 1, (56, 72)))]
    batch = pack([Bundle(0, (0, 1, 2)), Bundle(1, (0,))], groups)
    config = unwrap(model).config
    mode = declared_mode(config, "blockwise")
    calls: list[int] = []
    attend = DecodingStep.attend

    def counted(step: DecodingStep, *arguments: Any) -> torch.Tensor:
        calls.append(step.length)
        return attend(step, *arguments)

    monkeypatch.setattr(DecodingStep, "attend", counted)
    settings: dict[str, Any] = {"mode": mode, "max_new_tokens": 4, "stop_ids": ()}
    found = generate(model, batch, **settings)
    steps = [batch.tokens + 4 * step for step in (1, 2, 3)]
    layers = config.get_text_config().num_hidden_layers
    counts = [calls.count(length) for length in steps]
    assert sum(counts) == len(calls)
    assert all(count == layers if followed == "all" else 0 < count < layers for count in counts), counts
    monkeypatch.setattr(generation, "computes_by_image", lambda _: False)
    assert generate(model, batch, **settings) == found
    assert len(calls) == sum(counts)
