"""The variable-length path gives what the blockwise one gives, with the kernel's contract written in plain torch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.questions import pack, questions, tiny
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA, shared_sdpa, shared_windows
from vlm_sft.model.families import SLIDING, PackMode, Reach
from vlm_sft.model.gpu import flash
from vlm_sft.model.gpu.flash import FLASH_WINDOWS, SHARED_FLASH, flash_windows, kernel_problem, shared_flash
from vlm_sft.model.load import choose_attention, set_attention
from vlm_sft.model.pack_context import PackContext, PackLayout, computing
from vlm_sft.model.vision_features import encode_images

varlen = pytest.importorskip("torch.nn.attention.varlen")
PATTERNS = [[[0, 7, 12, 15, 23]], [[0, 5, 6], [6, 16, 20, 29, 30], [30, 31, 40]], [[0, 12, 13, 14, 15, 16, 17, 18]]]


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    aligned_to_the_end: bool = True,
) -> torch.Tensor:
    """What varlen_attn documents: query i of n is at key p = i + m - n of m, and sees from p - left to p + right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    repeats = query.shape[1] // key.shape[1]
    assert enable_gqa or repeats == 1
    scale = query.shape[2] ** -0.5 if scale is None else scale
    outputs = []
    q_ends, k_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert max_q == max(b - a for a, b in itertools.pairwise(q_ends))
    assert max_k == max(b - a for a, b in itertools.pairwise(k_ends))
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(q_ends), itertools.pairwise(k_ends), strict=True):
        queries = query[q0:q1].transpose(0, 1)
        keys, values = (x[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        shift = (k1 - k0) - (q1 - q0) if aligned_to_the_end else 0
        own, column = torch.arange(q1 - q0)[:, None] + shift, torch.arange(k1 - k0)[None, :]
        left, right = window_size
        hidden = torch.zeros(q1 - q0, k1 - k0, dtype=torch.bool)
        if right >= 0:
            hidden |= column > own + right
        if left >= 0:
            hidden |= column < own - left
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    flash._takes_groups()  # of the real one
    monkeypatch.setattr(flash, "_fits", lambda query: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference)


def attended(function: Any, states: list[torch.Tensor], branches: list[list[int]], window: int | None) -> torch.Tensor:
    """Attention over a pack in a layer with a sliding window, or without."""
    reaches = (Reach(), Reach(SLIDING, window=window))
    layout = PackLayout(branches[-1][-1], branches, reaches=reaches)
    marker = layout.marker(reaches[window is not None], states[0].device)
    with computing(PackContext(layout=layout)):
        return function(torch.nn.Module(), *states, marker, scaling=0.3)[0]


@pytest.mark.parametrize("window", [None, 4, 9, 1000])
@pytest.mark.parametrize("branches", PATTERNS)
def test_equal_to_blockwise(reference_kernel: None, branches: list[list[int]], window: int | None) -> None:
    torch.manual_seed(0)
    length = branches[-1][-1]
    query, key, value = (torch.randn(1, heads, length, 16, dtype=torch.float64) for heads in (4, 2, 2))
    results = []
    for function in (shared_sdpa, shared_flash):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = attended(function, inputs, branches, window)
        assert output.shape == (1, length, 4, 16)
        output.square().sum().backward()
        results.append([output.detach(), *(x.grad for x in inputs)])
    for blockwise, varlen_ in zip(*results, strict=True):
        torch.testing.assert_close(varlen_, blockwise, rtol=1e-12, atol=1e-12)


def test_blocks_of_image_tokens_need_the_mask(reference_kernel: None) -> None:
    """The kernel cannot show an image token a later one, so the masked path computes such packs."""
    torch.manual_seed(0)
    blocks = torch.tensor([-1, 0, 0, 0, -1, -1, -1])
    query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
    with computing(PackContext(layout=PackLayout(7, [[0, 5, 7]], blocks))):
        flash, _ = shared_flash(torch.nn.Module(), query, key, value, None)
        blockwise, _ = shared_sdpa(torch.nn.Module(), query, key, value, None)
    with computing(PackContext(layout=PackLayout(7, [[0, 5, 7]]))):
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
        with torch.no_grad(), packed_forward.packed(batch, PackMode(), 0):
            losses.append(packed_forward.token_losses(model, batch, PackMode()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_pytorch_without_groups_gets_repeated_keys(
    reference_kernel: None, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 23, 16, dtype=torch.float64) for heads in (6, 2, 2))
    monkeypatch.setattr(flash, "_takes_groups", lambda: grouped)
    with computing(PackContext(layout=PackLayout(23, PATTERNS[0]))):
        found, _ = shared_flash(torch.nn.Module(), query, key, value, None)
        exact, _ = shared_sdpa(torch.nn.Module(), query, key, value, None)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_windows_of_a_tower(reference_kernel: None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, 21, 8, dtype=torch.float64) for _ in range(3))
    ends = torch.tensor([0, 8, 16, 18, 21])
    exact, _ = shared_windows(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends)
    for longest in (None, 8):
        found, _ = flash_windows(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=ends, max_length_q=longest, is_causal=False
        )
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_a_tower_computes_the_same_features(reference_kernel: None, family: str) -> None:
    """Through transformers' own tower, which hands the windows over."""
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    images = [encoder.encode(questions(seed, 1, size)).tensors for seed, size in enumerate(((72, 56), (200, 90)))]
    base = model.get_base_model().eval()
    found = []
    for name in (SHARED_SDPA, SHARED_FLASH):
        set_attention(base, name)
        found.append(encode_images(model, images))
    assert base.config.vision_config._attn_implementation == FLASH_WINDOWS
    for exact, ours in zip(*found, strict=True):
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name], rtol=1e-4, atol=1e-5)


