"""Names beside the points of a figure, where they cover nothing.

Every name takes the nearest free place, one after another, those in the thickest crowd first; a name that had to move
away from its point has a line to it. The outcome depends on the figure alone: nothing is drawn by chance.

Not a library's, because theirs leave some covered or out. Of 25 figures like those of the tests (6 to 30 names; in one
all at the same point) adjustText 1.4 covered a name or a point in all, textalloc 1.2 covered a point in one and left 24
of 30 names out of another; here nothing is covered and no name is missing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vlm_sft.common.formats import shorten_name

# All lengths are typographic points, 72 an inch.
MARGIN = 1.5  # around a name: fonts of a page and of a file differ a little from the one that is measured
GAP = 1.5  # between a marker and the margin of its own name
LEADER_FROM = 5.0  # of a name's margin from its marker, where a line begins to be needed
GRID_X, GRID_Y = 6.0, 3.0  # between places that are tried
LOOK_CLOSELY = 150  # places, the nearest free ones, whose lines are looked at; of the others every fifth
CURVE_STEP = 5.0
CROWD = 45.0
LENGTHS = (22, 14, 9)  # of names, in letters; shorter where there is no room
# Costs in points of distance: of a line at all, of covering a step of a curve, and of lines that cross things.
LEADER_COST, CURVE_COST, CROSSED_POINT, CROSSED_LEADER, CROSSED_NAME = 10.0, 16.0, 60.0, 40.0, 400.0
ORDER_COST = 0.7  # between one side of a point and the next best

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Label:
    """A name and its point.

    Attributes:
        text: the name; long ones are cut in the middle.
        x, y: of the point, in the units of the axes.
        colour: of the name.
    """

    text: str
    x: float
    y: float
    colour: str


@dataclass
class _Room:
    """What is taken, in points from the lower left corner of the figure; boxes are [left, bottom, right, top]."""

    bounds: Array
    points: Array  # boxes of the markers
    curves: Array  # places on lines that are better not covered
    names: list[Array] = field(default_factory=list)
    leaders: list[Array] = field(default_factory=list)  # [from x, from y, to x, to y]


def name_points(
    axes: Axes,
    labels: Sequence[Label],
    *,
    leader_colour: str,
    others: Sequence[tuple[float, float]] = (),
    curves: Sequence[Sequence[tuple[float, float]]] = (),
    radius: float = 4.0,
    fontsize: float = 8.0,
) -> list[Label]:
    """Write names beside points so that no name covers another name, a point, or the legend.

    To be called last: it fixes the layout of the figure.

    Args:
        axes: with its limits, scales, title and legend.
        labels: points with their names; points may coincide.
        leader_colour: of the lines from points to names that had to move away.
        others: points without a name, in the units of the axes.
        curves: lines that are not covered where it can be helped, by their corners, in the units of the axes.
        radius: of the markers, in points.
        fontsize: of the names, in points.

    Returns:
        Labels for which there was no room, in any length; empty as long as they are not far too many.
    """
    anchors, room, measure = _measured(axes, labels, others, curves, radius, fontsize)
    order = _crowded_first(anchors)
    best: dict[int, tuple[str, Array]] = {}
    for length in LENGTHS:
        texts = [shorten_name(label.text, length) for label in labels]
        boxes = _arranged(room, order, anchors, [measure(text) for text in texts], radius)
        if len(boxes) > len(best):
            best = {index: (texts[index], box) for index, box in boxes.items()}
        if len(best) == len(labels):
            break
    for index, (text, box) in best.items():
        _write(axes, replace(labels[index], text=text), anchors[index], box, radius, fontsize, leader_colour)
    return [label for index, label in enumerate(labels) if index not in best]


def _measured(
    axes: Axes,
    labels: Sequence[Label],
    others: Sequence[tuple[float, float]],
    curves: Sequence[Sequence[tuple[float, float]]],
    radius: float,
    fontsize: float,
) -> tuple[Array, _Room, Callable[[str], Array]]:
    """Lay the figure out for good; returns the labels' points, what is taken, and what measures a name."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = 72 / figure.dpi
    renderer = FigureCanvasAgg(figure).get_renderer()

    def place(points: Sequence[tuple[float, float]]) -> Array:
        return np.asarray(axes.transData.transform(np.array(points, dtype=float).reshape(-1, 2)) * scale)

    def extents(artist: Artist) -> Array:
        return np.array(artist.get_window_extent(renderer).extents) * scale

    def measure(text: str) -> Array:
        drawn = axes.text(0, 0, text, fontsize=fontsize, parse_math=False)
        box = extents(drawn)
        drawn.remove()
        wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)  # the measured font lacks them
        return np.array([box[2] - box[0] + 0.5 * wide * fontsize, box[3] - box[1]]) + 2 * MARGIN

    anchors = place([(label.x, label.y) for label in labels])
    markers = np.concatenate([anchors, place(others)])
    shown = axes.get_legend()
    room = _Room(
        extents(axes),
        np.concatenate([markers - radius, markers + radius], axis=1),
        np.concatenate([np.empty((0, 2)), *(_steps(place(curve)) for curve in curves)]),
        [extents(shown)] if shown is not None else [],
    )
    return anchors, room, measure


