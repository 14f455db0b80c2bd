"""Batched greedy generation from shared prefixes.

A pack holds images with all their questions; it is computed once, and every question then continues from its own place
in the one key/value cache: a step feeds one token a question, each of which sees its image's prefix, its own question
and its own answer so far. Nothing is padded and no prefix is copied. A mask says so, or on CPUs a `DecodingStep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer

from vlm_sft.common.errors import ModelError
from vlm_sft.data.collate import PackedBatch
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import masks_for
from vlm_sft.model.best_tokens import best_two
from vlm_sft.model.decoding import DecodingStep, OwnTokens, computes_by_image
from vlm_sft.model.families import PackMode, Reach, cache_argument, switched_off
from vlm_sft.model.forward_patch import PLAIN
from vlm_sft.model.mixers import State
from vlm_sft.model.pack_context import within
from vlm_sft.model.protocols import AnyModel


@dataclass(frozen=True, slots=True)
class Generated:
    """The answers to one pack.

    Attributes:
        tokens: for each question of the pack, in order, its answer's tokens without the end token.
        near_ties: questions in whose answer the two best tokens were once closer than `near_tie`: rounding, which
            differs from pack to pack, may have chosen.
        cut: questions whose answer the limit ended, not an end token.
    """

    tokens: list[list[int]]
    near_ties: list[int]
    cut: list[int]


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer with spare room behind them: a step writes its own tokens and copies no others."""

    _room: tuple[torch.Tensor, torch.Tensor]  # each (B, K, room, D)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (B, K, new, D), and return all of them, (B, K, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = key_states[:, :, :0], value_states[:, :, :0]
        old, new = self.get_seq_length(), key_states.shape[2]
        if self._room[0].shape[2] < old + new:
            self._room = _enlarged(self._room[0], old, old + new), _enlarged(self._room[1], old, old + new)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, old : old + new] = states
        self.keys, self.values = (room[:, :, : old + new] for room in self._room)
        return self.keys, self.values


class SharedCache(Cache):
    """Keys and values of attention behind a shared prefix; layers with a state keep theirs beside it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of this cache has a state: none has, and the library would raise."""
        return False


