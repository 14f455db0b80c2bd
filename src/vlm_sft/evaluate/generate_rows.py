"""Batched greedy generation for questions that cannot share an image, through plain transformers.

The questions of a pack are a batch that is padded in front, so every answer goes on at the end of its row, and
transformers' own `generate` finds masks and positions. The vision features of an image are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.evaluate.generate import Generated
from vlm_sft.model import packed_forward
from vlm_sft.model.best_tokens import best_two
from vlm_sft.model.families import switched_off
from vlm_sft.model.padded_rows import padded_rows
from vlm_sft.model.protocols import AnyModel
from vlm_sft.model.sharing_check import TOLERANCE, all_questions, difference, each_alone, limited_windows, probe_groups


class _Ties(LogitsProcessor):  # type: ignore[misc]
    """Notes at every step which rows have two best tokens closer than `near_tie`."""

    def __init__(self, near_tie: float) -> None:
        self.near_tie = near_tie
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at scores (B, V) and leave them as they are."""
        _, best, second = best_two(scores)
        self.steps.append(second > best - self.near_tie)
        return scores


@torch.no_grad()
def generate_rows(
    model: AnyModel, batch: PackedBatch, *, max_new_tokens: int, stop_ids: Sequence[int], near_tie: float = 0.0
) -> Generated:
    """Answer every question of a pack greedily, each as a sequence of its own.

    Args:
        model: the model in evaluation mode, wrapped by PEFT or not.
        batch: a pack without answers, on the model's device.
        max_new_tokens, stop_ids, near_tie: as in `generate.generate`.
    """
    stops = list(stop_ids)
    ties = _Ties(near_tie)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    rows = _run(model, batch, config, LogitsProcessorList([ties] if near_tie else [])).tolist()
    answers: list[list[int]] = []
    cut: list[int] = []
    for number, row in enumerate(rows):
        length = next((place for place, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:length])
        if length == len(row):
            cut.append(number)
    noted = torch.stack(ties.steps, dim=1).tolist() if ties.steps else [[] for _ in rows]
    near = [number for number, row in enumerate(noted) if any(row[: len(answers[number]) + 1])]
    return Generated(answers, near, cut)


def _run(model: AnyModel, batch: PackedBatch, config: GenerationConfig, processors: Any, **wanted: Any) -> Any:
    """The tokens that a model generates behind the questions of a pack, (B, T) int64, or with `wanted` its output."""
    rows = padded_rows(batch, left=True)
    base: Any = packed_forward.unwrap(model)
    inputs = packed_forward.separate_inputs(model, batch, rows) | switched_off(base)
    with _plain_settings(base):
        output = base.generate(**inputs, generation_config=config, logits_processor=processors, **wanted)
    return output if wanted else output[:, rows.length :]


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Keep the base's own generation settings out: they may sample or punish repetition."""
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


@torch.no_grad()
def rows_agree(model: AnyModel, encoder: Encoder) -> bool:
    """Whether a model gives questions of a batch what it gives each alone, in the first two steps of their answers.

    Args:
        model: the model in evaluation mode.
        encoder: encodes questions for it.
    """
    groups = probe_groups(encoder, with_answers=False)
    everything = all_questions(groups)
    base = packed_forward.unwrap(model)
    config = GenerationConfig(do_sample=False, max_new_tokens=2, pad_token_id=0)

    def scores(bundles: list[Bundle]) -> torch.Tensor:
        batch = collate(bundles, groups).to(base.device)
        found = _run(model, batch, config, None, output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits, dim=1).double()

    try:
        with limited_windows(base, groups):
            together = scores(everything)
            alone = torch.cat([scores(one) for one in each_alone(everything)])
        same = (together[:, 0].argmax(-1) == alone[:, 0].argmax(-1))[:, None]
        # Where rounding chose another first token, only the first scores can be compared.
        compared = torch.cat([torch.ones_like(same), same], dim=1)
        error = difference(together[compared], alone[compared])
    except Exception:  # an unknown architecture may raise anything: then one question at a time
        return False
    return error <= TOLERANCE[base.get_input_embeddings().weight.dtype]
