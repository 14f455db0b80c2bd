"""FlashAttention over packs of shared image prefixes and over the windows of a vision tower.

The kernel (Dao 2023, arXiv:2307.08691) is the one inside PyTorch, `torch.nn.attention.varlen`: no package has to be
built. It computes half precision on GPUs. `flash_problem` says before a run whether it is there and right.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_sft.model.attention import causal_pack, pack_sdpa, register, shared_sdpa, shared_windows
from vlm_sft.model.forward_patch import PLAIN_REASON, agrees, is_plain, reason_of, values_and_gradients
from vlm_sft.model.pack_context import PackLayout

try:
    from torch.nn.attention import varlen
except ImportError:  # an older PyTorch: `flash_problem` says so
    varlen = None  # type: ignore[assignment]

SHARED_FLASH = "vlm_sft_flash"
FLASH_WINDOWS = "vlm_sft_flash_windows_varlen"  # the name has to contain "flash", see `shared_windows`
_HALF = (torch.float16, torch.bfloat16)
_WIDEST, _WIDTH_STEP = 256, 8  # head widths that the kernel takes
_ALL, _CAUSAL = (-1, -1), (-1, 0)  # how far back and ahead a query looks
_CHECKED = [[0, 70, 90, 97], [97, 130, 131]]  # branches of a small pack
_CHECKED_WINDOWS = [0, 64, 70, 131]  # ends of the windows of a small tower call
_CHECKED_HEADS, _CHECKED_WIDTHS, _TOLERANCE = (4, 2, 2), (64, 80), 0.05  # of a language model, of Qwen's towers


def shared_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention over a pack in one variable-length call; outside packs as `shared_sdpa`.

    A prefix is one sequence. A question is one whose keys are gathered: its prefix, then itself. It has more keys than
    queries, and the causal rule is aligned to the end, so it sees the whole prefix and itself up to each token; a
    sliding window counts back from there. Chunks, and tokens that see each other in both directions, need a mask, which
    this kernel does not take; the few rows of a trimmed layer, heads that are too wide and dropout are computed by SDPA
    too. Arguments and result as `shared_sdpa`.
    """
    query, key, value = autocast_states(query, key, value)
    layout = causal_pack(query, key, attention_mask)
    if layout is None or dropout or kwargs.get("attended_rows") is not None or not _fits(query):
        return shared_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return pack_flash(layout, query, key, value, scaling, layout.reach_of(attention_mask).window), None


def pack_flash(
    layout: PackLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """FlashAttention over a causal pack; arguments and result as `pack_sdpa`."""
    index = layout.varlen(query.device)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends, longest = (index.query_ends, index.key_ends), (index.longest_query, index.longest_key)
    looks = _CAUSAL if window is None else (window - 1, 0)
    return _attend(queries, keys[index.gather], values[index.gather], ends, longest, scaling, looks)[None]


def flash_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within windows or images of a vision tower, in one variable-length call.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, cu_seq_lens_q: as `shared_windows`.
        max_length_q: patches of the longest window; counted when None.
        **kwargs: passed on where `shared_windows` computes.

    Returns:
        (1, L, H, D) and None.
    """
    query, key, value = autocast_states(query, key, value)
    if dropout or cu_seq_lens_q is None or not _fits(query):
        return shared_windows(module, query, key, value, attention_mask, dropout, scaling, cu_seq_lens_q, **kwargs)
    longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else int(max_length_q)
    ends = cu_seq_lens_q.to(torch.int32)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _attend(queries, keys, values, (ends, ends), (longest, longest), scaling, _ALL)[None], None


def flash_problem(dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why FlashAttention cannot be used in this process; None where it computes what SDPA computes.

    Args:
        dtype: of the model.
        width: of the heads of its language model; None where that is not known.
    """
    if width is not None and not takes_width(width):
        return f"the model's heads are {width} wide, and the kernel takes multiples of {_WIDTH_STEP} up to {_WIDEST}"
    if is_plain():
        return PLAIN_REASON
    if not torch.cuda.is_available():
        return "no GPU"
    if varlen is None:
        return f"PyTorch {torch.__version__} has no variable-length kernel"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    if dtype not in _HALF:
        return f"it computes bfloat16, not {str(dtype).removeprefix('torch.')}"
    return kernel_problem(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), dtype)


