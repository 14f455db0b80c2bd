"""What a device that no table holds does in a second: a few products, copies and small operations. Imports torch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from vlm_sft.forecast.hardware import Rates, find_device, table_rates
from vlm_sft.forecast.shapes import ModelShape
from vlm_sft.record import device_name

MEASURE_SECONDS = 0.4  # in all
TOKENS = 1024  # rows of the products that are measured
FRESH_MEMORY = 4.0  # times as long takes an operation on a CPU whose result lies in memory that was just asked for
MEASURED_SPREAD = 1.35


def rates_here(model: ModelShape, dtype: torch.dtype) -> Rates:
    """The rates of this machine's device: from the table, or measured at the sizes of a model.

    Args:
        model: its layer gives the sizes of the products.
        dtype: of the computation.
    """
    if torch.cuda.is_available():
        known = find_device(torch.cuda.get_device_name())
        if known is not None:
            return table_rates(known)
    return measured_rates(model, dtype)


@torch.no_grad()
def measured_rates(model: ModelShape, dtype: torch.dtype) -> Rates:
    """Measure matrix products at the sizes of a layer, a large simple operation, and a small one."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    text = model.text
    rows = torch.randn(TOKENS, text.hidden, dtype=dtype, device=device)
    weight = torch.randn(text.intermediate, text.hidden, dtype=dtype, device=device)
    large = torch.randn(TOKENS, max(text.intermediate, 1024), dtype=dtype, device=device)
    small = torch.randn(16, dtype=dtype, device=device)
    share = MEASURE_SECONDS / 4

    def multiply() -> object:
        return torch.nn.functional.linear(rows, weight)

    product = _seconds(multiply, share, device)
    result = torch.empty_like(large)
    copy = _seconds(lambda: torch.mul(large, 1.5, out=result), share, device)
    launch = _seconds(lambda: small + small, share, device)
    # Once more: threads that have just been started may share a core until the system moves one of them.
    product = min(product, _seconds(multiply, share, device))
    moved = 2 * large.numel() * large.element_size() / (1.0 if gpu else FRESH_MEMORY)
    return Rates(
        device_name(),
        2 * TOKENS * text.hidden * text.intermediate / product,
        moved / copy,
        launch,
        memory_bytes(),
        gpu,
        f"measured here on products of {TOKENS} x {text.hidden} x {text.intermediate}",
        MEASURED_SPREAD,
    )


def _seconds(work: Callable[[], object], budget: float, device: torch.device) -> float:
    """The median of repeated calls within a budget of seconds.

    Not the mean: while a program starts beside it, a few calls wait for a core as long as all the others take.
    """
    work()
    seconds: list[float] = []
    began = now = time.perf_counter()
    while now - began < budget:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        before, now = now, time.perf_counter()
        seconds.append(now - before)
    return statistics.median(seconds)


def memory_bytes() -> int:
    """Memory that this process may have, itself included: of the GPU, else of the machine or its container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as stream:
            return min(total, int(stream.read()))
    except (OSError, ValueError):
        return total
