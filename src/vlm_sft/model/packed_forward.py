"""The forward pass of a pack: positions, attention layout, images in, logits of supervised positions out.

The result equals that of separate sequences: each question attends to its own image prefix and itself, its positions
restart right after the prefix, and the vocabulary projection runs only where a supervised token is predicted. A model
whose questions cannot share an image gets them as a padded batch and runs in plain transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlm_sft.data.collate import PackedBatch
from vlm_sft.model.attention import masks_for
from vlm_sft.model.cpu import cross_entropy
from vlm_sft.model.decoding import DecodingStep
from vlm_sft.model.families import PackMode, Reach, family_of, router_coefficient, switched_off
from vlm_sft.model.forward_patch import bare_copy
from vlm_sft.model.last_layer import is_trimmed
from vlm_sft.model.mixers import State
from vlm_sft.model.pack_context import PackContext, PackLayout, branch_mask, computing, current_pack
from vlm_sft.model.padded_rows import PaddedRows, padded_rows, scored, scoring_rows
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.repeated_images import row_images
from vlm_sft.model.router_loss import question_losses, recorded
from vlm_sft.model.state_batches import Recurrence
from vlm_sft.model.vision_features import head_of, image_inputs, inner_model, unwrap
from vlm_sft.recipe.schema import Recipe

_IMAGE_TYPE = 1  # token type of image tokens, in all processors that have token types


class Positions:
    """Computes the rotary positions of a pack's tokens: those of each question alone behind its image.

    A family of M-RoPE finds them with some sixty small operations per image, several of which wait for a GPU. They
    follow from the tokens and the sizes of the images alone, so data workers compute them on CPUs, beside the training:
    this has the model's settings and none of its weights, and may go to another process.

    Args:
        model: the model, wrapped or not.
    """

    def __init__(self, model: AnyModel) -> None:
        inner = inner_model(model)
        self._bare: Any = None
        if hasattr(inner, "get_rope_index"):
            self._bare = bare_copy(inner)
            self._axes = family_of(inner.config).position_axes

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Positions of a pack.

        Args:
            batch: the pack.

        Returns:
            (3, 1, L) int64 where the model has `get_rope_index` (M-RoPE of the Qwen-VL family; HunyuanOCR has four
            axes): the prefix gets its rows, and a question starts at the prefix's largest position + 1, the same on
            all rows. Else (1, L).
        """
        if self._bare is None:
            return batch.index[None]
        rows = batch.offset.repeat(self._axes, 1)
        starts = torch.zeros(len(batch.ends), dtype=torch.long, device=rows.device)
        accepted = inspect.signature(self._bare.get_rope_index).parameters
        for image, (start, end, *_) in enumerate(batch.ends):
            if not batch.tensors[image]:  # text alone counts up, on all rows alike
                starts[image] = end - start
                continue
            arguments = {name: value for name, value in batch.tensors[image].items() if name in accepted}
            if "mm_token_type_ids" in accepted:
                arguments["mm_token_type_ids"] = batch.prefix_types[None, start:end]
            ids = batch.input_ids[:, start:end]
            if "attention_mask" in accepted:  # Qwen3-Omni does not do without
                arguments["attention_mask"] = torch.ones_like(ids)
            prefix, _ = self._bare.get_rope_index(input_ids=ids, **arguments)
            rows[:, start:end] = prefix[-self._axes :, 0]
            starts[image] = prefix.max() + 1
        rows = torch.where(batch.branch[None] == 0, rows, rows + starts[batch.group][None])
        return rows[:, None]


def position_ids(model: AnyModel, batch: PackedBatch) -> torch.Tensor:
    """Positions of every token of a pack: those of the batch, or else computed here, see `Positions`."""
    return Positions(model)(batch) if batch.positions is None else batch.positions


def image_blocks(batch: PackedBatch, mode: PackMode) -> torch.Tensor | None:
    """Index of the image-token block of each token, -1 for other tokens, (L,) int64; None if the family has none."""
    if not mode.image_blocks:
        return None
    image = batch.prefix_types == _IMAGE_TYPE
    if mode.one_block:
        return torch.where(image, batch.group, -1)
    starts = image & ~F.pad(image, (1, 0))[:-1]
    return torch.where(image, starts.cumsum(0) - 1, -1)


def layout_of(batch: PackedBatch, mode: PackMode) -> PackLayout:
    """The attention layout of a pack: the ends of every image's prefix and questions."""
    return PackLayout(batch.tokens, batch.ends, image_blocks(batch, mode), batch.rows, mode.reaches)


