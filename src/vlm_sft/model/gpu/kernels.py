"""Which fused kernels a process uses, and why not the others."""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.model.dropout import KeyedDropout, fused_problem
from vlm_sft.model.gpu import liger

FUSED, STEPWISE = "fused", "stepwise"


def choose_kernels(model: Any, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Check the kernels of a model on the device where it is going to be trained, and use those that are right.

    Args:
        model: with its adapter.
        device: of this process.

    Returns:
        For each part of the model "fused" or "stepwise" (PyTorch's own operators), and notes for the user on a GPU that
        cannot use a kernel.
    """
    kernels: dict[str, str] = {}
    problems: dict[str, str | None] = {}
    if any(isinstance(module, KeyedDropout) for module in model.modules()):
        problems["dropout"] = fused_problem(device)
        kernels["dropout"] = STEPWISE if problems["dropout"] else FUSED
    if device.type != "cuda":
        return kernels, []
    for name, count, problem in liger.fused_parts(model, device):
        problems[name] = problem
        kernels[name] = FUSED if count else STEPWISE
    told = [(name, problem) for name, problem in problems.items() if problem]
    return kernels, [f"{name}: {problem}; PyTorch's operators compute it, slower" for name, problem in told]
