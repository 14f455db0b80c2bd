"""The last decoder layer only where an answer token is predicted.

Behind the last layer only the rows that predict a supervised token are used. Their keys and values come from all
tokens, but the queries' attention, the output projection and the MLP of that layer are needed at these rows alone. The
mathematics is unchanged: the rows that are left out have no influence on the loss, so their gradients are zero.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.common.console import warn
from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.families import PLAIN_LAYERS, router_coefficient
from vlm_sft.model.forward_patch import agrees, evaluating, is_exchanged, is_plain, reason_of, replace_forward
from vlm_sft.model.pack_context import current_pack
from vlm_sft.model.protocols import VisionLanguageModel

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_PROBE_TOKENS, _PROBE_ROWS = 7, (2, 5, 6)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def trim_last_layer(base: VisionLanguageModel) -> bool:
    """Let a model compute only the rows of the current pack that are needed in its last layer.

    Args:
        base: the Hugging Face model, not yet wrapped.

    Returns:
        False where its decoder layers are not declared to be plain (`families.PLAIN_LAYERS`), their weights are
        divided over the ranks, or a few random rows come out differently; the layer is left as it is then.
    """
    layer = _last_layer(base)
    if layer is None or is_plain() or is_partitioned(*layer.parameters()):
        return False
    if is_exchanged(layer):
        return True
    problem = _problem(base.get_decoder(), layer)
    if problem:
        warn(f"{type(layer).__name__}, the last layer, is left as it is: {problem}")
        return False
    replace_forward(layer, _forward)
    return True


def is_trimmed(base: VisionLanguageModel) -> bool:
    """Whether the last layer of a model computes only the rows of a pack that are needed."""
    layer = _last_layer(base)
    return layer is not None and is_exchanged(layer)


def _last_layer(base: VisionLanguageModel) -> Any:
    """The last decoder layer where it is x + attention(norm(x)), then + mlp(norm(·)); else None."""
    if base.config.get_text_config().model_type not in PLAIN_LAYERS or router_coefficient(base):
        return None  # a router loss is one of all tokens
    layers = getattr(base.get_decoder(), "layers", None)
    layer = layers[-1] if layers else None
    if layer is None or {name for name, _ in layer.named_children()} != _PARTS:
        return None
    return layer if hasattr(layer.self_attn, "o_proj") else None


@torch.no_grad()
def _problem(decoder: Any, layer: Any) -> str | None:
    """Compare a few rows of random hidden states with those of the whole layer; None where they are the same."""
    try:
        with evaluating(layer):  # no dropout: nothing is drawn from a global random generator
            weight = layer.input_layernorm.weight
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(1, _PROBE_TOKENS, len(weight), generator=generator).to(weight)
            rows = torch.tensor(_PROBE_ROWS, device=weight.device)
            arguments = _layer_arguments(decoder, hidden)
            expected = layer(hidden, **arguments).index_select(1, rows)
            same = agrees(_at_rows(layer, hidden, rows, **arguments), expected, _TOLERANCE[weight.dtype])
    except Exception as error:  # an unknown layer may raise anything, and none of it may end a run
        return reason_of(error)
    return None if same else "its rows have other values when they are computed alone"


class _StopError(Exception):
    """Ends a decoder's forward at its first layer."""


def _layer_arguments(decoder: Any, hidden: torch.Tensor) -> dict[str, Any]:
    """What a decoder passes to its layers beside hidden states (1, L, C): positions, mask."""
    passed: dict[str, Any] = {}

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed.update(kwargs)
        raise _StopError

    handle = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(inputs_embeds=hidden, use_cache=False)
    except _StopError:
        pass
    finally:
        handle.remove()
    passed.pop("hidden_states", None)
    return passed


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward of the last layer: (1, L, C) to (1, S, C) inside a pack of which S rows are needed, whole otherwise."""
    pack = current_pack()
    if pack.rows is None or args or hidden_states.shape[:2] != (1, pack.tokens):
        return layer.forward_stepwise(hidden_states, *args, **kwargs)
    if pack.layout is not None:  # our own attention functions compute these rows only
        kwargs["attended_rows"] = pack.rows
    return _at_rows(layer, hidden_states, pack.rows, **kwargs)


def _at_rows(layer: Any, hidden_states: torch.Tensor, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The output (1, S, C) of a layer at some rows (S,) of (1, L, C) hidden states."""
    normed = layer.input_layernorm(hidden_states)
    # Hooked for the call only: the projection may have been wrapped by PEFT since the model was prepared.
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0].index_select(1, rows),))
    try:
        attended = layer.self_attn(hidden_states=normed, **kwargs)[0]
    finally:
        hook.remove()
    hidden = hidden_states.index_select(1, rows) + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