def kernel_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with FlashAttention on a small pack, small windows and their gradients; None if nothing is.

    Kernels differ in where a causal rule begins when there are more keys than queries: one that aligns it to the first
    key would let questions see a part of their image only, and nothing would tell.
    """
    layout = PackLayout(_CHECKED[-1][-1], _CHECKED)
    ends = torch.tensor(_CHECKED_WINDOWS, dtype=torch.int32, device=device)
    pack, tower = (_random_states(width, device, dtype) for width in _CHECKED_WIDTHS)
    windows = [tower[0], tower[0].flip(1), tower[0].flip(2)]  # as many heads of each, which is how towers attend

    def in_windows(function: Any) -> Callable[..., torch.Tensor]:
        return lambda *states: function(torch.nn.Module(), *states, None, cu_seq_lens_q=ends)[0]

    for name, ours, exact, states in (
        ("", partial(pack_flash, layout), partial(pack_sdpa, layout), pack),
        (" in the windows of a vision tower", in_windows(flash_windows), in_windows(shared_windows), windows),
    ):
        try:
            found = values_and_gradients(ours, states)
        except Exception as error:  # a driver may raise anything
            return f"PyTorch's kernel does not run here{name} ({reason_of(error)})"
        pairs = zip(found, values_and_gradients(exact, states), strict=True)
        if not all(agrees(value, right, _TOLERANCE) for value, right in pairs):
            return f"PyTorch's kernel gives other values than SDPA here{name}"
    return None


def _random_states(width: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of the checked length, (1, H, L, width)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, _CHECKED[-1][-1], width) for heads in _CHECKED_HEADS]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _fits(query: torch.Tensor) -> bool:
    """Whether the kernel computes queries (B, H, L, D) of this format and width."""
    return query.dtype in _HALF and takes_width(query.shape[-1]) and not query.is_cpu


def takes_width(width: int) -> bool:
    """Whether the kernel computes heads of this width."""
    return width <= _WIDEST and width % _WIDTH_STEP == 0


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float | None,
    looks: tuple[int, int],
) -> torch.Tensor:
    """One call of the kernel over sequences that follow one another.

    Args:
        queries: (G, H, D).
        keys, values: (G', K, D), head h of the queries belonging to h // (H / K).
        ends: cumulative lengths of the sequences in queries and in keys, (sequences + 1,) int32.
        longest: the longest of each, in tokens.
        scale: factor on the products; 1 / sqrt(D) when None.
        looks: how many tokens back and ahead a query looks, -1 for all; aligned to the last key.

    Returns:
        (G, H, D).
    """
    grouped: dict[str, Any] = {}
    if queries.shape[1] != keys.shape[1]:
        if _takes_groups():
            grouped["enable_gqa"] = True
        else:
            repeats = queries.shape[1] // keys.shape[1]
            keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    # PyTorch 2.12 and later would take cuDNN for windows, which builds a graph for every new shape (42 to 51 ms each
    # were reported), and images have many.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = varlen.varlen_attn(queries, keys, values, *ends, *longest, scale=scale, window_size=looks, **grouped)
    assert isinstance(output, torch.Tensor)  # a tuple only where more is requested
    return output


def autocast_states(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in the number format in which autocast would compute scaled dot-product attention.

    Where all weights are trained they are float32, and so are the rotary positions and what they are multiplied with:
    queries and keys. Autocast narrows them for SDPA, and knows nothing of this kernel, which takes half precision only.
    """
    kind = states[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return states
    dtype = torch.get_autocast_dtype(kind)
    return tuple(state.to(dtype) if state.dtype == torch.float32 else state for state in states)


def gathered_heads(heads: int, key_heads: int) -> int:
    """How many heads the keys have that are gathered for the kernel: their own, or those of the queries."""
    return key_heads if _takes_groups() else heads


@cache
def _takes_groups() -> bool:
    """Whether the kernel of this PyTorch lets heads share keys (2.12 and later)."""
    return varlen is not None and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


register({SHARED_FLASH: shared_flash, FLASH_WINDOWS: flash_windows})