def _enlarged(room: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    """A copy of the used part of a buffer, (B, K, room, D), with space for `needed` tokens and an eighth more."""
    larger = room.new_empty(*room.shape[:2], needed + needed // 8 + 64, room.shape[3])
    larger[:, :, :used] = room[:, :, :used]
    return larger


def alone(busy: bool) -> bool:
    """Whether to take another step, where no other rank has to keep up."""
    return busy


def require_countable_cache(config: Any) -> None:
    """Make sure that transformers can count the tokens in the cache of a model that answers separate sequences.

    Raises:
        ModelError: it cannot: every layer that mixes tokens has a state instead of keys and values.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    try:
        cache.get_seq_length()
    except ValueError as error:
        raise ModelError(
            f"a model of the family '{config.model_type}' without attention layers cannot answer separate sequences: "
            f"transformers counts no tokens in its cache ({error})",
            f"unset {PLAIN} if it is set, so that questions share their image; else the model needs an attention layer",
        ) from error


@torch.no_grad()
def generate(
    model: AnyModel,
    batch: PackedBatch,
    *,
    mode: PackMode,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    near_tie: float = 0.0,
    any_rank_busy: Callable[[bool], bool] = alone,
) -> Generated:
    """Answer every question of a pack greedily.

    Args:
        model: the model in evaluation mode, wrapped by PEFT or not.
        batch: a pack without answers, on the model's device.
        mode: how the pack is computed, from `sharing.choose_mode`; with "separate" the pack holds one question.
        max_new_tokens: limit of every answer, in tokens, the end token not counted.
        stop_ids: tokens that end an answer.
        near_tie: difference of the two best logits below which a question is reported as a near tie; 0 reports none.
        any_rank_busy: given whether this rank has a question left, tells whether any rank has. Where a forward pass
            needs all ranks (divided weights), a rank that is done keeps computing until all are.
    """
    device = batch.group.device
    config = packed_forward.unwrap(model).config.get_text_config(decoder=True)
    # A cache that knows of sliding windows forgets old tokens; behind a shared prefix the masks see to that.
    cache = SharedCache() if mode.shares else DynamicCache(config=config)
    cached = cache_argument(packed_forward.unwrap(model))
    if not mode.shares:
        packed_forward.forget_positions(model)
    kept: dict[torch.nn.Module, State] = {}
    with packed_forward.packed(batch, mode, 0, kept):
        output = packed_forward.forward(model, batch, mode, use_cache=True, **{cached: cache})
    questions = len(batch.sample_ids)
    answers: list[list[int]] = [[] for _ in range(questions)]
    near: set[int] = set()
    shared = _SharedSteps(model, batch, mode) if mode.shares else None
    quiet: dict[str, Any] = switched_off(packed_forward.unwrap(model))
    alive = fed = torch.arange(questions, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    for count in range(1, max_new_tokens + 1):
        tokens, best, second = best_two(output.logits[0])
        close = second > best - near_tie
        if len(alive):
            near.update(alive[close].tolist())
            going = ~torch.isin(tokens, stops)
            alive, tokens = alive[going], tokens[going]
            for question, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                answers[question].append(token)
        if count == max_new_tokens or not any_rank_busy(len(alive) > 0):
            break
        # A rank that is done feeds an end token behind its first question, to keep in step; nobody looks at it.
        fed, tokens = (alive, tokens) if len(alive) else (alive.new_zeros(1), stops[:1])
        if shared is None:  # alone, a question needs nothing: positions and mask follow from the cache
            output = model(input_ids=tokens[None], use_cache=True, **{cached: cache}, **quiet)
            continue
        decoding, places = shared.inputs(fed, count)
        with packed_forward.continued(fed, shared.last[fed] + count, kept, decoding):
            output = model(input_ids=tokens[None], use_cache=True, **{cached: cache}, **quiet, **places)
    return Generated(answers, sorted(near), alive.tolist())


class _SharedSteps:
    """Masks and positions of the tokens that are generated behind shared prefixes.

    Args:
        model: the model.
        batch: the pack whose questions are continued.
        mode: how it was computed.
    """

    def __init__(self, model: AnyModel, batch: PackedBatch, mode: PackMode) -> None:
        self.mode = mode
        self.base = packed_forward.unwrap(model)
        group, branch = batch.group[batch.predict], batch.branch[batch.predict]
        own = (batch.branch[None, :] == 0) | (batch.branch[None, :] == branch[:, None])
        self.rows = own & (batch.group[None, :] == group[:, None])  # (questions, L): its own prefix and itself
        self.positions = packed_forward.position_ids(model, batch)[..., batch.predict]
        self.keys = batch.index  # of every token in the cache
        self.last = self.keys[batch.predict]
        self.columns = batch.group.new_empty(0)  # questions that the generated tokens in the cache belong to
        self.own = OwnTokens(batch) if mode.kind == "blockwise" and computes_by_image(self.base) else None

    def inputs(self, fed: torch.Tensor, count: int) -> tuple[DecodingStep | None, dict[str, Any]]:
        """What attention follows, and masks and positions, for the `count`-th token of the questions `fed`.

        A mask is (1, 1, F, L + generated) bool.
        """
        now = self.last[fed] + count
        self.columns = torch.cat([self.columns, fed])
        self.keys = torch.cat([self.keys, now])
        step = self.own.step(fed) if self.own else None

        def mask(reach: Reach) -> torch.Tensor:
            if self.own and step and reach.is_plain(self.own.longest):
                return step.marker()
            visible = torch.cat([self.rows[fed], self.columns[None, :] == fed[:, None]], dim=1)
            return within(visible, reach, now, self.keys)[None, None]

        masks = masks_for(self.base, self.mode, mask)
        return step, {"attention_mask": masks, "position_ids": self.positions[..., fed] + count}
