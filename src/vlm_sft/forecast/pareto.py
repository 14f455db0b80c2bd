"""The front of what no other choice beats in both cost and quality."""

from __future__ import annotations

from collections.abc import Sequence


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
