"""The order of an epoch: which questions form each global batch. Pure.

It is a function of (numbers of questions, batch size, seed, epoch) alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import numpy as np

_LOOK_AHEAD = 64  # bundles of which one may go first where the next one does not fit into its batch


@dataclass(frozen=True, slots=True)
class Bundle:
    """Some questions of one image that are computed together behind one prefix.

    Attributes:
        group: index of the image.
        questions: indices of the questions within the image, in the order in which they are packed.
    """

    group: int
    questions: tuple[int, ...]


def conversations(questions: Sequence[int], follows: Sequence[int]) -> list[tuple[int, ...]]:
    """Put those questions together that are turns of one conversation, and so one sequence with several answers.

    Args:
        questions: of one image, or of one opening text.
        follows: as of `EncodedGroup`.

    Returns:
        Each question once; a question whose sequence the last one of its tuple begins with stands before that.
    """
    if not follows:
        return [(question,) for question in questions]

    def earlier(question: int) -> list[int]:
        found = []
        while follows[question] >= 0:
            question = follows[question]
            found.append(question)
        return found

    paths = {question: earlier(question) for question in questions}
    left = dict.fromkeys(questions)
    talks = []
    for question in sorted(questions, key=lambda one: -len(paths[one])):
        if question in left:
            talk = [question, *(one for one in paths[question] if one in left)]
            for one in talk:
                del left[one]
            talks.append(tuple(reversed(talk)))
    return talks


def global_batches(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int, max_questions_per_image: int | None = None
) -> Sequence[list[Bundle]]:
    """Draw the global batches of one epoch.

    The questions of an image are shuffled and cut into bundles of at most `max_questions_per_image`; the bundles are
    shuffled; batches are filled in that order. Where a bundle does not fit, the largest of the next ones that does
    goes first, so that few images have to be computed in two steps; where none does, the bundle is cut and goes on in
    the next batch. Under a cap, a bundle whose image would exceed it waits for the next batch.

    Args:
        sizes: number of questions of each image.
        batch_size: questions of one global batch; the last one of an epoch may be smaller.
        seed, epoch: they alone decide the order.
        max_questions_per_image: cap on the questions of one image in one batch; None for no cap. It is raised where
            there are too few images to fill a batch, and exceeded where too few are left at the end of the epoch.

    Returns:
        Batches in the order of training; every question of every image exactly once. Without a cap each is made when
        it is asked for.
    """
    cap = batch_size
    if max_questions_per_image is not None:
        images = max(1, sum(size > 0 for size in sizes))
        cap = min(cap, max(max_questions_per_image, -(-batch_size // images)))
    order = EpochOrder.draw(sizes, cap, batch_size, seed, epoch)
    if cap == batch_size:
        return Batches(order, batch_size)
    queue = deque(order.bundles(0, len(order.groups)))
    batches = []
    while queue:
        batches.append(_next_batch(queue, batch_size, cap))
    return batches


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The questions of an epoch in the order in which batches are filled.

    Attributes:
        groups: (questions,) index of each question's image.
        questions: (questions,) its index within the image.
        places: (questions,) number of its bundle in the order of the bundles.
    """

    groups: np.ndarray
    questions: np.ndarray
    places: np.ndarray

    @classmethod
    def draw(cls, sizes: Sequence[int], cap: int, batch_size: int, seed: int, epoch: int) -> EpochOrder:
        """Shuffle the questions of each image, cut them into bundles of at most `cap`, and order the bundles.

        Args:
            sizes: number of questions of each image.
            cap: questions of the largest bundle.
            batch_size: questions of a batch; few bundles will lie across the end of one.
            seed, epoch: they alone decide the order.
        """
        random = np.random.default_rng([seed, epoch])
        counts = np.asarray(sizes, dtype=np.int64)
        groups = np.repeat(np.arange(len(counts)), counts)
        firsts = np.cumsum(counts) - counts
        number = np.arange(len(groups)) - np.repeat(firsts, counts)
        # Sorted by image and then by a random key: a shuffle within each image, for all images at once.
        questions = number[np.argsort(groups + random.random(len(groups)), kind="stable")]
        begins = np.flatnonzero(number % cap == 0)
        lengths = np.diff(np.append(begins, len(groups)))
        order = random.permutation(len(begins))
        order = order[_fitted(lengths[order].tolist(), batch_size)]
        lengths = lengths[order]
        moved = begins[order] - (np.cumsum(lengths) - lengths)
        by_place = np.repeat(moved, lengths) + np.arange(len(groups))
        return cls(groups[by_place], questions[by_place], np.repeat(np.arange(len(order)), lengths))

    def bundles(self, start: int, stop: int) -> list[Bundle]:
        """The questions from `start` to before `stop`, those of one bundle together."""
        places = self.places[start:stop]
        cuts = np.flatnonzero(np.diff(places)) + start + 1
        ends = [*cuts.tolist(), start + len(places)]
        return [
            Bundle(int(self.groups[begin]), tuple(self.questions[begin:end].tolist()))
            for begin, end in zip([start, *ends], ends, strict=False)
        ]


def _fitted(sizes: Sequence[int], batch_size: int) -> list[int]:
    """Reorder bundles so that few lie across the end of a batch; the order is kept where they fit.

    Args:
        sizes: questions of each bundle, in the order in which they were drawn.
        batch_size: questions of a batch.

    Returns:
        Their indices, each once.
    """
    rest = iter(range(len(sizes)))
    near = deque(islice(rest, _LOOK_AHEAD))
    order: list[int] = []
    room = batch_size
    while near:
        place = 0
        if sizes[near[0]] > room:
            # The largest that fits, of equal ones the first; where none does the first one will be cut.
            fitting = [(sizes[index], -number) for number, index in enumerate(near) if sizes[index] <= room]
            place = -max(fitting)[1] if fitting else 0
        order.append(near[place])
        del near[place]
        near.extend(islice(rest, 1))
        room = (room - sizes[order[-1]] - 1) % batch_size + 1
    return order


class Batches(Sequence[list[Bundle]]):
    """Batches of consecutive questions, each made when it is asked for."""

    def __init__(self, order: EpochOrder, batch_size: int) -> None:
        self._order, self._size = order, batch_size

    def __len__(self) -> int:
        return -(-len(self._order.groups) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[Bundle]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Bundle]]: ...

    def __getitem__(self, index: int | slice) -> list[Bundle] | list[list[Bundle]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._order.bundles(number * self._size, (number + 1) * self._size)


def _next_batch(queue: deque[Bundle], batch_size: int, cap: int) -> list[Bundle]:
    """Take one batch from the front of the queue; bundles that have to wait are put back there, in their order."""
    batch: list[Bundle] = []
    waiting: list[Bundle] = []
    counts: Counter[int] = Counter()
    room = batch_size

    def take(bundle: Bundle, most: int) -> None:
        nonlocal room
        size = min(room, most)
        part, rest = bundle.questions[:size], bundle.questions[size:]
        if part:
            batch.append(Bundle(bundle.group, part))
        if rest:
            waiting.append(Bundle(bundle.group, rest))
        counts[bundle.group] += len(part)
        room -= len(part)

    while room and queue:
        bundle = queue.popleft()
        take(bundle, cap - counts[bundle.group])
    # Where room is left, all others are at the cap: a full batch is worth more than the cap.
    passed_over, waiting = deque(waiting), []
    while room and passed_over:
        take(passed_over.popleft(), batch_size)
    queue.extendleft(reversed([*waiting, *passed_over]))
    return batch