def dense_mask(batch: PackedBatch, mode: PackMode, reach: Reach) -> torch.Tensor:
    """The same layout as one (1, 1, L, L) bool mask: the general path, for any attention implementation."""
    mask = branch_mask(batch.branch, batch.index, reach, image_blocks(batch, mode))
    return (mask & (batch.group[None, :] == batch.group[:, None]))[None, None]


@contextmanager
def packed(
    batch: PackedBatch, mode: PackMode, dropout_step: int, kept: dict[torch.nn.Module, State] | None = None
) -> Iterator[None]:
    """The context of the forward and backward pass of one pack; nothing else sets it.

    Args:
        batch: the pack, on the model's device.
        mode: how it is computed.
        dropout_step: number of the optimizer step, part of the dropout key.
        kept: receives the state after each question, of layers that have one, for generation.
    """
    if not mode.shares:
        rows = padded_rows(batch)
        keys = rows.take(batch.keys).flatten()
        context = PackContext(rows=rows.predict, keys=keys, step=dropout_step, padded=rows, ends=batch.ends)
    else:
        layout = layout_of(batch, mode) if mode.kind == "blockwise" else None
        recurrence = Recurrence(batch.ends, kept)
        context = PackContext(
            batch.tokens,
            layout,
            batch.predict,
            batch.keys,
            dropout_step,
            recurrence,
            index=batch.index,
            ends=batch.ends,
        )
    with computing(context):
        yield


@contextmanager
def continued(
    fed: torch.Tensor, index: torch.Tensor, kept: dict[torch.nn.Module, State], decoding: DecodingStep | None = None
) -> Iterator[None]:
    """The context of one generation step after a pack.

    Args:
        fed: (F,) int64, the questions that the step's tokens belong to.
        index: (F,) int64, index of each of these tokens in its question's own sequence.
        kept: the states of the questions; the step updates them.
        decoding: what attention follows; None where there are masks for all layers.
    """
    recurrence = Recurrence([], kept, fed)
    with computing(PackContext(len(fed), recurrence=recurrence, index=index, decoding=decoding)):
        yield


def forward(model: AnyModel, batch: PackedBatch, mode: PackMode, **extra: Any) -> Any:
    """Run the model on one pack; call it inside `packed(…)`.

    Args:
        model: the model, wrapped or not.
        batch: the pack, on the model's device.
        mode: how the pack is computed, from `sharing.choose_mode`.
        **extra: further arguments of the model, e.g. a key/value cache.

    Returns:
        The model's output; `logits` is (1, S, V), one row for each position of `batch.predict`.
    """
    extra = {"use_cache": False, **switched_off(unwrap(model)), **extra}
    if not mode.shares:
        rows = current_pack().padded or padded_rows(batch)
        with scoring_rows(head_of(model), rows.predict, rows.tokens.shape):
            output = model(**separate_inputs(model, batch, rows), **extra)
        output.logits = scored(output.logits, rows)
        return output
    # 0 keeps all rows: a trimmed model computes only these rows after its last layer.
    kept = 0 if is_trimmed(unwrap(model)) else batch.predict
    return _scored_at(model, kept, **shared_inputs(model, batch, mode), **extra)


def _scored_at(model: AnyModel, rows: torch.Tensor | int, **inputs: Any) -> Any:
    """Call a model so that its head computes only some rows (S,), or all for 0; not every class accepts them."""
    base = unwrap(model)
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(logits_to_keep=rows, **inputs)
    if isinstance(rows, int):
        return model(**inputs)
    with scoring_rows(head_of(base), rows, inputs["input_ids"].shape):
        return model(**inputs)


def shared_inputs(model: AnyModel, batch: PackedBatch, mode: PackMode) -> dict[str, Any]:
    """The arguments of a model, or of the inner model without its head, for a pack of shared images."""
    base = unwrap(model)
    types = {"mm_token_type_ids": batch.prefix_types[None]} if family_of(base.config).token_types else {}

    def mask(reach: Reach) -> torch.Tensor:
        layout = current_pack().layout
        return dense_mask(batch, mode, reach) if layout is None else layout.marker(reach, batch.group.device)

    return {
        "input_ids": batch.input_ids,
        "attention_mask": masks_for(base, mode, mask),
        "position_ids": position_ids(model, batch),
        **types,
        **expert_types(base.config, batch.input_ids),
        **image_inputs(model, batch),
    }


