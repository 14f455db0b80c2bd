"""The gradients of one step, computed pack by pack and held aside until all ranks may use them.

Nothing that other ranks or the optimizer see is touched before the ranks have agreed that the numbers are good. So a
step can be dropped without a trace, and a pack that does not fit into memory can be cut in two on one rank alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from vlm_sft.data.cache.image_tensors import is_about_codes
from vlm_sft.data.collate import PackedBatch, split_pack
from vlm_sft.distributed.collectives import sum_ranks
from vlm_sft.model import packed_forward
from vlm_sft.model.families import PackMode

_BUCKET = 16 * 1024**2  # gradients that are exchanged at once


class StepGradients:
    """Loss and gradients of this rank's packs of one step.

    Args:
        model: the model without the wrappers of DDP or DeepSpeed.
        mode: how its packs are computed.
        step: optimizer steps done, for dropout.
        scale: what token losses are multiplied by.
        precision: makes the context of the forward pass.
        objective: what is made small.

    Attributes:
        parameters: the trained ones.
        sums: their gradients so far; None where a parameter had none.
        anywhere: whether any rank has a gradient of each, which the vote of the ranks tells.
        splits: packs that did not fit and were cut: sample ids and sizes in tokens.
        too_large: the pack that does not fit even so; the step cannot be computed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mode: PackMode,
        step: int,
        scale: float,
        precision: Callable[[], AbstractContextManager[Any]],
        objective: packed_forward.Objective = packed_forward.PLAIN,
    ) -> None:
        self.model = model
        self.objective = objective
        self.mode = mode
        self.step = step
        self.scale = scale
        self.precision = precision
        self.device = next(model.parameters()).device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.anywhere: Sequence[bool] = ()
        self.splits: list[dict[str, Any]] = []
        self.too_large: dict[str, Any] | None = None
        self.sample_ids: list[str] = []
        self._losses: list[torch.Tensor] = []
        self._tokens: list[tuple[PackedBatch, torch.Tensor]] = []

    def add(self, pack: PackedBatch, whole: bool = True) -> None:
        """Forward and backward of one pack; one that does not fit into the device's memory is cut in two, once.

        Args:
            pack: anywhere; only while it is computed it is on the device.
            whole: False for the half of a pack, which is not cut again.
        """
        if self.too_large is not None:
            return
        gradients = None
        try:
            here = pack.to(self.device)
            with packed_forward.packed(here, self.mode, self.step):
                with self.precision():
                    token_losses = packed_forward.training_losses(self.model, here, self.mode, self.objective)
                    loss = here.weighted_sum(token_losses) * self.scale
                gradients = (
                    torch.autograd.grad(loss, self.parameters, allow_unused=True)
                    if loss.requires_grad  # not where text rows alone meet a model of which only the tower is trained
                    else [None] * len(self.parameters)
                )
        except torch.OutOfMemoryError:
            pass  # its frames hold the activations; outside of this block they are gone
        if gradients is None:
            self._cut(pack, whole)
            return
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                before = self.sums[index]
                self.sums[index] = gradient if before is None else before.add_(gradient)
        self._losses.append(loss.detach().float())
        self._tokens.append((pack, token_losses.detach()))
        self.sample_ids += pack.sample_ids

    def _cut(self, pack: PackedBatch, whole: bool) -> None:
        """Compute the halves of a pack that does not fit; give up on the step where a half does not fit either."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = split_pack(pack) if whole else None
        if whole:
            tokens = pack.tokens if self.mode.shares else pack.padded_tokens
            self.splits.append({"sample_ids": pack.sample_ids, "tokens": tokens})
        if halves is None:
            self.too_large = self.splits[-1]
        for half in halves or ():
            self.add(half, whole=False)

    @property
    def loss(self) -> torch.Tensor:
        """() float32, this rank's share of the loss, scaled."""
        return torch.stack(self._losses).sum() if self._losses else torch.zeros(())

    def problem(self, loss: float) -> dict[str, Any] | None:
        """What is not finite: `detail` and `sample_ids`; None when all is.

        Args:
            loss: the value of `loss`, which the caller has fetched from the device.
        """
        found = [gradient for gradient in self.sums if gradient is not None]
        # One number for all of them: it is not finite when one of theirs is not.
        size = float(torch.stack([torch.linalg.vector_norm(one.float()) for one in found]).sum()) if found else 0.0
        if math.isfinite(loss) and math.isfinite(size):
            return None
        found_in_loss = loss_problem(self._tokens, loss)
        return found_in_loss or {
            "detail": "the gradient is not finite",
            "sample_ids": self.sample_ids,
            "source": "gradient",
            "loss": loss,
        }

    def named(self) -> dict[str, torch.Tensor | None]:
        """The gradients by the name of their parameter."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return dict(zip(names, self.sums, strict=True))

    def average(self, world_size: int) -> None:
        """Replace the gradients by their mean over the ranks, once they have voted; every rank must call it.

        One that no rank has stays None, as on one process: an optimizer would move its weights by their momentum.
        """
        for index, parameter in enumerate(self.parameters):
            if self.anywhere[index] and self.sums[index] is None:
                self.sums[index] = torch.zeros_like(parameter)
        sums = [gradient for gradient in self.sums if gradient is not None]
        for bucket in _buckets(sums):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(world_size)
            for gradient, mean in zip(bucket, sum_ranks(flat).split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def assign(self) -> None:
        """Put the gradients where an optimizer looks for them."""
        for parameter, gradient in zip(self.parameters, self.sums, strict=True):
            parameter.grad = gradient

    def surrogate(self) -> torch.Tensor:
        """() float32 zero whose gradients are exactly these, for an engine that wants to run backward itself.

        A sum of products would keep a float32 copy of every gradient: with all weights trained, twice the model.
        """
        terms = [
            _Known.apply(parameter, gradient) for parameter, gradient in zip(self.parameters, self.sums, strict=True)
        ]
        return torch.stack(terms).sum()


class _Known(torch.autograd.Function):
    """A number whose gradient in a parameter is known; None for zero."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
        """() float32."""
        ctx.save_for_backward(parameter if gradient is None else gradient)
        ctx.zero, ctx.dtype = gradient is None, parameter.dtype
        return parameter.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, times that of the number."""
        (known,) = ctx.saved_tensors
        if ctx.zero:
            return torch.zeros_like(known), None
        return (known * slopes[0].to(known.dtype)).to(ctx.dtype), None


def loss_problem(tokens: Sequence[tuple[PackedBatch, torch.Tensor]], loss: float) -> dict[str, Any] | None:
    """The event of a loss that is not finite, naming the questions that made it so; None for a finite loss.

    Args:
        tokens: the packs of a step, each with its token losses, (S,).
        loss: their sum, scaled.
    """
    if math.isfinite(loss):
        return None
    images = _bad_images([pack for pack, _ in tokens])
    if images:
        detail = "an image tensor or a cached vision feature is not finite"
        return {"detail": detail, "sample_ids": images, "source": "image", "loss": loss}
    found = []
    for pack, losses in tokens:
        branches = pack.target_branch[~losses.isfinite().to(pack.target_branch.device)].unique().tolist()
        found += [pack.sample_ids[branch - 1] for branch in branches]
    return {"detail": f"the loss is {loss}", "sample_ids": found, "source": "loss", "loss": loss}


def _bad_images(packs: Sequence[PackedBatch]) -> list[str]:
    """Ids of the questions about images whose own tensors are not finite."""
    found = []
    for pack in packs:
        first = 0
        for ends, tensors in zip(pack.ends, pack.tensors, strict=True):
            count = len(ends) - 2
            values = [value for name, value in tensors.items() if not is_about_codes(name)]
            if not all(value.isfinite().all() for value in values if value.is_floating_point()):
                found += pack.sample_ids[first : first + count]
            first += count
    return found


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors in a row, cut into parts of one dtype and at most `_BUCKET` numbers (or one tensor)."""
    parts: list[list[torch.Tensor]] = []
    size = 0
    for tensor in tensors:
        if not parts or parts[-1][0].dtype != tensor.dtype or size + tensor.numel() > _BUCKET:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.numel()
    return parts
