"""What the best of several models is worth: the winner's score without the luck of having been chosen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.statistics import FEWEST_CLUSTERS, LEVEL

DRAWS = 1000


class ChosenScore(NamedTuple):
    """The score to expect, on other questions, of a model that was chosen as the best.

    Attributes:
        value, low, high: the score with its 95 % interval.
    """

    value: float
    low: float
    high: float


def score_of_chosen(
    settings: Sequence[Sequence[np.ndarray]], clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = 0
) -> ChosenScore | None:
    """Estimate the score of the best setting on other questions, from the questions that chose it.

    The highest of several means is biased upward (the winner's curse): it was chosen for its luck, too. The whole
    choice is repeated on bootstrap samples of the questions, whole clusters at a time, and each winner is scored on the
    questions that its sample left out: bootstrap bias corrected cross-validation (Tsamardinos, Greasidou and
    Borboudakis 2018, Machine Learning 107). Choosing on fewer distinct questions makes it slightly too low rather than
    too high.

    Args:
        settings: for each setting the trainings of its seeds, each (S, N): scores 0 to 1 of N questions after each of
            the S evaluations among which the training chose what it kept (S = 1 where it kept the last).
        clusters: N labels; questions about one image go together.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        The mean over the draws, and its percentiles; None where the clusters are too few to leave any out.

    Raises:
        EvaluationError: the trainings answered different numbers of questions.
    """
    if any(run.shape[1] != len(clusters) for runs in settings for run in runs):
        raise EvaluationError("the trainings answered different numbers of questions", "answer the same questions")
    labels = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    if len(labels) < FEWEST_CLUSTERS:
        return None
    place = np.array([labels[label] for label in clusters])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=draws)[:, place].T  # (N, draws)
    left_out = (drawn == 0).astype(float)
    usable = left_out.sum(0) > 0
    drawn, left_out = drawn[:, usable].astype(float), left_out[:, usable]
    chosen_by, worth = [], []
    for runs in settings:
        pairs = [_kept(run, drawn, left_out) for run in runs]
        chosen_by.append(np.mean([pair[0] for pair in pairs], axis=0))
        worth.append(np.mean([pair[1] for pair in pairs], axis=0))
    winner = np.argmax(chosen_by, axis=0)
    found = np.stack(worth)[winner, np.arange(drawn.shape[1])]
    low, high = np.quantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    return ChosenScore(float(found.mean()), float(low), float(high))


def _kept(run: np.ndarray, drawn: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each draw: the score of what a training would have kept, on the draw and on the questions left out."""
    inside = run @ drawn / drawn.sum(0)
    outside = run @ left_out / left_out.sum(0)
    best = np.argmax(inside, axis=0)
    draws = np.arange(drawn.shape[1])
    return inside[best, draws], outside[best, draws]
