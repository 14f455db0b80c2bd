"""Products of activations with frozen weights on CPUs, through oneDNN where that is possible.

PyTorch sends float32 products on a CPU to MKL. oneDNN, which comes with PyTorch too, writes its kernels for the
processor that it finds: they are faster, most of all where one side is as short as the supervised tokens of a pack. It
keeps every kernel, with its working memory, by the shape of the product, so callers cut their work into blocks of one
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F

from vlm_sft.distributed.zero import is_partitioned
from vlm_sft.model.forward_patch import agrees, is_plain

EXACT = (torch.float32, torch.float64)  # half precision rounds in between, where the libraries' modules say
TOLERANCE = 1e-5  # of a faster form in these formats
TOLERANCE_NARROW = 1e-2  # of a faster form whose products are taken in bfloat16
NARROW_BLOCK = 512  # rows of a product in bfloat16
_STEPS = ((8, 1), (64, 16), (NARROW_BLOCK, 64))  # up to so many rows, they are filled up to a multiple
_CHECKED_SIZE = 48


def narrows(device: torch.device | str) -> bool:
    """Whether a model in bfloat16 takes only its products in it there, and all else in float32 (`cpu/narrow.py`)."""
    return torch.device(device).type == "cpu" and not torch.cuda.is_available() and not is_plain()


def mixed_precision(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """The context of a forward pass whose base is in bfloat16 and whose trained weights may be in float32.

    Args:
        device: where it is computed, e.g. "cuda:0".
        dtype: of the base; in any other format, and where its modules see to it themselves, nothing is changed.
    """
    enabled = dtype == torch.bfloat16 and not narrows(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def stream_dtype(weight: torch.Tensor) -> torch.dtype:
    """The number format of hidden states between the layers of a model, from one of its frozen weights."""
    return torch.float32 if weight.dtype == torch.bfloat16 and narrows(weight.device) else weight.dtype


def is_frozen(parameters: Iterable[torch.Tensor | None], dtype: torch.dtype) -> bool:
    """Whether parameters stay as they are and can be computed with here: whole, on a CPU, in one exact number format.

    While no gradients are recorded, trained ones stay as they are, too. Beside values in float32 they may be in
    bfloat16: `multiply` rounds the values.

    Args:
        parameters: None for one that a module does not have.
        dtype: of the values that they are computed with.
    """
    formats = (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,)
    recorded = torch.is_grad_enabled()
    return (
        dtype in EXACT
        and not torch.is_autocast_enabled("cpu")
        and all(
            one.dtype in formats
            and one.device.type == "cpu"
            and not (recorded and one.requires_grad)
            and not is_partitioned(one)
            for one in parameters
            if one is not None
        )
    )


def multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, few_shapes: bool = True
) -> torch.Tensor:
    """The product rows · weightᵀ + bias, without gradients.

    Args:
        rows: (R, I).
        weight: (O, I), of any strides.
        bias: (O,) or None.
        few_shapes: False for a shape that will hardly come again: oneDNN would keep a kernel for it.

    Returns:
        (R, O), in the number format of the rows.
    """
    if weight.dtype == torch.bfloat16 and rows.dtype == torch.float32:
        product = _in_few_shapes(rows, weight)
        return product if bias is None else product.add_(bias)
    operator = _onednn() if few_shapes and rows.dtype == torch.float32 and rows.device.type == "cpu" else None
    if operator is not None:
        return operator(rows, weight, bias, "none", [], "")
    return torch.mm(rows, weight.T) if bias is None else torch.addmm(bias, rows, weight.T)


def _in_few_shapes(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product rows · weightᵀ of float32 rows (R, I) and a weight (O, I) in bfloat16, as float32 (R, O)."""
    output = rows.new_empty(len(rows), len(weight))
    for block, part in zip(narrow_blocks(rows), output.split(NARROW_BLOCK), strict=True):
        part.copy_(torch.mm(block, weight.T)[: len(part)])
    return output


def narrow_blocks(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows (R, I) in bfloat16 and in blocks, the last one filled up.

    For each shape that it meets oneDNN builds a kernel and keeps it with its memory, so there are few of them.
    """
    blocks = list(rows.to(torch.bfloat16).split(NARROW_BLOCK))
    count = len(blocks[-1])
    step = next(step for most, step in _STEPS if count <= most)
    if count % step:
        blocks[-1] = F.pad(blocks[-1], (0, 0, 0, -count % step))
    return blocks


@cache
def gating_operators() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] | None:
    """Operators of oneDNN for x · wᵀ + b in bfloat16 with an activation, and with a factor: rounded behind them only.

    None where this PyTorch has none, or ones that give other values.
    """
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, _CHECKED_SIZE, _CHECKED_SIZE, generator=generator).bfloat16()
    bias = weight[0]
    try:
        with_activation = torch.ops.mkldnn._linear_pointwise.default
        with_factor = torch.ops.mkldnn._linear_pointwise.binary
        found = [with_activation(rows, weight, bias, "swish", [], ""), with_factor(rows, rows, weight, bias, "mul")]
    except Exception:  # private operators, as in `_onednn`
        return None
    exact = F.linear(rows.float(), weight.float(), bias.float())
    expected = [F.silu(exact), exact * rows.float()]
    same = all(agrees(ours, one, TOLERANCE_NARROW) for ours, one in zip(found, expected, strict=True))
    return (with_activation, with_factor) if same else None


@cache
def _onednn() -> Callable[..., torch.Tensor] | None:
    """The operator x · wᵀ of oneDNN; None where this PyTorch has none, or one that gives other values."""
    if not torch.backends.mkldnn.is_available():
        return None
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(2, _CHECKED_SIZE, _CHECKED_SIZE, generator=generator)
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        found = [operator(rows, one, None, "none", [], "") for one in (weight, weight.T)]
    except Exception:  # a private operator of PyTorch: another version may lack it, or want other arguments
        return None
    expected = [rows @ weight.T, rows @ weight]
    same = all(agrees(ours, exact, TOLERANCE) for ours, exact in zip(found, expected, strict=True))
    return operator if same else None
