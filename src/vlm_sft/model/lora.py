"""Linear layers with LoRA as one node of autograd, on CPUs. Imports peft and model.{products,stepwise}.

y = W x + b + s B A d(x), with d the adapter's dropout (Hu et al. 2021, arXiv:2106.09685). PEFT's module scales and adds
the adapter's output in steps of their own, each of which writes a matrix as large as the output, and their gradients do
so again. Here products accumulate into one another and the scale goes to the small matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear

from vlm_sft.model.products import is_frozen
from vlm_sft.model.stepwise import exchange_forward


class _LoraLinear(torch.autograd.Function):
    """y = W x + b + s B A d for rows x (T, I), rows d (T, I) that dropout made of them, and a frozen W (O, I)."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, dropped: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
        down: torch.Tensor, up: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """Compute (T, O); `down` is A (R, I), `up` is B (O, R), `dropped` None where it is the rows themselves."""
        ctx.scale, ctx.same = scale, dropped is None
        dropped = rows if dropped is None else dropped
        inner = dropped @ down.T
        output = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
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
            of_rows = slope @ weight
            if ctx.same:
                torch.addmm(of_rows, scaled, down, out=of_rows)
        if ctx.needs_input_grad[1]:
            of_dropped = scaled @ down
        return of_rows, of_dropped, None, None, of_down, of_up, None


def fuse_lora(model: torch.nn.Module) -> int:
    """Let the linear layers with LoRA of a model compute in one step where that is the same; returns how many."""
    return exchange_forward(model.modules(), lambda module: type(module) is Linear, _forward)


def _covered_adapter(module: Any, rows: torch.Tensor) -> str | None:
    """The name of the only active adapter where `_LoraLinear` computes it, else None."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or names[0] in module.lora_variant:
        return None
    base = module.base_layer
    linears = (base, module.lora_A[names[0]], module.lora_B[names[0]])
    if any(type(linear) is not torch.nn.Linear for linear in linears) or linears[1].bias is not None:
        return None
    adapter = (linears[1].weight, linears[2].weight)
    plain = all(one.dtype == rows.dtype and one.device.type == "cpu" and not hasattr(one, "ds_id") for one in adapter)
    return names[0] if plain and linears[2].bias is None and is_frozen([base.weight, base.bias], rows.dtype) else None


def _forward(module: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward of a linear layer with LoRA, (…, I) to (…, O)."""
    name = None if args or kwargs else _covered_adapter(module, rows)
    if name is None:
        return module.forward_stepwise(rows, *args, **kwargs)
    flat = rows.reshape(-1, rows.shape[-1])
    dropped = module.lora_dropout[name](rows)
    kept = None if dropped is rows else dropped.reshape(flat.shape)
    base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    output = _LoraLinear.apply(flat, kept, base.weight, base.bias, down, up, module.scaling[name])
    return output.reshape(*rows.shape[:-1], -1)
