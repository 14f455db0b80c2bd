"""Modules whose forward is exchanged for a faster one.

With VLM_SFT_PLAIN=1 in the environment nothing is exchanged: every module computes as its library wrote it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch

PLAIN = "VLM_SFT_PLAIN"  # in the environment


def exchange_forward(
    modules: Iterable[torch.nn.Module], fits: Callable[[Any], bool], forward: Callable[..., torch.Tensor]
) -> int:
    """Exchange the forward of modules, once; the earlier one stays as `module.forward_stepwise` to fall back on.

    Args:
        modules: among them those that are changed.
        fits: whether one has the faster form.
        forward: the new one, a function of the module and its inputs.

    Returns:
        How many were changed.
    """
    if os.environ.get(PLAIN) == "1":
        return 0
    found: list[Any] = [one for one in modules if not hasattr(one, "forward_stepwise") and fits(one)]
    for module in found:
        module.forward_stepwise = module.forward
        module.forward = MethodType(forward, module)
    return len(found)


def reason_of(error: Exception) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
