"""Norms and gated MLPs by the kernels of liger-kernel, in training on GPUs, where it is installed.

transformers computes an RMSNorm in six elementwise kernels, partly in float32, and the activation of a gated MLP in two
that write matrices of the MLP's width; liger-kernel (Hsu et al. 2024, arXiv:2410.10989) has one for each, forward
and backward. What is computed without gradients keeps the rounding of the modules, as `vlm-sft eval` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.forward_patch import (
    PLAIN_REASON,
    agrees,
    bare_copy,
    exchange_forward,
    holds,
    is_exchanged,
    is_plain,
    plain_settings,
    reason_of,
    values_and_gradients,
)

PACKAGE = "liger_kernel"
INSTALL = "pip install 'vlm-sft[liger]'"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROWS, _WIDTH, _INNER = 5, 96, 160  # of the small modules that are compared
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class _Part:
    """One kind of module that liger-kernel has a kernel for.

    Attributes:
        fits: whether a module may be one.
        small: a small module of the same class on a device, to compare with.
        kernel: computes (…, C) hidden states of a module.
        fast: the same, or None where the module's own forward computes them.
    """

    fits: Callable[[Any], bool]
    small: Callable[[Any, torch.device, torch.dtype], Any]
    kernel: Callable[[Any, torch.Tensor], torch.Tensor]
    fast: Callable[[Any, torch.Tensor], torch.Tensor | None]


def missing() -> str | None:
    """Why there are no kernels at all; None where liger-kernel is installed and not switched off."""
    if is_plain():
        return PLAIN_REASON
    return None if find_spec(PACKAGE) else f"liger-kernel is not installed ({INSTALL})"


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _problem(example: Any, device: torch.device, part: _Part) -> str | None:
    """Compare values and gradients of the kernel with those of a small module of an example's class."""
    name = type(example).__name__
    try:
        module = part.small(example, device, _dtype(example))
        weights = list(module.parameters())
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, _ROWS, _WIDTH, generator=generator).to(weights[0])
        expected = values_and_gradients(module.forward, [values], weights)
        expected += _far_values(module.forward, values)
    except Exception as error:  # an unknown module may raise anything
        return f"{name} is left as it is ({reason_of(error)})"
    try:
        found = values_and_gradients(partial(part.kernel, module), [values], weights)
        found += _far_values(partial(part.kernel, module), values)
    except Exception as error:  # a compiler and a driver may raise anything
        return f"liger-kernel does not run here ({reason_of(error)})"
    limit = TOLERANCE[values.dtype]
    if not all(agrees(ours, exact, limit) for ours, exact in zip(found, expected, strict=True)):
        return f"liger-kernel gives other values than {name}"
    return None


@torch.no_grad()
def _far_values(function: Callable[..., torch.Tensor], values: torch.Tensor) -> list[torch.Tensor]:
    """What a function gives for large values, where a limit shows, and for small ones, where an epsilon does."""
    return [function(values * scale) for scale in (100.0, 1e-3)]


def _is_norm(module: Any) -> bool:
    """Whether a module may be an RMSNorm: one weight, whole, and its epsilon."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False
    if getattr(weight, "ds_numel", weight.numel()) < 2:  # one number for all channels
        return False
    return hasattr(module, "variance_epsilon") and not is_partitioned(weight) and weight.dtype in TOLERANCE


def _small_norm(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same module with a small weight on the device."""
    made = bare_copy(module)
    made.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, _WIDTH).to(device, dtype))
    return made


def _norm_kernel(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Normalise (…, C) values."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the gradient that comes in may belong to others too.
    return LigerRMSNormFunction.apply(hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _norm_forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    whole = hidden_states.shape[-1] == len(module.weight)  # the kernel reads a weight for every channel
    return _norm_kernel(module, hidden_states) if whole and _trains(hidden_states, module.weight.dtype) else None


def _is_mlp(module: Any) -> bool:
    """Whether a module may be a gated MLP: three projections and what has no weights."""
    children = dict(module.named_children())
    if not set(_PROJECTIONS) <= set(children):
        return False
    others = [child for name, child in children.items() if name not in _PROJECTIONS]
    return not any(True for child in others for _ in child.parameters()) and _dtype(module) in TOLERANCE


def _small_mlp(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same module with small projections on the device; its weights are not touched, wherever they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"gate_proj": (_WIDTH, _INNER), "up_proj": (_WIDTH, _INNER), "down_proj": (_INNER, _WIDTH)}
        linears = {name: torch.nn.Linear(*size, bias=False).to(device, dtype) for name, size in sizes.items()}
    made = bare_copy(module)
    for name, child in (dict(module.named_children()) | linears).items():
        setattr(made, name, child)
    return made


def _mlp_kernel(module: Any, values: torch.Tensor) -> torch.Tensor:
    """Forward of (…, C) hidden states."""
    from liger_kernel.ops import LigerSiLUMulFunction

    return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(values), module.up_proj(values)))


def _mlp_forward(module: Any, values: torch.Tensor) -> torch.Tensor | None:
    return _mlp_kernel(module, values) if _trains(values, values.dtype) else None


def _trains(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return values.is_cuda and values.dtype == dtype and torch.is_grad_enabled()


_PARTS = {
    "norm": _Part(_is_norm, _small_norm, _norm_kernel, _norm_forward),
    "mlp": _Part(_is_mlp, _small_mlp, _mlp_kernel, _mlp_forward),
}


def fused_parts(model: torch.nn.Module, device: torch.device) -> Iterator[tuple[str, int, str | None]]:
    """Let RMSNorms compute in one kernel, and gated MLPs their activation and product.

    The projections of an MLP stay modules, whatever wraps them; norms whose weights are divided are left
    alone.

    Args:
        model: its modules may be anywhere.
        device: where it will run: every class of modules is compared with its own steps there first.

    Yields:
        For each kind of part that there is its name, how many were changed, and why others were not.
    """
    for name, part in _PARTS.items():
        modules = [module for module in model.modules() if holds(part.fits, module)]
        if modules:
            problem = missing()
            yield (name, 0, problem) if problem else (name, *_exchange(modules, device, part))


def _kind(module: Any) -> tuple[Any, ...]:
    """What modules that compute alike have in common: class, number format, plain settings, kinds of children."""
    children = tuple((name, type(child)) for name, child in module.named_children())
    return type(module), _dtype(module), repr(sorted(plain_settings(module).items())), children


def _exchange(modules: Sequence[Any], device: torch.device, part: _Part) -> tuple[int, str | None]:
    examples = {_kind(module): module for module in modules if not is_exchanged(module)}
    problems = {key: _problem(example, device, part) for key, example in examples.items()}
    count = exchange_forward(modules, lambda module: problems[_kind(module)] is None, part.fast)
    return count, next((problem for problem in problems.values() if problem), None)
