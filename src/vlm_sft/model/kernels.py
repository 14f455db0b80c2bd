"""Which fused kernels a process uses, and why not the others. Imports model.dropout."""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.model.dropout import KeyedDropout, fused_problem

FUSED, STEPWISE = "fused", "stepwise"


def choose_kernels(model: Any, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Check the kernels of a model on the device where it is going to run.

    Args:
        model: with its adapter.
        device: of this process.

    Returns:
        For each part of the model "fused" or "stepwise" (PyTorch's own operators), and notes for the user on a GPU that
        cannot use a kernel.
    """
    kernels, notes = {}, []
    if any(isinstance(module, KeyedDropout) for module in model.modules()):
        problem = fused_problem(device)
        kernels["dropout"] = STEPWISE if problem else FUSED
        if problem and device.type == "cuda":
            notes.append(f"dropout: {problem}; using PyTorch's operators, which are slower")
    return kernels, notes