def _steps(corners: Array) -> Array:
    """Places on a line, a few points apart."""
    pieces = [
        start + np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / CURVE_STEP)))[:, None] * (end - start)
        for start, end in zip(corners, corners[1:], strict=False)
    ]
    return np.concatenate([np.empty((0, 2)), *pieces])


def _crowded_first(anchors: Array) -> list[int]:
    """Labels by the number of others nearby, most first."""
    apart = np.hypot(*(anchors[:, None] - anchors[None]).transpose(2, 0, 1))
    return sorted(range(len(anchors)), key=lambda index: (-int((apart[index] < CROWD).sum()), index))


def _arranged(room: _Room, order: list[int], anchors: Array, sizes: list[Array], radius: float) -> dict[int, Array]:
    """Boxes by label; where some find no room, they are taken first in another attempt."""
    best: dict[int, Array] = {}
    for _ in range(3):
        attempt = replace(room, names=list(room.names), leaders=[])
        boxes: dict[int, Array] = {}
        for index in order:
            box = _best_box(attempt, anchors[index], sizes[index], radius)
            if box is not None:
                boxes[index] = box
                attempt.names.append(box)
                attempt.leaders.append(_leader(anchors[index], box[None])[0])
        best = boxes if len(boxes) > len(best) else best
        missing = [index for index in order if index not in boxes]
        if not missing:
            break
        order = missing + [index for index in order if index in boxes]
    return best


def _best_box(room: _Room, anchor: Array, size: Array, radius: float) -> Array | None:
    """The free box of the lowest cost for one label; None where there is none."""
    boxes, cost = _places(room.bounds, anchor, size, radius)
    taken = np.concatenate([room.points, *(name[None] for name in room.names)])
    free = ~_overlap(boxes, taken).any(axis=1)
    free &= (boxes[:, :2] >= room.bounds[:2]).all(axis=1) & (boxes[:, 2:] <= room.bounds[2:]).all(axis=1)
    boxes, cost = boxes[free], cost[free]
    if not len(boxes):
        return None
    by_cost = np.argsort(cost, kind="stable")
    nearest = np.concatenate([by_cost[:LOOK_CLOSELY], by_cost[LOOK_CLOSELY::5]])
    boxes, cost = boxes[nearest], cost[nearest]
    inside = (room.curves[None] > boxes[:, None, :2]).all(axis=2) & (room.curves[None] < boxes[:, None, 2:]).all(axis=2)
    lines = _leader(anchor, boxes)
    own = ((room.points[:, :2] < anchor) & (anchor < room.points[:, 2:])).all(axis=1)
    cost = cost + CURVE_COST * inside.sum(axis=1)
    cost = cost + CROSSED_NAME * _crossings(lines, room.names)
    cost = cost + CROSSED_POINT * _crossings(lines, list(room.points[~own]))
    for leader in room.leaders:
        cost = cost + CROSSED_NAME * _through(leader[None], boxes) + CROSSED_LEADER * _cross(lines, leader)
    return np.asarray(boxes[int(np.argmin(cost))])


