"""The evaluation loss: the mean over all supervised tokens, on all ranks; beside it that of each data set."""

from __future__ import annotations

import torch

from vlm_sft.data.collate import moved_to
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
) -> dict[str, float]:
    """Sums of token losses over all ranks divided by their numbers of supervised tokens, in nats; no weights count.

    Args:
        optimization: has the model.
        mode: how packs are computed.
        steps: this rank's share of the evaluation set; every rank has as many packs.
        health: asked between two steps whether the run is to stop.
        device: of the model.
        step: optimizer steps done.

    Returns:
        `eval_loss` over everything, and where there are several data sets `eval_loss_NAME` over each.

    Raises:
        EvaluationStopped: the ranks agreed to stop.
    """
    model = optimization.model
    model.eval()
    dataset = {sample.id: sample.dataset for sample, _, _ in steps.data.samples()}
    names = sorted(set(dataset.values()))
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for index in range(len(steps)):
        if health.stop_agreed():
            raise EvaluationStopped
        read = steps[0, index]
        health.settle(step, read.faults, 0)
        for pack in read.packs:
            batch = pack.to(device)
            with packed_forward.packed(batch, mode, 0), optimization.precision():
                losses = packed_forward.token_losses(model, batch, mode)
            sets = torch.tensor([names.index(dataset[sample_id]) for sample_id in pack.sample_ids])[
                pack.target_branch - 1
            ]
            counted = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], 1) * pack.weight
            if batch.weights is not None:  # what only keeps the ranks in step
                counted = counted * (batch.weights > 0)[:, None]
            sums.index_add_(0, moved_to(device, sets), counted)
    total = sum_ranks(sums).cpu()
    found = {"eval_loss": float(total[:, 0].sum() / total[:, 1].sum())}
    if len(names) > 1:
        found |= {f"eval_loss_{name}": float(row[0] / row[1]) for name, row in zip(names, total, strict=True) if row[1]}
    return found
