"""Choices by cost and quality: which no other one beats, and the cheapest that is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Choice = TypeVar("Choice")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other one beats: none is at most as costly and at least as good, and better in one.

    Args:
        points: (cost, quality) of each choice; less cost and more quality are better.

    Returns:
        Indices by rising cost (and so by rising quality); of equal points the first one.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def cheapest_not_worse(by_cost: Iterable[Choice], best: Choice, worse: Callable[[Choice], bool]) -> Choice:
    """Find the cheapest choice that is not significantly worse than the best one.

    Args:
        by_cost: the choices by rising cost.
        best: the one of the highest quality.
        worse: whether a choice is significantly worse than that; called by rising cost, up to the answer.
    """
    return next((one for one in by_cost if one is best or not worse(one)), best)
