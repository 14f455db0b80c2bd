"""The last decoder layer only where an answer token is predicted.

Behind the last layer only the rows that predict a supervised token are looked at. Their keys and values come from all
tokens, but the queries' attention, the output projection and the MLP of that layer are needed at these rows alone. The
mathematics is unchanged: the rows that are left out have no influence on the loss, so their gradients are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.attention import attending_rows
from vlm_sft.model.families import PLAIN_LAYERS
from vlm_sft.model.forward_patch import exchange_forward

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_rows: torch.Tensor | None = None
_length = 0


@contextmanager
def kept_rows(rows: torch.Tensor | None, length: int) -> Iterator[None]:
    """Let trimmed models compute only some rows of their last layer while the block runs, backward pass included.

    Args:
        rows: (S,) int64, ascending positions that are needed behind the last layer; None for all.
        length: L, tokens of the sequence that is meant; others are computed whole.
    """
    global _rows, _length
    previous, previous_length = _rows, _length
    _rows, _length = rows, length
    try:
        yield
    finally:
        _rows, _length = previous, previous_length


def trim_last_layer(base: Any) -> bool:
    """Prepare a Hugging Face model for `kept_rows`.

    Args:
        base: the model, not yet wrapped.

    Returns:
        False where its decoder layers are not declared to be plain (`families.PLAIN_LAYERS`) or ZeRO-3 shares their
        weights out among ranks; nothing is changed then.
    """
    layer = _last_layer(base)
    if layer is None or is_partitioned(*layer.parameters()):
        return False
    exchange_forward([layer], lambda _: True, _forward)
    return True


def is_trimmed(base: Any) -> bool:
    """Whether the last layer of a model follows `kept_rows`."""
    layer = _last_layer(base)
    return layer is not None and hasattr(layer, "forward_stepwise")


def _last_layer(base: Any) -> Any:
    """The last decoder layer where it is x + attention(norm(x)), then + mlp(norm(·)); else None."""
    if base.config.get_text_config().model_type not in PLAIN_LAYERS:
        return None
    layers = getattr(base.get_decoder(), "layers", None)
    layer = layers[-1] if layers else None
    if layer is None or {name for name, _ in layer.named_children()} != _PARTS:
        return None
    return layer if hasattr(layer.self_attn, "o_proj") else None


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward of the last layer: (1, L, H) to (1, S, H) inside `kept_rows`, whole otherwise."""
    rows = _rows
    if rows is None or args or hidden_states.shape[:2] != (1, _length):
        return layer.forward_stepwise(hidden_states, *args, **kwargs)
    normed = layer.input_layernorm(hidden_states)
    # Hooked for the call only: the projection may have been wrapped by PEFT since the model was prepared.
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].index_select(1, rows),))
    try:
        with attending_rows(rows):
            attended = layer.self_attn(hidden_states=normed, **kwargs)[0]
    finally:
        hook.remove()
    hidden = hidden_states.index_select(1, rows) + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
