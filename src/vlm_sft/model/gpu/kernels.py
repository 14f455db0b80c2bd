"""Which fused kernels a process uses, and why not the others."""

from __future__ import annotations

import torch

from vlm_sft.model.dropout import KeyedDropout, fused_problem
from vlm_sft.model.forward_patch import PLAIN, is_plain
from vlm_sft.model.gpu import liger
from vlm_sft.model.gpu.rotary import fused_rotary
from vlm_sft.model.recurrent import recurrence_problem

FUSED, STEPWISE = "fused", "stepwise"


def choose_kernels(model: torch.nn.Module, device: torch.device) -> tuple[dict[str, str], list[str]]:
    """Check the kernels of a model on the device where it is going to be trained, and use those that are right.

    Args:
        model: with its adapter.
        device: of this process.

    Returns:
        For each part of the model "fused" or "stepwise" (PyTorch's own operators), the switch `VLM_SFT_PLAIN` where it
        is set, and notes for the user on a GPU that cannot use a kernel.
    """
    kernels: dict[str, str] = {PLAIN: "1"} if is_plain() else {}
    problems: dict[str, str | None] = {}
    if any(isinstance(module, KeyedDropout) for module in model.modules()):
        problems["dropout"] = fused_problem(device)
        kernels["dropout"] = STEPWISE if problems["dropout"] else FUSED
    if device.type != "cuda":
        return kernels, []
    for name, count, problem in (*liger.fused_parts(model, device), *fused_rotary(model, device)):
        problems[name] = problem
        kernels[name] = FUSED if count else STEPWISE
    problem = recurrence_problem(model)
    if problem != "":
        problems["recurrence"] = problem
        kernels["recurrence"] = STEPWISE if problem else FUSED
    notes = [f"{name}: {why}; PyTorch's operators compute it, slower" for name, why in problems.items() if why]
    return kernels, notes