def _places(bounds: Array, anchor: Array, size: Array, radius: float) -> tuple[Array, Array]:
    """Boxes that are tried for a label, and what their distance costs: around the point, then on a grid."""
    (x, y), (width, height) = anchor, size
    away, slant = radius + GAP, 0.7 * radius + GAP
    right, left, above, below = x + away, x - away - width, y + away, y - away - height
    corners = [
        (x + slant, y + slant),
        (x - slant - width, y + slant),
        (right, y - height / 2),
        (left, y - height / 2),
        (x - width / 2, above),
        (x - width / 2, below),
        (x + slant, y - slant - height),
        (x - slant - width, y - slant - height),
    ]
    grid = np.stack(
        np.meshgrid(np.arange(bounds[0], bounds[2] - width, GRID_X), np.arange(bounds[1], bounds[3] - height, GRID_Y)),
        axis=-1,
    ).reshape(-1, 2)
    low = np.concatenate([np.array(corners), grid])
    boxes = np.concatenate([low, low + size], axis=1)
    lines = _leader(anchor, boxes)
    apart = np.hypot(lines[:, 2] - lines[:, 0], lines[:, 3] - lines[:, 1])
    near = np.arange(len(corners)) * ORDER_COST
    cost = np.concatenate([near, apart[len(corners) :] + LEADER_COST])
    return boxes, cost


def _leader(anchor: Array, boxes: Array) -> Array:
    """The shortest line from a point to each box."""
    ends = np.clip(anchor[None], boxes[:, :2] + MARGIN, boxes[:, 2:] - MARGIN)
    return np.concatenate([np.broadcast_to(anchor, ends.shape), ends], axis=1)


def _overlap(boxes: Array, others: Array) -> Any:
    """Which box overlaps which other one."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (low < high).all(axis=2)


def _crossings(lines: Array, boxes: Sequence[Array]) -> Any:
    """Through how many boxes each line goes."""
    return sum((_through(lines, box[None]) for box in boxes), np.zeros(len(lines)))


def _through(lines: Array, boxes: Array) -> Any:
    """Whether a line goes through a box; either there is one line or one box."""
    share = np.linspace(0, 1, 24)[:, None, None]
    spots = lines[None, :, :2] + share * (lines[None, :, 2:] - lines[None, :, :2])
    return ((spots > boxes[None, :, :2]) & (spots < boxes[None, :, 2:])).all(axis=2).any(axis=0)


def _cross(lines: Array, other: Array) -> Any:
    """Which lines cross another one; lines of one and the same point do not."""

    def side(a: Array, b: Array, c: Array) -> Any:
        along, aside = b - a, c - a
        return np.sign(along[..., 0] * aside[..., 1] - along[..., 1] * aside[..., 0])

    start, end, first, last = lines[:, :2], lines[:, 2:], other[:2], other[2:]
    return (side(start, end, first) * side(start, end, last) < 0) & (
        side(first, last, start) * side(first, last, end) < 0
    )


def _write(
    axes: Axes, label: Label, anchor: Array, box: Array, radius: float, fontsize: float, leader_colour: str
) -> None:
    """Draw a name into its box, with a line to its point where it is not beside it."""
    inner = np.array([*(box[:2] + MARGIN), *(box[2:] - MARGIN)])
    width, height = inner[2:] - inner[:2]
    middle = (inner[1] + inner[3]) / 2
    # The end that faces the point stays where it is, however wide the letters of a page are.
    if inner[0] >= anchor[0]:
        side, x = "left", inner[0]
    elif inner[2] <= anchor[0]:
        side, x = "right", inner[2]
    else:
        side, x = "center", (inner[0] + inner[2]) / 2
    end = _leader(anchor, box[None])[0, 2:]
    line = None
    if np.hypot(*(end - anchor)) > radius + GAP + MARGIN + LEADER_FROM:
        line = {
            "arrowstyle": "-",
            "color": leader_colour,
            "linewidth": 0.7,
            "patchA": None,
            "shrinkA": 0,
            "shrinkB": radius,
            "relpos": ((end[0] - inner[0]) / width, (end[1] - inner[1]) / height),
        }
    axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(x - anchor[0], middle - anchor[1]),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=fontsize,
        color=label.colour,
        parse_math=False,
        arrowprops=line,
        annotation_clip=False,
    )
