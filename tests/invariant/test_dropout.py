"""The keyed dropout drops as often as an ordinary one, independently, and the same whatever the packing."""

from __future__ import annotations

import pytest
import torch

from tests.questions import PROMPT, questions
from tests.tiny_models import build
from vlm_sft.data.collate import collate
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model.dropout import KeyedDropout, keep_mask
from vlm_sft.model.pack_context import PackContext, computing

TOKENS, CHANNELS = 2000, 512
KEYS = (3 * 1_048_576 + 1) * 65_536 + torch.arange(TOKENS)  # the offsets of one question, as packs have them


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten().double(), right.flatten().double()]))[0, 1])


def dropped(seed: int = 5, step: int = 3, probability: float = 0.05) -> torch.Tensor:
    layer = KeyedDropout(probability, seed)
    with computing(PackContext(keys=KEYS, step=step)):
        return layer(torch.ones(1, TOKENS, CHANNELS))[0]


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_rate_and_scale(probability: float) -> None:
    values = dropped(probability=probability)
    sigma = (probability * (1 - probability) / values.numel()) ** 0.5
    assert abs((values == 0).double().mean() - probability) < 5 * sigma
    assert sorted(values.unique().tolist()) == pytest.approx([0.0, 1 / (1 - probability)])


def test_no_token_and_no_channel_is_dropped_more_often() -> None:
    gone = (dropped(probability=0.3) == 0).double()
    for dim, count in ((0, TOKENS), (1, CHANNELS)):
        rates = gone.mean(dim)
        sigma = (0.3 * 0.7 / count) ** 0.5
        assert (rates - 0.3).abs().max() < 5.5 * sigma
        # A mask that repeats along a dimension has the right mean and the wrong spread.
        assert 0.85 < rates.std() / sigma < 1.15


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (dropped(seed=5), dropped(seed=6)),
        (dropped(step=3), dropped(step=4)),
        (dropped()[:-1], dropped()[1:]),
        (dropped()[:, :-1], dropped()[:, 1:]),
        (dropped()[:, :-8], dropped()[:, 8:]),
        (dropped()[: TOKENS // 2], dropped()[TOKENS // 2 :]),
    ],
    ids=["modules", "steps", "tokens", "channels", "channels 8 apart", "halves"],
)
def test_masks_are_independent(left: torch.Tensor, right: torch.Tensor) -> None:
    assert abs(correlation(left == 0, right == 0)) < 5 / left.numel() ** 0.5


def test_images_and_questions_get_their_own_masks() -> None:
    def mask(group: int, part: int) -> torch.Tensor:
        return keep_mask((group * 1_048_576 + part) * 65_536 + torch.arange(200), CHANNELS, 0.3, 11)

    masks = [mask(group, part) for group in (0, 1, 2, 70_000) for part in (0, 1, 2)]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5


def test_the_gradient_is_the_mask() -> None:
    values = torch.randn(1, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    layer = KeyedDropout(0.25, 1)
    with computing(PackContext(keys=KEYS, step=0)):
        output = layer(values)
        output.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad * values, output)
    assert set(values.grad.unique().tolist()) == {0.0, 1 / 0.75}


def test_evaluation_and_other_shapes() -> None:
    layer = KeyedDropout(0.5, 1)
    values = torch.ones(1, 64, 64)
    with computing(PackContext(keys=torch.arange(64), step=0)):
        torch.testing.assert_close(layer(values), layer(values))
        layer.eval()
        assert torch.equal(layer(values), values)
    layer.train()
    torch.manual_seed(0)
    first = layer(values)
    assert not torch.equal(first, layer(values)), "outside packs it is an ordinary dropout"


def test_a_question_has_the_same_mask_in_every_pack() -> None:
    _, processor = build("qwen2_5_vl")
    encoder = Encoder(processor, PROMPT)
    groups = [encoder.encode(questions(seed, 4)) for seed in range(2)]
    packs = [
        [Bundle(0, (0, 1, 2)), Bundle(1, (3,))],
        [Bundle(1, (3, 0)), Bundle(0, (2,))],
        [Bundle(1, (3,)), Bundle(0, (2, 1))],
    ]
    layer = KeyedDropout(0.4, 9)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for pack in packs:
        batch = collate(pack, groups)
        with computing(PackContext(keys=batch.keys, step=7)):
            mask = layer(torch.ones(1, batch.tokens, 32))[0]
        names = ["prefix", *batch.sample_ids]
        for group, branch in {(int(g), int(b)) for g, b in zip(batch.group, batch.branch, strict=True)}:
            rows = mask[(batch.group == group) & (batch.branch == branch)]
            key = (pack[group].group, names[branch])
            if key in seen:
                assert torch.equal(rows, seen[key]), key
            seen[key] = rows
    assert len(seen) == 2 + 5  # two prefixes, five of the questions
