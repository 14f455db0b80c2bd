"""The two best tokens of rows of scores."""

from __future__ import annotations

import pytest
import torch

from vlm_sft.model.best_tokens import best_two


@pytest.mark.parametrize("tokens", [2, 100, 128, 129, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_a_sort(tokens: int, dtype: torch.dtype) -> None:
    """In bfloat16 many scores are equal; every place is the best one once, the last ones too."""
    torch.manual_seed(0)
    scores = torch.randn(tokens, tokens).to(dtype)
    scores[torch.arange(tokens), torch.arange(tokens)] += 3
    before = scores.clone()
    best, score, second = best_two(scores)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best, expected.indices[:, 0])
    assert torch.equal(score, expected.values[:, 0]) and torch.equal(second, expected.values[:, 1])
    assert torch.equal(scores, before)


def test_scores_of_minus_infinity_are_never_best() -> None:
    scores = torch.full((2, 300), float("-inf"))
    scores[0, 299], scores[1, 0], scores[1, 298] = 1.0, 2.0, 2.0
    best, _, second = best_two(scores)
    assert best.tolist() == [299, 0] and second.tolist() == [float("-inf"), 2.0]
