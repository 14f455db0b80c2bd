"""Linear layers with LoRA as one node of autograd.

y = W x + b + s B A d(x), with d the adapter's dropout (Hu et al. 2021, arXiv:2106.09685). PEFT's module scales and adds
the adapter's output in steps of their own, each of which writes a matrix as large as the output, and their gradients do
so again; under autocast copies of the input in float32 come on top. Here products accumulate into one another and the
scale goes to the small matrices. In half precision, on GPUs, that is used in training; evaluation rounds as PEFT does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.cpu.matmul import TOLERANCE, is_frozen, multiply, stream_dtype
from vlm_sft.model.forward_patch import agrees, exchange_forward, probe_rows, values_and_gradients

_PROBE_SHAPE = (12, 20)  # of a small linear layer that is compared
_TOLERANCE = {torch.float64: TOLERANCE, torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + s B A d for rows x (T, I), rows d (T, I) that dropout made of them, and a frozen W (O, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute (T, O); `down` is A (R, I), `up` is B (O, R), `dropped` None where it is the rows themselves."""
        ctx.scale, ctx.same = scale, dropped is None
        dropped = rows if dropped is None else dropped
        inner = dropped @ down.T
        output = _product(rows, weight, bias)
        torch.addmm(output, inner, up.T, alpha=scale, out=output)
        ctx.save_for_backward(dropped, weight, down, up, inner)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of both kinds of rows, A and B."""
        dropped, weight, down, up, inner = ctx.saved_tensors
        slope = gradients[0]
        scaled = (slope @ up).mul_(ctx.scale)
        of_down, of_up = scaled.T @ dropped, (slope.T @ inner).mul_(ctx.scale)
        of_rows = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_rows = _product(slope, weight.T)
            if ctx.same:
                torch.addmm(of_rows, scaled, down, out=of_rows)
        if ctx.needs_input_grad[1]:
            of_dropped = scaled @ down
        return of_rows, of_dropped, None, None, of_down, of_up, None


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows · weightᵀ + bias of rows of any number; packs differ in it, so no kernel is kept by it."""
    return multiply(rows, weight, bias, few_shapes=False)


def fuse_lora(model: torch.nn.Module) -> int:
    """Let the linear layers with LoRA of a model compute in one step where that is the same; returns how many."""
    return exchange_forward(model.modules(), _is_lora_linear, _forward)


def _is_lora_linear(module: Any) -> bool:
    if type(module) is not Linear:
        return False
    weight: Any = module.base_layer.weight
    return not is_partitioned(weight) and _peft_agrees(stream_dtype(weight), weight.device)


@cache
def _peft_agrees(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a small layer of the installed PEFT has the values and gradients of the formula."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = torch.nn.Sequential(torch.nn.Linear(*_PROBE_SHAPE))
        get_peft_model(network, config)
        (module,) = network
        with torch.no_grad():
            module.lora_B["default"].weight.normal_(0.0, 0.2)
    module.to(device, dtype)
    weights = [module.lora_A["default"].weight, module.lora_B["default"].weight]
    rows = probe_rows(weights[0], _PROBE_SHAPE[0])
    found = values_and_gradients(lambda one: _one_step(module, "default", one), [rows], weights)
    expected = values_and_gradients(module.forward, [rows], weights)
    return all(agrees(ours, exact, _TOLERANCE[dtype]) for ours, exact in zip(found, expected, strict=True))


def _covered_adapter(module: Any, rows: torch.Tensor) -> str | None:
    """The name of the only active adapter where `_LoraLinear` computes it, else None."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or names[0] in module.lora_variant:
        return None
    base = module.base_layer
    linears = (base, module.lora_A[names[0]], module.lora_B[names[0]])
    if any(type(linear) is not torch.nn.Linear for linear in linears) or linears[1].bias is not None:
        return None
    fits = _fits_cpu if rows.device.type == "cpu" else _fits_gpu
    adapter = [linears[1].weight, linears[2].weight]
    return names[0] if linears[2].bias is None and fits(rows, base, adapter) else None


def _fits_cpu(rows: torch.Tensor, base: torch.nn.Linear, adapter: list[torch.Tensor]) -> bool:
    same = all(one.dtype == rows.dtype and one.device.type == "cpu" for one in adapter)
    return same and is_frozen([base.weight, base.bias], rows.dtype)


def _fits_gpu(rows: torch.Tensor, base: torch.nn.Linear, adapter: list[torch.Tensor]) -> bool:
    """Whether the layer is in training and computes in the number format of its input, under autocast or without."""
    frozen = [one for one in (base.weight, base.bias) if one is not None]
    if not torch.is_grad_enabled() or any(one.dtype != rows.dtype or one.requires_grad for one in frozen):
        return False
    narrowed = rows.is_cuda and torch.is_autocast_enabled("cuda") and rows.dtype == torch.get_autocast_dtype("cuda")
    here = all(one.device == rows.device for one in (*frozen, *adapter))
    return here and (narrowed or all(one.dtype == rows.dtype for one in adapter))


def _forward(module: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """Forward of a linear layer with LoRA, (…, I) to (…, O)."""
    name = _covered_adapter(module, rows)
    return None if name is None else _one_step(module, name, rows)


def _one_step(module: Any, name: str, rows: torch.Tensor) -> torch.Tensor:
    """What a layer with one active adapter computes, (…, I) to (…, O), in the number format of the rows."""
    flat = rows.reshape(-1, rows.shape[-1])
    dropped = module.lora_dropout[name](rows)
    kept = None if dropped is rows else dropped.reshape(flat.shape)
    base = module.base_layer
    down, up = (linear[name].weight.to(rows.dtype) for linear in (module.lora_A, module.lora_B))
    output = _LoraLinear.apply(flat, kept, base.weight, base.bias, down, up, module.scaling[name])
    return output.reshape(*rows.shape[:-1], -1)
