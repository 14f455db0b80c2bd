"""Norms and gated MLPs by the kernels of liger-kernel, in training on GPUs, where it is installed.

transformers computes an RMSNorm in six elementwise kernels, partly in float32, and the activation of a gated MLP in two
that write matrices of the MLP's width; liger-kernel (Hsu et al. 2024, arXiv:2410.10989) has one for each, forward
and backward. What is computed without gradients keeps the rounding of the modules, as `vlm-sft eval` has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.forward_patch import exchange_forward, reason_of

PACKAGE = "liger_kernel"
INSTALL = "pip install 'vlm-sft[liger]'"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROWS, _WIDTH, _INNER = 5, 96, 160  # of a case that is compared
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def missing() -> str | None:
    """Why there are no kernels at all; None where liger-kernel is installed."""
    return None if find_spec(PACKAGE) else f"liger-kernel is not installed ({INSTALL})"


def use_norms(model: torch.nn.Module, device: torch.device) -> tuple[int, str | None]:
    """Let the RMSNorm modules of a model compute in one kernel.

    Args:
        model: its norms may be anywhere; those whose weights ZeRO-3 has shared out are left alone.
        device: where it will run: every class of norms is compared with its own steps there first.

    Returns:
        How many were changed, and why some were not.
    """
    return _use(model, device, _is_norm, _small_norm, _norm_forward)


def use_mlps(model: torch.nn.Module, device: torch.device) -> tuple[int, str | None]:
    """Let the gated MLPs of a model compute activation and product in one kernel; as `use_norms`.

    The projections stay modules, whatever wraps them.
    """
    return _use(model, device, _is_mlp, _small_mlp, _mlp_forward)


def _use(
    model: torch.nn.Module,
    device: torch.device,
    fits: Callable[[Any], bool],
    small: Callable[[Any, torch.device, torch.dtype], Any],
    forward: Callable[..., torch.Tensor],
) -> tuple[int, str | None]:
    modules = [module for module in model.modules() if fits(module) and not hasattr(module, "forward_stepwise")]
    problems = {}
    for kind, dtype in {(type(module), _dtype(module)) for module in modules}:
        example = next(module for module in modules if (type(module), _dtype(module)) == (kind, dtype))
        problems[kind, dtype] = _problem(lambda one=example, to=dtype: small(one, device, to), forward)  # type: ignore[misc]
    count = exchange_forward(modules, lambda module: problems[type(module), _dtype(module)] is None, forward)
    return count, next((problem for problem in problems.values() if problem), None)


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _problem(build: Callable[[], Any], forward: Callable[..., torch.Tensor]) -> str | None:
    """Compare values and gradients of a small module's own forward and of the kernel's."""
    try:
        module = build()
        weights = list(module.parameters())
        dtype = weights[0].dtype
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, _ROWS, _WIDTH, generator=generator).to(weights[0].device, dtype)
        results = []
        for function in (module.forward, lambda rows: forward(module, rows, checked=True)):
            rows = values.clone().requires_grad_()
            with torch.enable_grad():
                output = function(rows)
                slopes = torch.autograd.grad(output.float().cos().sum(), [rows, *weights])
            results.append([output.detach(), *slopes])
    except Exception as error:  # a compiler and a driver may raise anything
        return f"liger-kernel does not run here ({reason_of(error)})"
    for exact, ours in zip(*results, strict=True):
        limit = _TOLERANCE[dtype] * float(exact.float().abs().max())
        if not torch.allclose(ours.float(), exact.float(), rtol=0.0, atol=limit):
            return f"liger-kernel gives other values than {type(module).__name__}"
    return None


def _is_norm(module: Any) -> bool:
    """Whether a module may be an RMSNorm: one weight, whole, and its epsilon."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or len(list(module.parameters())) != 1:
        return False
    return hasattr(module, "variance_epsilon") and not is_partitioned(weight) and weight.dtype in _TOLERANCE


def _small_norm(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same module with a small weight on the device."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, _WIDTH).to(device, dtype))
    return _with(module, _parameters={"weight": weight})


def _norm_forward(module: Any, hidden_states: torch.Tensor, checked: bool = False) -> torch.Tensor:
    """Normalise (…, C) values."""
    if not checked and not _trains(hidden_states, module.weight.dtype):
        return module.forward_stepwise(hidden_states)
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the gradient that comes in may belong to others too.
    return LigerRMSNormFunction.apply(hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _is_mlp(module: Any) -> bool:
    """Whether a module may be a gated MLP: three projections and what has no weights."""
    children = dict(module.named_children())
    if not set(_PROJECTIONS) <= set(children):
        return False
    others = [child for name, child in children.items() if name not in _PROJECTIONS]
    return not any(True for child in others for _ in child.parameters()) and _dtype(module) in _TOLERANCE


def _small_mlp(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same module with small projections on the device; its weights are not touched, wherever they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"gate_proj": (_WIDTH, _INNER), "up_proj": (_WIDTH, _INNER), "down_proj": (_INNER, _WIDTH)}
        linears = {name: torch.nn.Linear(*size, bias=False).to(device, dtype) for name, size in sizes.items()}
    return _with(module, _modules=dict(module.named_children()) | linears)


def _mlp_forward(module: Any, *args: torch.Tensor, checked: bool = False, **kwargs: torch.Tensor) -> torch.Tensor:
    """Forward of (…, C) hidden states, which is the only argument."""
    (values,) = (*args, *kwargs.values())
    if not checked and not _trains(values, values.dtype):
        return module.forward_stepwise(values)
    from liger_kernel.ops import LigerSiLUMulFunction

    return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(values), module.up_proj(values)))


def _trains(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return values.is_cuda and values.dtype == dtype and torch.is_grad_enabled()


def _with(module: Any, **parts: Any) -> Any:
    """A module like another one, of which some attributes are other objects."""
    made = copy.copy(module)
    vars(made).update(parts)
    return made


def fused_parts(model: torch.nn.Module, device: torch.device) -> Iterable[tuple[str, int, str | None]]:
    """Change what can be changed in a model; for each kind of part its name, how many were, and why others were not."""
    for name, fits, use in (("norm", _is_norm, use_norms), ("mlp", _is_mlp, use_mlps)):
        if any(fits(module) for module in model.modules()):
            problem = missing()
            yield (name, 0, problem) if problem else (name, *use(model, device))
