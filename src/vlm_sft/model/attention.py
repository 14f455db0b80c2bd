"""Attention over packs of shared image prefixes, as attention functions of transformers.

Shape suffixes: B batch, H heads, K key/value heads, L tokens of the pack, N tokens of one image with its questions,
D head width.

Every token sees its own prefix and its own question up to itself, so the attention of a pack falls apart into one
small problem per image. The function registered here computes those, and no L x L mask exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_sft.model.families import FULL_REACH, STATEFUL, TOKENWISE, PackMode, Reach, layer_kinds
from vlm_sft.model.forward_patch import is_plain
from vlm_sft.model.pack_context import PackLayout, current_pack
from vlm_sft.model.protocols import VisionLanguageModel

SHARED_SDPA = "vlm_sft_sdpa"
SHARED_WINDOWS = "vlm_sft_flash_windows"  # the name has to contain "flash", see `shared_windows`
PLAIN_ATTENTION = "eager"  # transformers' own products, for models that cap their scores or add sinks to them


def shared_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attended_rows: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, image by image inside a pack; elsewhere what transformers' `sdpa` does.

    Args:
        module: the attention layer.
        query: (B, H, L, D); key, value: (B, K, L, D).
        attention_mask: inside a pack its layout's `marker`, in a generation step that of `DecodingStep`; elsewhere
            a mask.
        dropout: attention dropout probability.
        scaling: factor on the products; 1 / sqrt(D) when None.
        attended_rows: (S,) int64, the tokens of a pack whose output is needed; None for all.
        **kwargs: passed to transformers outside packs.

    Returns:
        (B, L, H, D), zero in the rows of a pack that are not needed, and None, as transformers expects.
    """
    layout = _whole_pack(query, key)
    if layout is not None and getattr(module, "is_causal", True):
        reach = layout.reach_of(attention_mask)
        return pack_sdpa(layout, query, key, value, dropout, scaling, reach, attended_rows), None
    decoding = current_pack().decoding
    if decoding is not None and decoding.computes(key, attention_mask):
        return decoding.attend(query, key, value, scaling), None
    grouped = query.shape[2] < key.shape[2] and query.shape[1] > key.shape[1]
    if attention_mask is not None and grouped and not is_plain():
        return _continued(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _whole_pack(query: torch.Tensor, key: torch.Tensor) -> PackLayout | None:
    """The layout of the current pack where queries and keys (B, H, L, D) are all of its tokens; else None."""
    layout = current_pack().layout
    return layout if layout is not None and query.shape[2] == key.shape[2] == layout.length else None


def causal_pack(query: torch.Tensor, key: torch.Tensor, marker: torch.Tensor | None) -> PackLayout | None:
    """The layout of the current pack, for causal attention over all of its tokens, windowed or not; else None.

    Args:
        query, key: (B, H, L, D).
        marker: of the kind of layers.
    """
    layout = _whole_pack(query, key)
    if layout is None:
        return None
    reach = layout.reach_of(marker)
    return None if reach.chunk is not None or (layout.blocks is not None and reach.blocks) else layout


def pack_sdpa(
    layout: PackLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    reach: Reach = FULL_REACH,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention over a pack, image by image.

    Args:
        layout: of the pack.
        query, key, value, dropout, scaling: as in `shared_sdpa`.
        reach: how far tokens look.
        rows: as `attended_rows` there.

    Returns:
        (1, L, H, D).
    """
    repeats = query.shape[1] // key.shape[1]
    # On a GPU the masks of a pack, four times as large, may not find room.
    masks = layout.masks(query.device, reach, query.dtype if query.device.type == "cpu" else torch.bool)
    # split, not slices: the gradients of slices would each be a tensor of the whole pack, and their sum quadratic.
    sizes = [end - start for start, end in layout.spans]
    keys, values = (repeat_kv(tensor, repeats).split(sizes, dim=2) for tensor in (key, value))
    queries: Sequence[torch.Tensor] = query.split(sizes, dim=2)
    if rows is not None:
        parts = layout.parts(rows)
        queries = [part.index_select(2, own) for part, own in zip(queries, parts, strict=True)]
        masks = [_mask_rows(mask, own, size) for mask, own, size in zip(masks, parts, sizes, strict=True)]
    outputs = [
        F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling)
        for q, k, v, mask in zip(queries, keys, values, masks, strict=True)
    ]
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    if rows is None:
        return output.contiguous()
    return output.new_zeros(1, layout.length, *output.shape[2:]).index_copy(1, rows, output)


def _continued(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, dropout: float, scale: float | None
) -> torch.Tensor:
    """Attention of a few tokens to a long cache that several heads share: the heads of a key are rows of one product.

    Repeating the keys instead, as transformers does under a mask, would copy the whole cache in every step.

    Args:
        query: (B, H, Q, D).
        key, value: (B, K, L, D), head h of the queries belonging to h // (H / K).
        mask: (B or 1, 1, Q, L).
        dropout, scale: as in `shared_sdpa`.

    Returns:
        (B, Q, H, D).
    """
    batch, heads, length, width = query.shape
    repeats = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], repeats * length, width)
    output = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=mask.repeat(1, 1, repeats, 1), dropout_p=dropout, scale=scale
    )
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous()


def _mask_rows(mask: torch.Tensor | None, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Some rows of the mask of an image of `size` tokens, (1, 1, rows, size); None stands for plain causal."""
    if mask is None:
        return (torch.arange(size, device=rows.device)[None, :] <= rows[:, None])[None, None]
    return mask.index_select(2, rows)


def shared_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within windows or images of a vision tower, all of one length in one call.

    transformers' `sdpa` calls the kernel once per window; towers pass the ends of the windows only to functions whose
    name contains "flash". The values are the same.

    Args:
        module: the attention layer.
        query, key, value: (1, H, L, D).
        attention_mask: used where there are no windows.
        dropout: attention dropout probability.
        scaling: factor on the products; 1 / sqrt(D) when None.
        cu_seq_lens_q: (windows + 1,) cumulative lengths; None for one image alone (RADIO).
        **kwargs: passed to transformers where there are no windows.

    Returns:
        (1, L, H, D) and None.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    sizes = _window_sizes(cu_seq_lens_q)
    states = [tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    outputs: list[torch.Tensor | None] = [None] * len(sizes)
    for size in sorted(set(sizes)):
        places = [index for index, other in enumerate(sizes) if other == size]
        q, k, v = (torch.stack([windows[index] for index in places]).transpose(1, 2) for windows in states)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2)
        for index, window in zip(places, found, strict=True):
            outputs[index] = window
    return torch.cat([window for window in outputs if window is not None])[None], None


def _window_sizes(ends: torch.Tensor) -> list[int]:
    """Lengths of windows. All layers of a tower share one tensor of their ends, so a GPU is waited for once."""
    sizes = getattr(ends, "window_sizes", None)
    if sizes is None:
        sizes = ends.window_sizes = ends.diff().tolist()  # type: ignore[attr-defined]
    return sizes


def register(functions: dict[str, Callable[..., tuple[torch.Tensor, None]]]) -> None:
    """Make attention functions known to transformers by their names."""
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


register({SHARED_SDPA: shared_sdpa, SHARED_WINDOWS: shared_windows})


def attention_name(config: Any) -> str:
    """Name of the attention function that a part of a model uses; transformers has no public name for it.

    Args:
        config: of the language model or of the vision tower.
    """
    return config._attn_implementation


def assign_windows(config: Any, name: str) -> None:
    """Let a vision tower attend through one of our functions for windows.

    `set_attn_implementation`, the public way, takes every name with "flash" for a package that has to be imported.

    Args:
        config: of the tower.
        name: of the function.
    """
    config._attn_implementation = name


def masks_for(
    base: VisionLanguageModel, mode: PackMode, build: Callable[[Reach], torch.Tensor]
) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """The `attention_mask` argument: one mask, or one for each kind of layers where there are several.

    Args:
        base: the Hugging Face model.
        mode: how packs are computed.
        build: makes the mask of one kind of layers, bool.
    """
    masks: dict[str, torch.Tensor | None] = {reach.layers: _as_taken(base, build(reach)) for reach in mode.reaches}
    if len(masks) == 1 and (only := masks[mode.reaches[0].layers]) is not None:
        return only
    # Layers that carry a state follow the layout of the pack, not a mask; layers without attention need neither.
    return masks | dict.fromkeys(name for name in layer_kinds(base.config) if name in (*STATEFUL, *TOKENWISE))


def _as_taken(base: VisionLanguageModel, mask: torch.Tensor) -> torch.Tensor:
    """A mask as the attention function of a language model takes it: transformers' own adds it to the scores."""
    if attention_name(base.config.get_text_config()) != PLAIN_ATTENTION:
        return mask
    dtype = base.get_input_embeddings().weight.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def assign_attention(model: VisionLanguageModel, text: str) -> None:
    """Let the language model attend through a function, and every other part through SDPA, where they take these.

    Args:
        model: with weights or without; changed in place.
        text: name of the language model's function.
    """
    wanted = {part: text if part == "text_config" else "sdpa" for part in model.config.sub_configs}
    try:
        model.set_attn_implementation(wanted)
    except ValueError:  # transformers': a part takes no function but its own
        for part, name in wanted.items():
            try:
                model.set_attn_implementation({part: name})
            except ValueError:
                model.set_attn_implementation({part: PLAIN_ATTENTION})


def attention_names(model: VisionLanguageModel) -> dict[str, str]:
    """The names of a model's attention functions as `from_pretrained` takes them: its own under "", then its parts'."""
    parts = ((part, getattr(model.config, part)) for part in model.config.sub_configs)
    named = {part: attention_name(config) for part, config in parts if config is not None}
    return {"": attention_name(model.config), **named}
