"""Modules and functions of libraries that are exchanged for faster ones that give the same values.

One is exchanged only where a numeric probe has shown that it computes the formula; one that differs, or whose
probe raises anything, is left as it is. With VLM_SFT_PLAIN=1 in the environment nothing is exchanged: every module
computes as its library wrote it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch

PLAIN = "VLM_SFT_PLAIN"  # in the environment
PLAIN_REASON = f"switched off by {PLAIN}=1"
_PROBE_ROWS = 3
_SCALES = (1.0, 1e-3, 1e3)
_log = logging.getLogger(__name__)


def is_plain() -> bool:
    """Whether the environment asks for the libraries' own modules and operators, without any faster form of ours."""
    return os.environ.get(PLAIN) == "1"


def exchange_forward(
    modules: Iterable[torch.nn.Module],
    fits: Callable[[Any], bool],
    fast: Callable[[Any, torch.Tensor], torch.Tensor | None],
) -> int:
    """Exchange the forward of modules of one input, once.

    Args:
        modules: among them those that are changed.
        fits: whether a module has the faster form; an exception counts as no.
        fast: computes a module's input, or returns None where it does not cover it. What it does not cover, and calls
            with more than one input, go to the module's earlier forward.

    Returns:
        How many were changed.
    """
    if is_plain():
        return 0
    found = [module for module in modules if not is_exchanged(module) and holds(fits, module)]
    for module in found:
        replace_forward(module, _with_fallback(fast))
    return len(found)


def replace_forward(module: Any, forward: Callable[..., torch.Tensor]) -> None:
    """Give a module another forward; the earlier one stays as `module.forward_stepwise` to fall back on."""
    module.forward_stepwise = module.forward
    module.forward = MethodType(forward, module)


def exchange_function(file: Any, name: str, form: str, fast: Callable[..., Any]) -> None:
    """Exchange a function of a library's file, for this process; it is to be looked up there at each call.

    Args:
        file: a module of Python.
        name: of the function.
        form: name of the faster form, as `forms_of` tells it.
        fast: computes the arguments of a call, or returns None where it does not cover them. Those go to the earlier
            function, which stays as `stepwise` of the new one.
    """
    stepwise = getattr(file, name)

    def exchanged(*args: Any, **kwargs: Any) -> Any:
        output = None if is_plain() else fast(*args, **kwargs)
        return stepwise(*args, **kwargs) if output is None else output

    exchanged.stepwise, exchanged.forms = stepwise, {form, *forms_of(stepwise)}  # type: ignore[attr-defined]
    setattr(file, name, exchanged)


def forms_of(function: Any) -> set[str]:
    """The faster forms that `exchange_function` has given to a function."""
    return getattr(function, "forms", set())


def is_exchanged(module: torch.nn.Module) -> bool:
    """Whether a module has another forward than its library gave it."""
    return "forward_stepwise" in vars(module)  # a module's own attributes: others may raise anything


def holds(fits: Callable[[Any], bool], module: torch.nn.Module) -> bool:
    """Whether a module has a property; an exception counts as no."""
    try:
        return fits(module)
    except Exception as error:  # an unknown module may raise anything, and none of it may end a run
        note_left(type(module).__name__, reason_of(error))
        return False


@cache
def note_left(kind: str, reason: str) -> None:
    """Say once a process that modules of a class keep their own forward.

    Args:
        kind: name of the class.
        reason: what its probe raised.
    """
    _log.info("%s is left as it is: its probe raised %s", kind, reason)


def _with_fallback(fast: Callable[[Any, torch.Tensor], torch.Tensor | None]) -> Callable[..., torch.Tensor]:
    def forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = (*args, *kwargs.values())
        output = fast(module, values[0]) if len(values) == 1 else None
        return module.forward_stepwise(*args, **kwargs) if output is None else output

    return forward


def probe_rows(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A few fixed rows, (3, channels), in the number format and on the device of a weight."""
    return torch.linspace(-2.0, 3.0, _PROBE_ROWS * channels).reshape(_PROBE_ROWS, channels).to(weight)


def agrees(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two computations give the same values, up to rounding.

    Args:
        found: of the faster form.
        expected: of the module or formula that it stands for.
        tolerance: the largest difference, as a share of the largest expected value; 0 for the same numbers.
    """
    if found.shape != expected.shape:
        return False
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (found.to(wide) - expected.to(wide)).abs().max()
    return bool(difference <= tolerance * expected.to(wide).abs().max())


def agree_at_scales(
    found: Callable[[torch.Tensor], torch.Tensor],
    expected: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    tolerance: float,
) -> bool:
    """Whether two functions give the same for small, usual and large values.

    An epsilon shows in small ones only, a limit that cuts values off (the clamped MLPs of Step 3.7) in large ones.

    Args:
        found, expected: of values of one shape.
        values: around 1.
        tolerance: as in `agrees`.
    """
    scaled = [values * scale for scale in _SCALES]
    return all(agrees(found(one), expected(one), tolerance) for one in scaled)


def values_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] = ()
) -> list[torch.Tensor]:
    """What a function gives, and the gradients of the sum of its cosines.

    Args:
        function: of the inputs.
        inputs: of any shapes; copies of them are used.
        weights: what else has a gradient.

    Returns:
        The output, then a gradient for each input and each weight.
    """
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    with torch.enable_grad():
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output.float().cos().sum(), [*leaves, *weights])]


def bare_copy(module: torch.nn.Module) -> Any:
    """A module of the same class with the same plain settings, and neither parameters nor children.

    It is small and can go to another process.
    """
    made = object.__new__(type(module))
    torch.nn.Module.__init__(made)
    vars(made).update(plain_settings(module))
    if hasattr(module, "config"):
        made.config = module.config
    return made


def plain_settings(module: torch.nn.Module) -> dict[str, int | float | str | tuple[Any, ...]]:
    """The attributes of a module that are numbers and texts, by their names."""
    return {name: one for name, one in vars(module).items() if isinstance(one, int | float | str | tuple)}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off while the block runs; afterwards every module is in the mode that it was in.

    Args:
        model: or one of its modules. A frozen tower may evaluate while the rest trains.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def reason_of(error: Exception) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
