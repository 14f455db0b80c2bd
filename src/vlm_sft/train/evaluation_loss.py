"""The evaluation loss, on all ranks: of each data set, and of all of them in the proportions of the training."""

from __future__ import annotations

from collections.abc import Mapping

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
    optimization: Optimization,
    mode: PackMode,
    steps: StepDataset,
    shares: Mapping[str, float],
    health: Health,
    device: torch.device,
    step: int,
) -> dict[str, float]:
    """Mean losses per supervised token, in nats; the weights of single rows and answers do not count.

    The questions of an evaluation mix data sets otherwise than the training does: `--max_eval` and the sizes of the
    validation splits decide. So each set has its own mean, and `eval_loss` is the mean of these by `shares`: what the
    training's `loss` would be on unseen questions.

    Args:
        optimization: has the model.
        mode: how packs are computed.
        steps: this rank's share of the evaluation set; every rank has as many packs.
        shares: of the data sets in the training loss; those without evaluation questions do not count.
        health: asked between two steps whether the run is to stop.
        device: of the model.
        step: optimizer steps done.

    Returns:
        `eval_loss`, and where there are several data sets `eval_loss_NAME` of each.

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
    if len(names) == 1:
        return {"eval_loss": float(total[0, 0] / total[0, 1])}
    means = {name: float(row[0] / row[1]) for name, row in zip(names, total, strict=True) if row[1]}
    return {"eval_loss": mixed_loss(means, shares)} | {f"eval_loss_{name}": mean for name, mean in means.items()}


def mixed_loss(means: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """The mean of losses by the shares of their data sets; all alike where none of them has a share.

    Args:
        means: loss per supervised token, in nats, by data set.
        shares: of the training loss, 0 to 1, by data set.
    """
    counted = {name: shares.get(name, 0.0) for name in means}
    total = sum(counted.values())
    if not total:
        return sum(means.values()) / len(means)
    return sum(share / total * means[name] for name, share in counted.items())
