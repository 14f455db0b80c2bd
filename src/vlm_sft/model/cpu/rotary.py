"""Rotary positions of queries, keys and patches in three passes instead of five, as one node of autograd, on CPUs.

transformers turns states as x · cos + rotate_half(x) · sin (Su et al. 2021, arXiv:2104.09864): it negates and joins the
halves anew, and the backward pass takes each of these steps once more, with two matrices of zeros for the halves. Here
the halves are multiplied where they lie. The gradient is the same turn with the sines of the halves exchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from vlm_sft.model.cpu.matmul import EXACT, TOLERANCE
from vlm_sft.model.forward_patch import (
    agrees,
    exchange_function,
    forms_of,
    is_plain,
    note_left,
    reason_of,
    values_and_gradients,
)

FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")  # in transformers' modeling files
_FORM = "halves"
_AXIS = "unsqueeze_dim"
_VISION_AXIS = -2  # of the heads, where a function takes no such argument
_TOKENS, _HEADS, _WIDTH, _REST = 5, (4, 2), 8, 4  # of the states that are compared


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a function of a modeling file is called.

    Attributes:
        states: tensors that one call turns: queries and keys, or one of them.
        axis: where angles, (…, L, R), get a dimension for the heads, unless a call says so.
        narrower: whether it takes angles that are narrower than a head, and leaves the channels behind them.
    """

    states: int
    axis: int
    narrower: bool = False


class _Turn(torch.autograd.Function):
    """x · cos + rotate_half(x) · sin, for angles without gradients."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn states, (…, D)."""
        ctx.save_for_backward(cos, sin)
        before, behind = sin.chunk(2, -1)
        return _turned(states, cos, before, behind, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the states."""
        cos, sin = ctx.saved_tensors
        before, behind = sin.chunk(2, -1)
        return _turned(gradients[0], cos, behind, before, 1), None, None


def _turned(
    states: torch.Tensor, cos: torch.Tensor, before: torch.Tensor, behind: torch.Tensor, sign: int
) -> torch.Tensor:
    """Turn the first R channels of states.

    Args:
        states: (…, D).
        cos: (…, R).
        before, behind: (…, R / 2), what the first half gets of the second one, and the second half of the first one.
        sign: 1 or -1, of what the first half gets; the second half gets the opposite.
    """
    width = cos.shape[-1]
    half = width // 2
    output = torch.empty_like(states)
    torch.mul(states[..., :width], cos, out=output[..., :width])
    output[..., :half].addcmul_(states[..., half:width], before, value=sign)
    output[..., half:width].addcmul_(states[..., :half], behind, value=-sign)
    if width < states.shape[-1]:
        output[..., width:] = states[..., width:]
    return output


def fuse_rotary(model: torch.nn.Module) -> int:
    """Let the functions that turn states by their positions take fewer steps, in the files of a model's modules.

    They are exchanged for this process. A function counts when it gives the values and gradients of the formula; on
    other devices, in other number formats and with other arguments it computes as before.

    Returns:
        How many functions of these files are exchanged.
    """
    if is_plain():
        return 0
    files = {inspect.getmodule(type(module)) for module in model.modules()}
    return sum(_exchanged(file, name) for file in files for name in FUNCTIONS if hasattr(file, name))


def _exchanged(file: Any, name: str) -> bool:
    """Whether a function of a file takes fewer steps, after it has been made to if it can."""
    function = getattr(file, name)
    if _FORM in forms_of(function):
        return True
    rotation = rotation_of(function)
    if rotation is None:
        return False
    exchange_function(file, name, _FORM, partial(_fast, rotation))
    return True


@cache
def rotation_of(function: Callable[..., Any]) -> Rotation | None:
    """How a function turns states; None where it is not by the formula. It may be anything, and raise anything."""
    try:
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        axis = parameters[_AXIS].default if _AXIS in names else _VISION_AXIS
        rotation = Rotation(names.index("cos"), axis)
        if rotation.states > len(_HEADS) or not _agrees(function, rotation, 0):
            return None
    except Exception as error:
        note_left(getattr(function, "__qualname__", "a rotation"), reason_of(error))
        return None
    wider = Rotation(rotation.states, axis, narrower=True)
    try:
        return wider if _agrees(function, wider, _REST) else rotation
    except Exception:  # of shapes that do not go together
        return rotation


def _agrees(function: Callable[..., Any], rotation: Rotation, rest: int) -> bool:
    """Whether a function gives our values and gradients, for heads with `rest` channels behind those that are turned.

    The angles are random numbers without any order, so that none of them can stand for another.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_TOKENS, _WIDTH) if rotation.axis == _VISION_AXIS else (2, _TOKENS, _WIDTH)
    cos, sin = torch.randn(2, *shape, generator=generator)
    states = []
    for heads in _HEADS[: rotation.states]:
        size = list(cos.unsqueeze(rotation.axis).shape)
        size[rotation.axis], size[-1] = heads, _WIDTH + rest
        states.append(torch.randn(size, generator=generator))
    ours = values_and_gradients(_joined(partial(_fast, rotation), cos, sin), states)
    theirs = values_and_gradients(_joined(function, cos, sin), states)
    return all(agrees(found, exact, TOLERANCE) for found, exact in zip(ours, theirs, strict=True))


def _joined(function: Callable[..., Any], cos: torch.Tensor, sin: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A function of states with all its results in one row of numbers."""

    def joined(*states: torch.Tensor) -> torch.Tensor:
        found = function(*states, cos, sin)
        return torch.cat([one.flatten() for one in ([found] if isinstance(found, torch.Tensor) else found)])

    return joined


def _fast(rotation: Rotation, *values: Any, **named: Any) -> Any:
    """What a function of this kind gives for its arguments; None where they are of another kind."""
    count = rotation.states
    if len(values) == count + 3 and _AXIS not in named:
        values, named = values[:-1], {**named, _AXIS: values[-1]}
    if len(values) != count + 2 or not named.keys() <= {_AXIS} or not _covered(values):
        return None
    *states, cos, sin = values
    axis = named.get(_AXIS, rotation.axis)
    cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
    if not all(_fits(one, cos, rotation.narrower) for one in states):
        return None
    turned = tuple(_Turn.apply(one, cos, sin) for one in states)
    return turned if count > 1 else turned[0]


def _covered(values: Iterable[Any]) -> bool:
    """Whether states and angles are in one exact number format on a CPU, and the angles without gradients."""
    *states, cos, sin = values
    if not all(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in (*states, cos, sin)):
        return False
    alike = cos.shape == sin.shape and all(one.dtype == cos.dtype for one in (*states, sin))
    return alike and cos.dtype in EXACT and not (cos.requires_grad or sin.requires_grad)


def _fits(states: torch.Tensor, cos: torch.Tensor, narrower: bool) -> bool:
    """Whether states (…, D) keep their shape beside cosines (…, R) with a dimension for the heads."""
    width = cos.shape[-1]
    if (
        states.dim() != cos.dim()
        or width % 2
        or not (width == states.shape[-1] or (narrower and width < states.shape[-1]))
    ):
        return False
    return all(one in (1, own) for own, one in zip(states.shape[:-1], cos.shape[:-1], strict=True))
