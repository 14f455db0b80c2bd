"""Pictures with questions into tensors, one row a picture.

A row is `[prefix with the picture][question 1, answer 1][question 2, answer 2] …`. A question sees the prefix and
itself, and its positions continue the prefix, so every question is computed as if it stood alone. Shapes: B pictures
of a batch, L tokens of a row, N visual tokens of a picture, P = 4 N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from tools.pocket import build
from tools.pocket import tokenizer as tokens
from tools.pocket.canvas import Picture


def patches_of(pixels: np.ndarray) -> torch.Tensor:
    """Cut pictures of one size into normalised patches in the order of the Qwen2-VL processor.

    Args:
        pixels: (B, height, width, 3) uint8.

    Returns:
        (B, P, 3 * 2 * 8 * 8) float32; both time steps of a patch are the same picture.
    """
    count, height, width, _ = pixels.shape
    values = (torch.from_numpy(pixels).float() / 255 - build.IMAGE_MEAN) / build.IMAGE_STD
    side, merge = build.PATCH_PX, build.MERGE
    rows, columns = height // build.TOKEN_PX, width // build.TOKEN_PX
    cut = values.reshape(count, rows, merge, side, columns, merge, side, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    cut = cut.reshape(count, rows * columns * merge * merge, 3, 1, side * side).expand(-1, -1, -1, 2, -1)
    return cut.reshape(count, rows * columns * merge * merge, -1)


def slots_of(slots: np.ndarray) -> torch.Tensor:
    """Group slots by visual token: (B, 2, height / 8, width / 4) to (2, B, N, 8) int64; one token holds 2 x 4 slots."""
    count, _, height, width = slots.shape
    grouped = slots.reshape(count, 2, height // 2, 2, width // 4, 4).transpose(1, 0, 2, 4, 3, 5)
    return torch.from_numpy(grouped.reshape(2, count, (height // 2) * (width // 4), 8).astype(np.int64))


def prefix_ids(tokenizer: Qwen2Tokenizer, visual_tokens: int) -> list[int]:
    """Token ids up to the end of the picture: the part that all questions share."""
    return tokenizer(
        f"{tokens.TURN_START}user\n{tokens.VISION_START}{tokens.IMAGE_PAD * visual_tokens}{tokens.VISION_END}"
    ).input_ids


def branch_ids(tokenizer: Qwen2Tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of one question with its answer, and how many of the last ones are supervised."""
    asked = tokenizer(f"{question}{tokens.TURN_END}\n{tokens.TURN_START}assistant\n").input_ids
    answered = tokenizer(f"{answer}{tokens.TURN_END}").input_ids
    return asked + answered, len(answered)


def prefix_positions(leading: int, rows: int, columns: int) -> np.ndarray:
    """Three-row positions of a prefix: (3, leading + rows * columns + 1), as Qwen2.5-VL counts them."""
    text = np.tile(np.arange(leading), (3, 1))
    grid = np.stack([np.zeros((rows, columns)), *np.mgrid[:rows, :columns]]).reshape(3, -1) + leading
    end = np.full((3, 1), leading + max(rows, columns))
    return np.concatenate([text, grid, end], axis=1).astype(np.int64)


def _lay_out(
    branches: Sequence[tuple[list[int], int]], prefix: int, next_position: int, length: int
) -> dict[str, np.ndarray]:
    """One row: ids, positions, the branch of every token (-1 prefix, -2 padding) and the target after every token."""
    ids, targets = np.zeros(length, np.int64), np.full(length, -100, np.int64)
    owner, positions = np.full(length, -2, np.int64), np.zeros(length, np.int64)
    owner[:prefix] = -1
    start = prefix
    for number, (branch, supervised) in enumerate(branches):
        end = start + len(branch)
        ids[start:end], owner[start:end] = branch, number
        positions[start:end] = next_position + np.arange(len(branch))
        targets[end - supervised - 1 : end - 1] = branch[-supervised:]
        start = end
    return {"ids": ids, "targets": targets, "owner": owner, "positions": positions}


def _sought(pictures: Sequence[Picture], owner: np.ndarray, targets: np.ndarray, start: int) -> dict[str, torch.Tensor]:
    """From which tokens one has to look at which visual tokens, where pictures tell; `start` is the first of those."""
    seekers, places = [], []
    for row, picture in enumerate(pictures):
        if picture.sought is None:
            continue
        maps = picture.sought.reshape(*picture.sought.shape[:2], -1)
        for column in np.flatnonzero(targets[row] != -100):
            for look, place in enumerate(maps[:, owner[row, column]]):
                if place.any():
                    seekers.append((look, row, column))
                    places.append(place)
    if not seekers:
        return {}
    allowed = np.zeros((len(seekers), owner.shape[1]), bool)
    allowed[:, start : start + places[0].size] = places
    return {"seekers": torch.tensor(seekers), "places": torch.from_numpy(allowed)}


def build_batch(pictures: Sequence[Picture], tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Build the tensors of one step.

    Args:
        pictures: of one size and one task; either all or none have slots, either all or none have questions.

    Returns:
        patches (B, P, 384), grid (rows, columns), slots (2, B, N, 8) or None, facts (FACTS, B, N) or None, task,
        questions (their number), and, where there are questions, input_ids
        (B, L), position_ids (3, B, L), mask (B, 1, L, L) bool, picked (S, 2) row and column of every token that
        predicts a supervised one, and targets (S); and, where pictures tell what their questions are about, seekers
        (T, 3) number of the look, row and column of the tokens that have to look for it, and places (T, L) bool where
        it is.
    """
    pixels = np.stack([picture.pixels for picture in pictures])
    rows, columns = pixels.shape[1] // build.TOKEN_PX, pixels.shape[2] // build.TOKEN_PX
    known = [picture.slots for picture in pictures if picture.slots is not None]
    named = [picture.facts for picture in pictures if picture.facts is not None]
    facts = np.stack(named, axis=1) if named else np.empty(0)
    batch: dict[str, Any] = {
        "patches": patches_of(pixels),
        "grid": (rows, columns),
        "slots": slots_of(np.stack(known)) if known else None,
        "facts": torch.from_numpy(facts.reshape(*facts.shape[:2], -1).astype(np.int64)) if named else None,
        "task": pictures[0].task,
        "questions": sum(len(picture.questions) for picture in pictures),
    }
    if not pictures[0].questions:
        return batch
    prefix = prefix_ids(tokenizer, rows * columns)
    leading = len(prefix) - rows * columns - 1
    start = prefix_positions(leading, rows, columns)
    branches = [[branch_ids(tokenizer, *pair) for pair in picture.questions] for picture in pictures]
    length = len(prefix) + max(sum(len(branch) for branch, _ in row) for row in branches)
    laid = [_lay_out(row, len(prefix), int(start.max()) + 1, length) for row in branches]
    stacked = {name: np.stack([row[name] for row in laid]) for name in laid[0]}
    stacked["ids"][:, : len(prefix)] = prefix
    positions = np.tile(stacked["positions"], (3, 1, 1))
    positions[:, :, : len(prefix)] = start[:, None]
    owner = stacked["owner"]
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
    mask = same & np.tril(np.ones((length, length), bool))
    picked = np.argwhere(stacked["targets"] != -100)
    batch |= _sought(pictures, owner, stacked["targets"], leading)
    return batch | {
        "input_ids": torch.from_numpy(stacked["ids"]),
        "position_ids": torch.from_numpy(positions),
        "mask": torch.from_numpy(mask[:, None]),
        "picked": torch.from_numpy(picked),
        "targets": torch.from_numpy(stacked["targets"][picked[:, 0], picked[:, 1]]),
    }
