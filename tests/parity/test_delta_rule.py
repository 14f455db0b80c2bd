"""The gated delta rule and the short convolution of `model/cpu` against their definitions, token by token."""

from __future__ import annotations

import pytest
import torch

from vlm_sft.model.cpu.causal_convolution import causal_convolution
from vlm_sft.model.cpu.delta_rule import delta_rule

CASES = {  # n, T, sizes (K, H, D), E, whether something is remembered before, whether the memory is wanted
    "one chunk": (2, 7, (2, 2, 4), 5, False, True),
    "several chunks from a memory": (2, 101, (3, 3, 5), 4, True, True),
    "two heads of values to a key": (3, 50, (2, 4, 8), 6, True, False),
    "one token": (2, 1, (1, 2, 4), 4, True, True),
}


def by_definition(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    memory: torch.Tensor | None,
    sizes: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    key_heads, heads, channels = sizes
    width = key_heads * channels
    query, key, value = (
        part.unflatten(2, (count, -1))
        for part, count in zip(
            mixed.split([width, width, mixed.shape[2] - 2 * width], 2), (key_heads, key_heads, heads), strict=True
        )
    )
    query, key = (
        (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(heads // key_heads, 2)
        for part in (query, key)
    )
    if memory is None:
        memory = mixed.new_zeros(len(mixed), heads, channels, value.shape[3])
    outputs = []
    for token in range(mixed.shape[1]):
        memory = memory * decay[:, token, :, None, None].exp()
        known = torch.einsum("nhd,nhde->nhe", key[:, token], memory)
        change = rate[:, token, :, None] * (value[:, token] - known)
        memory = memory + key[:, token, :, :, None] * change[:, :, None]
        outputs.append(torch.einsum("nhd,nhde->nhe", query[:, token], memory) * channels**-0.5)
    return torch.stack(outputs, 1).flatten(2), memory


@pytest.mark.parametrize("name", CASES)
def test_chunks_give_the_values_and_gradients_of_single_tokens(name: str) -> None:
    count, tokens, sizes, width, remembers, goes_on = CASES[name]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    heads, channels = sizes[1:]
    given = [
        draw(count, tokens, 2 * sizes[0] * channels + heads * width) - 0.5,
        -draw(count, tokens, heads),
        draw(count, tokens, heads),
        *([draw(count, heads, channels, width)] if remembers else []),
    ]
    given = [one.requires_grad_() for one in given]
    slopes = [draw(count, tokens, heads * width), draw(count, heads, channels, width)]
    found = delta_rule(*given[:3], given[3] if remembers else None, sizes, goes_on)
    expected = by_definition(*given[:3], given[3] if remembers else None, sizes)
    assert (found[1] is not None) == goes_on
    used = 2 if goes_on else 1
    torch.testing.assert_close(found[:used], expected[:used], rtol=1e-10, atol=1e-10)
    sums = [
        sum((one * slope).sum() for one, slope in zip(some[:used], slopes, strict=False)) for some in (found, expected)
    ]
    gradients = [torch.autograd.grad(one, given) for one in sums]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_convolution_of_shifted_inputs_is_that_of_pytorch(tokens: int) -> None:
    layer = torch.nn.Conv1d(5, 5, 4, groups=5).requires_grad_(False)
    inputs, before = torch.randn(2, tokens, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    found = causal_convolution(layer, inputs, before)
    expected = layer(torch.cat([before, inputs], 1).mT).mT
    assert found is not None
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one.cos().sum(), [inputs, before]) for one in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert causal_convolution(layer.requires_grad_(True), inputs, before) is None
