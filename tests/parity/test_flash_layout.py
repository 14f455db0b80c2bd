"""The variable-length path gives what the blockwise one gives, with the kernel's contract written in plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.questions import pack, questions, tiny
from vlm_sft.data.packing import Bundle
from vlm_sft.model import attention, prefix
from vlm_sft.model.attention import SHARED_FLASH, SHARED_SDPA, PackLayout, pack_layout, shared_flash, shared_sdpa
from vlm_sft.model.families import PackMode

PATTERNS = [
    [[0, 7, 12, 15, 23]],
    [[0, 5, 6], [6, 16, 20, 29, 30], [30, 31, 40]],
    [[0, 12, 13, 14, 15, 16, 17, 18]],
]


def varlen_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What flash_attn_varlen_func documents: query i of n sees key j of m where j <= i + m - n, within the window."""
    assert causal and dropout_p == 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    repeats = queries.shape[1] // keys.shape[1]
    scale = queries.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = []
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(b - a for a, b in zip(q_ends, q_ends[1:], strict=False))
    assert max_seqlen_k == max(b - a for a, b in zip(k_ends, k_ends[1:], strict=False))
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        query = queries[q0:q1].transpose(0, 1)
        key, value = (x[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for x in (keys, values))
        last = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)[None, :]
        hidden = column > last
        if window_size[0] >= 0:
            hidden |= column < last - window_size[0]
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attention", lambda: varlen_reference)


@pytest.mark.parametrize("window", [None, 4, 9, 1000])
@pytest.mark.parametrize("branches", PATTERNS)
def test_equal_to_blockwise(reference_kernel: None, branches: list[list[int]], window: int | None) -> None:
    torch.manual_seed(0)
    length = branches[-1][-1]
    query, key, value = (torch.randn(1, heads, length, 16, dtype=torch.float64) for heads in (4, 2, 2))
    results = []
    for function in (shared_sdpa, shared_flash):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        with pack_layout(PackLayout(length, branches)):
            output, _ = function(torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window)
        assert output.shape == (1, length, 4, 16)
        output.square().sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for blockwise, flash in zip(*results, strict=True):
        torch.testing.assert_close(flash, blockwise, rtol=1e-12, atol=1e-12)


def test_blocks_of_image_tokens_need_the_mask(reference_kernel: None) -> None:
    """The kernel cannot show an image token a later one, so the masked path computes such packs."""
    torch.manual_seed(0)
    blocks = torch.tensor([-1, 0, 0, 0, -1, -1, -1])
    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    with pack_layout(PackLayout(7, [[0, 5, 7]], blocks)):
        flash, _ = shared_flash(torch.nn.Module(), query, key, value, None)
        blockwise, _ = shared_sdpa(torch.nn.Module(), query, key, value, None)
    with pack_layout(PackLayout(7, [[0, 5, 7]])):
        causal, _ = shared_sdpa(torch.nn.Module(), query, key, value, None)
    assert torch.equal(flash, blockwise)
    assert not torch.allclose(blockwise[0, 1], causal[0, 1])
    torch.testing.assert_close(blockwise[0, [0, 3, 4, 5, 6]], causal[0, [0, 3, 4, 5, 6]])


def test_a_model_computes_the_same_losses(reference_kernel: None) -> None:
    model, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    groups = [encoder.encode(questions(0, 5)), encoder.encode(questions(1, 2))]
    batch = pack([Bundle(0, (0, 4, 2)), Bundle(1, (1, 0))], groups)
    losses = []
    for name in (SHARED_SDPA, SHARED_FLASH):
        model.get_base_model().set_attn_implementation({"text_config": name})
        assert model.get_base_model().config.get_text_config()._attn_implementation == name
        with torch.no_grad(), prefix.packed(batch, PackMode(), 0):
            losses.append(prefix.token_losses(model, batch, PackMode()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
