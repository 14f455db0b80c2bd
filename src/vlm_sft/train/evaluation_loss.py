"""The evaluation loss: the mean over all supervised tokens, on all ranks."""

from __future__ import annotations

import torch

from vlm_sft.data.loader import StepDataset
from vlm_sft.distributed.collectives import sum_ranks
from vlm_sft.evaluate.evaluator import EvaluationStopped
from vlm_sft.model import packed_forward
from vlm_sft.model.families import PackMode
from vlm_sft.train.health import Health
from vlm_sft.train.optimization import Optimization


@torch.no_grad()
def evaluation_loss(
    optimization: Optimization, mode: PackMode, steps: StepDataset, health: Health, device: torch.device, step: int
) -> float:
    """Sum of token losses over all ranks divided by the number of supervised tokens, in nats.

    Args:
        optimization: has the model.
        mode: how packs are computed.
        steps: this rank's share of the evaluation set; every rank has as many packs.
        health: asked between two steps whether the run is to stop.
        device: of the model.
        step: optimizer steps done.

    Raises:
        EvaluationStopped: the ranks agreed to stop.
    """
    model = optimization.model
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for index in range(len(steps)):
        if health.stop_agreed():
            raise EvaluationStopped
        read = steps[0, index]
        health.settle(step, read.faults, 0)
        for pack in read.packs:
            batch = pack.to(device)
            with packed_forward.packed(batch, mode, 0), optimization.precision():
                losses = packed_forward.token_losses(model, batch, mode)
            sums += pack.weight * torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
    total = sum_ranks(sums)
    return float(total[0] / total[1])