def test_what_the_kernel_does_not_take_is_computed_by_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, dropout, wide heads: the kernel is not called."""

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("called")

    monkeypatch.setattr(varlen, "varlen_attn", refuse)
    ends = torch.tensor([0, 3, 7])
    for device, dtype, width, fits in [
        ("cpu", torch.bfloat16, 16, False),
        ("meta", torch.float32, 16, False),
        ("meta", torch.bfloat16, 20, False),
        ("meta", torch.bfloat16, 264, False),
        ("meta", torch.bfloat16, 80, True),
    ]:
        assert flash._fits(torch.empty(1, 1, 1, width, dtype=dtype, device=device)) == fits
    query, key, value = (torch.randn(1, 2, 7, 16) for _ in range(3))
    with computing(PackContext(layout=PackLayout(7, [[0, 5, 7]]))):
        flash_output, _ = shared_flash(torch.nn.Module(), query, key, value, None)
        exact, _ = shared_sdpa(torch.nn.Module(), query, key, value, None)
    assert torch.equal(flash_output, exact)
    monkeypatch.setattr(flash, "_fits", lambda query: True)
    with computing(PackContext(layout=PackLayout(7, [[0, 5, 7]]))):
        assert shared_flash(torch.nn.Module(), query, key, value, None, dropout=0.5)[0].shape == exact.shape
    assert flash_windows(torch.nn.Module(), query, key, value, None, 0.5, cu_seq_lens_q=ends)[0].shape == exact.shape


def test_the_real_kernel_takes_what_it_is_given() -> None:
    """PyTorch's own function on tensors without storage: arguments, formats and shapes, forward and backward."""
    shapes = [(1, heads, 23, 64) for heads in (4, 2, 2)]
    states = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    for window in (None, 9):
        output = attended(shared_flash, states, PATTERNS[0], window)
        assert output.shape == (1, 23, 4, 64)
        gradients = torch.autograd.grad(output.sum(), states)
        assert [gradient.shape for gradient in gradients] == [state.shape for state in states]
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    query = states[0]
    seen, _ = flash_windows(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=ends, max_length_q=9)
    assert seen.shape == (1, 23, 4, 64)
    assert set(inspect.signature(varlen_reference).parameters) - {"aligned_to_the_end"} <= set(
        inspect.signature(varlen.varlen_attn).parameters
    )


