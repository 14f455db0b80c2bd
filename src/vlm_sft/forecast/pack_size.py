"""The size of packs and gradient checkpointing: the fastest way that fits.

Keeping activations takes memory, computing them again takes time; smaller packs need less memory and more passes. Both
leave the result as it is, so they are chosen together, from the forecast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlm_sft.common.formats import size
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.forecast.flops import EpochWork, epoch_work
from vlm_sft.forecast.memory import CONTEXT_BYTES, peak_items
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.time import tower_seconds, training_seconds

PACK_TOKENS = (8192, 4096, 2048)  # budgets that are tried on a GPU; the larger of two equally fast ones is taken
ROOM_SHARE = 0.9  # of a GPU's memory: a margin for the forecast's error and for fragmentation
FASTER = 0.98  # of the seconds: a smaller gain does not count


@dataclass(frozen=True, slots=True)
class Passes:
    """The size of the forward and backward passes of a run.

    Attributes:
        tokens_per_pack: token budget of one forward pass.
        gradient_checkpointing: activations are computed again in the backward pass.
        reason: one line for the user; "" where nothing was to be decided.
        peak_bytes, room_bytes: memory that the largest pack is forecast to take, and may take; None where it was not
            forecast.
    """

    tokens_per_pack: int
    gradient_checkpointing: bool
    reason: str = ""
    peak_bytes: int | None = None
    room_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What run.json says under "passes"."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Tried:
    """One way, with its forecast for one epoch on one rank."""

    tokens: int
    checkpointing: bool
    peak: float
    seconds: float

    @property
    def way(self) -> str:
        kept = "activations computed again (gradient checkpointing)" if self.checkpointing else "activations kept"
        return f"packs of {self.tokens:,} tokens, {kept}"


def choose_passes(
    setting: Setting, planner: EpochPlanner, visual: Sequence[int], tokens: Sequence[int], checkpointing: Sequence[bool]
) -> Passes:
    """Choose the fastest way whose memory fits on a GPU; where none fits, the one that needs least.

    Args:
        setting: the model on its device, whatever its `checkpointing`.
        planner: the plan of the epochs, whatever its `tokens_per_pack`.
        visual: visual tokens of every image.
        tokens: budgets of a pack that may be taken, the largest first.
        checkpointing: whether activations may be kept (False), computed again (True), or either.
    """
    room = ROOM_SHARE * (setting.rates.memory - CONTEXT_BYTES)
    tried: list[_Tried] = []
    for one in _ways(setting, planner, visual, tokens, checkpointing):
        tried.append(one)
        if one.peak <= room and one.checkpointing == min(checkpointing):
            break  # smaller packs are not faster, and recomputing is not needed
    fitting = [one for one in tried if one.peak <= room]
    chosen = fitting[0] if fitting else min(tried, key=lambda one: one.peak)
    for one in fitting[1:]:
        chosen = one if one.seconds < FASTER * chosen.seconds else chosen
    return Passes(chosen.tokens, chosen.checkpointing, _reason(chosen, tried, room), round(chosen.peak), round(room))


def _ways(
    setting: Setting, planner: EpochPlanner, visual: Sequence[int], tokens: Sequence[int], checkpointing: Sequence[bool]
) -> Iterator[_Tried]:
    """Every way with its forecast, usually the fastest first."""
    for budget in tokens:
        epoch = epoch_work(replace(planner, tokens_per_pack=budget), visual)
        for again in sorted(checkpointing):
            yield _tried(replace(setting, checkpointing=again), epoch, budget)


def _tried(setting: Setting, epoch: EpochWork, budget: int) -> _Tried:
    peak = sum(peak_items(setting, epoch.largest, budget, False, rounds=epoch.rounds).values())
    seconds = training_seconds(setting, epoch.slowest) + tower_seconds(setting, epoch.slowest, training=True)
    return _Tried(budget, setting.checkpointing, peak, seconds)


def _reason(chosen: _Tried, tried: Sequence[_Tried], room: float) -> str:
    """What was decided and why."""
    choice = f"{chosen.way}: {size(chosen.peak)} are forecast"
    if chosen.peak > room:
        return f"{choice}, more than the {size(room)} that may be used; all other ways need more"
    first = tried[0]
    if chosen is first:
        return f"{choice}, {size(room)} may be used"
    return f"{choice}, {size(room)} may be used; {first.way} would need {size(first.peak)}"