def expert_types(config: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that routes tokens to image experts, for families that have them.

    Args:
        config: of the model.
        ids: any shape, int64.
    """
    names = family_of(config).picture_tokens
    if not names:
        return {}
    seen = torch.stack([ids == getattr(config, name) for name in names]).any(0)
    return {"moe_mm_token_type_ids": seen.long()}


def separate_inputs(model: AnyModel, batch: PackedBatch, rows: PaddedRows | None = None) -> dict[str, Any]:
    """The arguments of plain transformers for the questions of a pack as separate sequences.

    Args:
        model: the model, wrapped or not.
        batch: the pack.
        rows: its questions as a batch, (B, T); None builds it. The model computes positions and masks.
    """
    rows = rows or padded_rows(batch)
    base = unwrap(model)
    types = batch.prefix_types.clone()
    if len(batch.targets):
        first = F.pad(batch.target_branch, (1, 0))[:-1] != batch.target_branch  # predicted by the last of a prompt
        types[batch.predict] = torch.where(first, types[batch.predict], family_of(base.config).answer_type)
    accepted = inspect.signature(base.forward).parameters
    named = {name: rows.take(types) for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
    ids, mask = rows.take(batch.input_ids[0]), rows.valid.long()
    named |= expert_types(base.config, ids)
    return {"input_ids": ids, "attention_mask": mask, **named, **row_images(model, batch, rows.images)}


def forget_positions(model: AnyModel) -> None:
    """Make a model with M-RoPE forget how far the images of an earlier call moved the positions behind them.

    transformers keeps that distance in the model, and would add it to the generated tokens of a text row.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Objective:
    """The training objective, a variant of the cross entropy; evaluations use the plain one.

    Attributes:
        smoothing: share of a token's target probability spread evenly over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567), as transformers' `label_smoothing_factor`.
        by_probability: whether a token's loss is weighted by the model's probability of the token, treated as
            constant in the gradient: dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629, equation 9).
    """

    smoothing: float = 0.0
    by_probability: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Objective:
        """The objective of a recipe."""
        return cls(recipe.label_smoothing_factor, recipe.loss_type == "dft")


PLAIN = Objective()


def token_losses(model: AnyModel, batch: PackedBatch, mode: PackMode, smoothing: float = 0.0) -> torch.Tensor:
    """Run the model on one pack, inside `packed(…)`, and return the loss of each supervised token.

    If the model is trimmed and its head is frozen and plain, the losses are computed without the logits matrix. No
    path holds a float32 copy of all logits (`model/cpu/cross_entropy.py`).

    Args:
        model: the model, wrapped or not.
        batch: the pack, with answers, on the model's device.
        mode: as in `forward`.
        smoothing: as of `Objective`.

    Returns:
        (S,), cross entropy of each supervised token in nats, computed in float32 or better.
    """
    base = unwrap(model)
    head = head_of(base)
    if mode.shares and is_trimmed(base) and cross_entropy.is_covered(head):
        hidden = inner_model(base)(use_cache=False, **shared_inputs(model, batch, mode))[0]
        return cross_entropy.token_losses(hidden[0], head, batch.targets, smoothing)
    return cross_entropy.score_losses(forward(model, batch, mode).logits.squeeze(0), batch.targets, smoothing)


def training_losses(model: AnyModel, batch: PackedBatch, mode: PackMode, objective: Objective = PLAIN) -> torch.Tensor:
    """The losses of an objective, plus each question's router loss if the model's configuration enables it.

    Every supervised token of a question carries the question's router loss. So a step of one question has the loss of
    plain transformers, and packs and ranks change nothing.

    Args:
        model, batch, mode: as for `token_losses`.
        objective: of the training.

    Returns:
        (S,).
    """
    base = unwrap(model)
    coefficient = router_coefficient(base)
    if not coefficient:
        return _objective_losses(model, batch, mode, objective)
    with recorded(base) as router_logits:
        losses = _objective_losses(model, batch, mode, objective)
    chosen = base.config.get_text_config().num_experts_per_tok
    balance = question_losses(router_logits, batch, chosen, current_pack().padded)
    return losses + coefficient * balance[batch.target_branch - 1].to(losses)


def _objective_losses(model: AnyModel, batch: PackedBatch, mode: PackMode, objective: Objective) -> torch.Tensor:
    """The token losses (S,) of an objective."""
    if objective == PLAIN:
        return token_losses(model, batch, mode)
    losses = token_losses(model, batch, mode, objective.smoothing)
    return losses * losses.detach().neg().exp() if objective.by_probability else losses