def test_a_kernel_is_checked_before_it_is_used(reference_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert kernel_problem(device, torch.bfloat16) is None

    def first_key(*args: Any, **kwargs: Any) -> torch.Tensor:
        return varlen_reference(*args, **kwargs, aligned_to_the_end=False)

    def absent(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    def blind_towers(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
        """Right for packs, which are causal; in windows no query looks ahead."""
        return varlen_reference(*args, window_size=(window_size[0], 0), **kwargs)

    for kernel, reason in (
        (first_key, "other values than SDPA"),
        (absent, "(no kernel image)"),
        (blind_towers, "other values than SDPA here in the windows of a vision tower"),
    ):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        problem = kernel_problem(device, torch.bfloat16)
        assert problem is not None and reason in problem


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_not_asked(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """It builds a graph for every new shape; what PyTorch has set stands again afterwards."""
    allowed = []

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        cuda = torch.backends.cuda
        allowed.append((cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled()))
        return varlen_reference(*args, **kwargs)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(flash, "_fits", lambda query: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    query = torch.randn(1, 2, 7, 8)
    if causal:
        with computing(PackContext(layout=PackLayout(7, [[0, 5, 7]]))):
            shared_flash(torch.nn.Module(), query, query, query, None)
    else:
        flash_windows(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=torch.tensor([0, 3, 7]))
    assert allowed == [(True, False)] and torch.backends.cuda.cudnn_sdp_enabled() is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_this_machine_is_right() -> None:
    assert kernel_problem(torch.device("cuda"), torch.bfloat16) is None


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: Callable[..., str | None]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flash, "kernel_problem", kernel)


def test_what_is_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention(False, torch.bfloat16) == (SHARED_SDPA, [])
    if not torch.cuda.is_available():
        assert choose_attention(True, torch.bfloat16) == (SHARED_SDPA, ["--flash_attn: no GPU; using SDPA"])
    gpu(monkeypatch, (7, 5), lambda *_: None)
    assert "older than Ampere" in choose_attention(True, torch.bfloat16)[1][0]
    gpu(monkeypatch, (9, 0), lambda *_: None)
    assert choose_attention(True, torch.bfloat16) == (SHARED_FLASH, [])
    assert "not float32" in choose_attention(True, torch.float32)[1][0]
    gpu(monkeypatch, (9, 0), lambda *_: "it is broken")
    assert choose_attention(True, torch.float16) == (SHARED_SDPA, ["--flash_attn: it is broken; using SDPA"])


@pytest.mark.parametrize("function", [shared_sdpa, shared_flash])
def test_float32_queries_are_what_autocast_makes_of_them(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all weights trained queries and keys come as float32 and values as bfloat16: the kernel takes them still."""
    took: list[torch.dtype] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        took.extend((query.dtype, key.dtype, value.dtype))
        return varlen_reference(*(state.float() for state in (query, key, value)), *rest, **more).to(query.dtype)

    flash._takes_groups()  # of the real one
    monkeypatch.setattr(flash, "_fits", lambda query: query.dtype == torch.bfloat16)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    branches = PATTERNS[1]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, branches[-1][-1], 8, generator=generator) for heads in (4, 2, 2)]
    query, key, value = states[0].requires_grad_(), states[1].requires_grad_(), states[2].bfloat16().requires_grad_()
    with computing(PackContext(layout=PackLayout(branches[-1][-1], branches))):
        exact, _ = shared_sdpa(torch.nn.Module(), query, key, value.float(), None)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = function(torch.nn.Module(), query, key, value, None)
    assert took == ([torch.bfloat16] * 3 if function is shared_flash else [])
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), exact, atol=0.03)
    slopes = torch.autograd.grad(output.float().sum(), [query, key])
    for ours, theirs in zip(slopes, torch.autograd.grad(exact.sum(), [query, key]), strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=0.06)


def test_a_pytorch_without_the_kernel_is_said_and_sdpa_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), lambda *_: None)
    monkeypatch.setattr(flash, "varlen", None)
    flash._takes_groups.cache_clear()
    assert flash.gathered_heads(4, 2) == 4
    flash._takes_groups.cache_clear()
    function, notes = choose_attention(True, torch.bfloat16)
    assert function == SHARED_SDPA and "no variable-length kernel" in notes[0]


def test_heads_that_the_kernel_does_not_take_are_told() -> None:
    """Such layers would be computed by SDPA while run.json says FlashAttention."""
    for width in (260, 512, 36):
        function, notes = choose_attention(True, torch.bfloat16, width)
        assert function == SHARED_SDPA and f"heads are {width} wide" in notes[0] and "using SDPA" in notes[0]
    assert "no GPU" in choose_attention(True, torch.bfloat16, 256)[1][0] or torch.cuda.is_available()
