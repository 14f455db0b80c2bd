"""What the machine of one training can do: the time of its products, the rate of its matrix units, its memory."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEAK_SIZE, GPU_PEAK_SIZE, PEAK_REPEATS = 2048, 8192, 7


def now() -> float:
    """The performance counter, in seconds, when a GPU has done what it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _onednn_product() -> Any:
    """The operator of oneDNN for a product with a weight; None where this PyTorch has none."""
    import torch

    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product_flops() -> dict[Any, Callable[..., int]]:
    """FLOPs of products that torch does not count by itself: oneDNN's, by the shapes of rows and weight."""

    def flops(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * int(weight[0])

    operator = _onednn_product()
    return {} if operator is None else {operator: flops}


def matrix_peak(on_gpu: bool, bf16: bool) -> float:
    """FLOP/s of a product of two square matrices, the fastest of seven.

    Args:
        on_gpu: of 8192 on a GPU; else of 2048 on the CPU, by the faster library.
        bf16: in bfloat16 instead of float32.
    """
    import torch

    size = GPU_PEAK_SIZE if on_gpu else PEAK_SIZE
    left, right = torch.randn(2, size, size)
    if bf16:
        left, right = left.bfloat16(), right.bfloat16()
    if on_gpu:
        left, right = left.cuda(), right.cuda()
    products = [lambda: left @ right]
    operator = None if on_gpu or bf16 else _onednn_product()
    if operator is not None:
        products.append(lambda: operator(left, right, None, "none", [], ""))
    seconds = []
    for product in products:
        product()
        for _ in range(PEAK_REPEATS):
            began = now()
            product()
            seconds.append(now() - began)
    return 2 * size**3 / min(seconds)


def forget_peak_memory(on_gpu: bool) -> None:
    """Count a GPU's largest memory from now on; the largest resident set of a process cannot be forgotten."""
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(on_gpu: bool) -> int:
    """The largest resident set of this process; on a GPU the most that its tensors took there."""
    import torch

    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
