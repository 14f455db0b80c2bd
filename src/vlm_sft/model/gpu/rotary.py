"""Rotary positions of queries and keys by the kernel of liger-kernel, in training on GPUs, where it is installed.

transformers turns queries and keys in seven elementwise kernels a layer and writes halves of them anew; liger-kernel
has one kernel that turns both where they lie. It takes cosines and sines whose two halves are alike, and pairs the
channel c of a head with the one half a head further. Families that pair neighbouring channels, and those that turn
queries in another way, are told apart by their numbers and left as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType
from typing import Any

import torch

from vlm_sft.model.forward_patch import agrees, exchange_function, forms_of, reason_of, values_and_gradients
from vlm_sft.model.gpu import liger

FUNCTION = "apply_rotary_pos_emb"  # of transformers' modeling files; attention looks it up there at each call
_TOKENS, _HEADS = 7, (4, 2)  # of queries and keys that are compared
_STEP = 37  # positions between them, so that the slow channels turn, too
_FORM = "liger"
Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fused_rotary(model: torch.nn.Module, device: torch.device) -> Iterator[tuple[str, int, str | None]]:
    """Let the queries and keys of a model be turned in one kernel.

    The function is exchanged in the file of the model's attention, for this process. Without gradients, and for what
    the kernel does not take, it goes on to the earlier one.

    Args:
        model: its modules may be anywhere.
        device: where it will run: the kernel is compared with the file's own function there first.

    Yields:
        As `liger.fused_parts`.
    """
    found = map(_found, (module for module in model.modules() if hasattr(module, "rotary_emb")))
    users = {file.__name__: (file, embedding, width) for file, embedding, width in filter(None, found)}
    if not users:
        return
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dtype in liger.TOLERANCE)
    problems = [liger.missing() or _exchange(*user, dtype, device) for user in users.values()]
    yield "rotary", problems.count(None), next((problem for problem in problems if problem), None)


def _found(model: Any) -> tuple[ModuleType, Any, int] | None:
    """The file of a language model's attention, its embedding, and the width of a head; None where it has none so."""
    embedding = model.rotary_emb
    file = inspect.getmodule(type(embedding))
    if file is None or not hasattr(file, FUNCTION):
        return None
    widths = (
        module.head_dim
        for module in model.modules()
        if hasattr(module, "k_proj") and hasattr(module, "head_dim") and inspect.getmodule(type(module)) is file
    )
    width = next(widths, None)
    return None if width is None else (file, embedding, int(width))


def _exchange(file: Any, embedding: Any, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Exchange the function of a file, once; returns why not."""
    stepwise: Rotation = getattr(file, FUNCTION)
    if _FORM in forms_of(stepwise):
        return None
    problem = _problem(stepwise, embedding, width, dtype, device)
    if problem is None:
        exchange_function(file, FUNCTION, _FORM, _fast)
    return problem


def _problem(stepwise: Rotation, embedding: Any, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compare values and gradients of the kernel with those of a function, at angles from the model's own embedding."""
    name = f"{FUNCTION} of {type(embedding).__name__.removesuffix('RotaryEmbedding')}"
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, _TOKENS, heads * width, generator=generator) for heads in _HEADS]
    try:
        angles = [(cos.to(device), sin.to(device)) for cos, sin in _angles(embedding, dtype)]
        inputs = [state.to(device, dtype) for state in states]
        expected = [values_and_gradients(_turned(stepwise, *pair, width), inputs) for pair in angles]
    except Exception as error:  # an unknown family may raise anything
        return f"{name} is left as it is ({reason_of(error)})"
    try:
        found = [values_and_gradients(_turned(_kernel, *pair, width), inputs) for pair in angles]
    except Exception as error:  # a compiler and a driver may raise anything
        return f"liger-kernel does not run here ({reason_of(error)})"
    pairs = zip(chain.from_iterable(found), chain.from_iterable(expected), strict=True)
    if not all(agrees(ours, exact, liger.TOLERANCE[dtype]) for ours, exact in pairs):
        return f"liger-kernel gives other values than {name}"
    return None


def _angles(embedding: Any, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines of a few positions, (1, L, D) each; for each kind of layer where an embedding knows several."""
    place = next(embedding.buffers()).device
    several = "layer_type" in inspect.signature(embedding.forward).parameters
    for kind in sorted(set(embedding.config.layer_types)) if several else [None]:
        positions = _STEP * torch.arange(_TOKENS, device=place)[None]
        named = {} if kind is None else {"layer_type": kind}
        yield embedding(torch.zeros(1, dtype=dtype, device=place), positions, **named)


def _turned(rotation: Rotation, cos: torch.Tensor, sin: torch.Tensor, width: int) -> Callable[..., torch.Tensor]:
    """A function of queries and keys as projections give them, (1, L, H·D), with both results in one row of tensors."""

    def turned(*states: torch.Tensor) -> torch.Tensor:
        # A product with one, for the kernel writes where its input lies, and a leaf must not be written to.
        heads = ((state * 1).unflatten(-1, (-1, width)).transpose(1, 2) for state in states)
        return torch.cat([one.flatten() for one in rotation(*heads, cos, sin)])

    return turned


def _kernel(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Turn queries (B, H, L, D) and keys (B, K, L, D) by angles (B or 1, L, D or less)."""
    from liger_kernel.ops import LigerRopeFunction

    # It writes into its input, unknown to autograd: who has kept that for a gradient is told when it is asked for.
    torch.autograd.graph.increment_version([state for state in (query, key) if state.transpose(1, 2).is_contiguous()])
    return LigerRopeFunction.apply(query, key, cos, sin)


def _takes(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether these are what was compared: states of one dtype and length, in training on a GPU."""
    alike = query.dtype == key.dtype == cos.dtype and query.shape[2] == key.shape[2] == cos.shape[-2]
    return alike and cos.dim() == 3 and query.is_cuda and torch.is_grad_enabled()


def _fast(*values: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Turn queries and keys; None for calls with other arguments than these and the angles, or none of `_takes`."""
    return _kernel(*values) if len(values) == 4 and not named and _takes(*values[:3]) else None
