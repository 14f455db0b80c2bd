"""A model whose frozen products are taken in bfloat16, and all else in float32, on CPUs.

Processors with AVX512-BF16 or AMX multiply bfloat16 two to eight times faster than float32, but add, normalise and
exponentiate it slower. So the weights of linear layers and the embedding stay in bfloat16, which halves them; a layer
rounds its input, multiplies, and gives float32 back. Norms, softmax, rotary positions, the residual stream and what is
trained are in float32: more exact than autocast on a GPU, from the same rounded weights. Inside a frozen gated MLP
values stay rounded from one product to the next (`cpu/fuse.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.best_tokens import best_two
from vlm_sft.model.cpu.matmul import multiply, narrows
from vlm_sft.model.forward_patch import exchange_forward

_LEAST_SIDE = 16  # of a weight: smaller products gain nothing, and families compute with such weights themselves


def narrow_products(model: Any) -> int:
    """Let a model that was loaded in bfloat16 compute in float32 between its products; returns how many do so.

    Args:
        model: as transformers made it; changed in place. Another format or device, or divided weights, leave it so.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.dtype != torch.bfloat16 or not narrows(weight.device) or is_partitioned(weight):
        return 0
    linears = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear and min(module.weight.shape) >= _LEAST_SIDE
    ]
    kept = {id(weight), *(id(module.weight) for module in linears)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.bfloat16 and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    exchange_forward([embedding], lambda _: True, _embed)
    head = model.get_output_embeddings()
    scoring = exchange_forward([one for one in linears if one is head], _is_narrow, _score)
    return scoring + exchange_forward(linears, _is_narrow, _multiply)


def _is_narrow(module: torch.nn.Linear) -> bool:
    return module.weight.dtype == torch.bfloat16


def _embed(module: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings of tokens in float32."""
    return module.forward_stepwise(tokens).float()


class _Product(torch.autograd.Function):
    """The product rows · weightᵀ + bias for float32 rows (R, I), a frozen weight (O, I) in bfloat16 and bias (O,)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute (R, O)."""
        ctx.save_for_backward(weight)
        return multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of the rows."""
        (weight,) = ctx.saved_tensors
        return multiply(gradients[0], weight.T), None, None


def _multiply(module: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """A linear layer of (…, I) rows in bfloat16, (…, O) in the number format of the rows; None once it is trained."""
    weight, bias = module.weight, module.bias
    if weight.dtype != torch.bfloat16:
        return None
    trained = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (weight, bias))
    if rows.dtype == torch.float32 and not trained:
        return _Product.apply(rows.reshape(-1, rows.shape[-1]), weight, bias).reshape(*rows.shape[:-1], -1)
    output = F.linear(rows.to(weight.dtype), weight).to(rows.dtype)
    return output if bias is None else output + bias.to(rows.dtype)


def _score(module: Any, rows: torch.Tensor) -> torch.Tensor | None:
    """Scores of (…, C) rows, (…, V); without gradients the best one of a row is the best before rounding, too."""
    scores = _multiply(module, rows)
    if scores is not None and scores.dtype == torch.float32 and module.bias is None and not torch.is_grad_enabled():
        _settle_ties(scores.flatten(0, -2), rows.flatten(0, -2), module.weight)
    return scores


def _settle_ties(scores: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> None:
    """Give the tokens that share the best rounded score of a row their scores in float32, in place.

    Rounding keeps the order of scores, so the best before it is among them.

    Args:
        scores: (R, V), products that were rounded to bfloat16, in float32.
        rows: (R, C), in float32.
        weight: (V, C), in bfloat16.
    """
    _, best, second = best_two(scores)
    for row in (second == best).nonzero()[:, 0].tolist():
        tied = (scores[row] == best[row]).nonzero()[:, 0]
        scores[row, tied] = weight[tied].float() @ rows[row].to(weight.dtype).float()
