"""The load-balancing loss of a mixture of experts (Fedus et al. 2022, "Switch Transformers", equations 4 to 6).

transformers adds it to the loss where the configuration says `output_router_logits`, over all tokens of a batch, so it
depends on what else is in the batch. Here it is that of every question alone, tokens of its prefix and its own: what
plain transformers computes with one question a batch. So packs, ranks and shared prefixes leave it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vlm_sft.data.collate import PackedBatch, moved_to
from vlm_sft.model.families import ROUTER_SWITCH
from vlm_sft.model.padded_rows import PaddedRows
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.vision_features import inner_model


@contextmanager
def recorded(base: VisionLanguageModel) -> Iterator[list[torch.Tensor]]:
    """Collect what the routers of a model say in the forward pass inside the block: one (tokens, experts) a layer."""
    found: list[torch.Tensor] = []

    def ask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {ROUTER_SWITCH: True}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found[:] = output.router_logits

    inner: Any = inner_model(base)
    hooks = [inner.register_forward_pre_hook(ask, with_kwargs=True), inner.register_forward_hook(keep)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def question_losses(
    router_logits: Sequence[torch.Tensor], batch: PackedBatch, chosen: int, rows: PaddedRows | None = None
) -> torch.Tensor:
    """The load-balancing loss of each question alone, in all layers together.

    Args:
        router_logits: of each layer with experts, (L, E): one row a token of the pack, or of the padded rows.
        batch: the pack.
        chosen: experts that compute a token.
        rows: the questions as separate sequences; None where they share their image.

    Returns:
        (questions,): E times the sum over experts of their share of tokens times their mean probability.
    """
    probabilities = torch.zeros_like(router_logits[0], dtype=torch.promote_types(router_logits[0].dtype, torch.float32))
    assigned = torch.zeros_like(probabilities)
    for logits in router_logits:
        odds = logits.to(probabilities).softmax(dim=-1)
        probabilities = probabilities + odds
        assigned.scatter_add_(1, odds.topk(chosen, dim=-1).indices, torch.ones_like(assigned[:, :chosen]))

    def by_question(values: torch.Tensor) -> torch.Tensor:
        if rows is None:
            return _by_question(values, batch)
        return (values.unflatten(0, rows.valid.shape) * rows.valid[..., None]).sum(dim=1)

    tokens = by_question(torch.ones_like(assigned[:, :1])) * len(router_logits)
    shares = by_question(assigned) / tokens, by_question(probabilities) / tokens
    return (shares[0] * shares[1]).sum(dim=-1) * assigned.shape[1]


def _by_question(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sum (L, E) values over the tokens of each question's sequence, its prefix included: (questions, E)."""
    images, questions = len(batch.ends), len(batch.sample_ids)
    part = torch.where(batch.branch == 0, batch.group, images - 1 + batch.branch)
    sums = values.new_zeros(images + questions, values.shape[1]).index_add(0, part, values)
    image = torch.tensor([number for number, ends in enumerate(batch.ends) for _ in ends[2:]])
    return sums[images:] + sums[moved_to(values.device, image)]
