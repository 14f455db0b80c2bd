"""The plan of an epoch: which questions make each global batch, and how they are packed. Pure; imports numpy only.

A plan is a function of (lengths, batch size, seed, epoch). The number of ranks and the token budget only decide how a
global batch is cut into packs, so 1, 2 and 8 devices follow the same optimisation.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np

from vlm_sft.errors import DataError


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """Token counts of one image and its questions.

    Attributes:
        prefix: tokens of the shared prefix.
        questions: tokens of each question: prompt after the prefix, answer and end token.
        supervised: supervised tokens of each question.
    """

    prefix: int
    questions: tuple[int, ...]
    supervised: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Some questions of one image that are computed together behind one prefix.

    Attributes:
        group: index of the image.
        questions: indices of the questions within the image, in the order in which they are packed.
    """

    group: int
    questions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        ranks: for each rank its packs; every rank has the same number of them; a pack may be empty.
        questions: questions in the step, over all ranks.
        supervised: supervised tokens in the step, over all ranks: what the loss is divided by.
    """

    ranks: tuple[tuple[tuple[Bundle, ...], ...], ...]
    questions: int
    supervised: int


def global_batches(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int, max_questions_per_image: int | None = None
) -> list[list[Bundle]]:
    """Draw the global batches of one epoch.

    The questions of an image are shuffled and cut into bundles of at most `max_questions_per_image`; the bundles are
    shuffled; batches are filled in that order, and a bundle that does not fit goes on in the next batch. Under a cap,
    a bundle whose image would exceed it waits for the next batch.

    Args:
        sizes: number of questions of each image.
        batch_size: questions of one global batch; the last one of an epoch may be smaller.
        seed, epoch: they alone decide the order.
        max_questions_per_image: cap on the questions of one image in one batch; None for no cap. It is raised where
            there are too few images to fill a batch, and exceeded where too few are left at the end of the epoch.

    Returns:
        Batches in the order of training; every question of every image exactly once.
    """
    cap = batch_size
    if max_questions_per_image is not None:
        images = max(1, sum(size > 0 for size in sizes))
        cap = min(cap, max(max_questions_per_image, -(-batch_size // images)))
    order = EpochOrder.draw(sizes, cap, seed, epoch)
    if cap == batch_size:
        return list(_Batches(order, batch_size))
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
    def draw(cls, sizes: Sequence[int], cap: int, seed: int, epoch: int) -> EpochOrder:
        """Shuffle the questions of each image, cut them into bundles of at most `cap`, and shuffle the bundles.

        Args:
            sizes: number of questions of each image.
            cap: questions of the largest bundle.
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
        order = random.permutation(len(begins))
        lengths = np.diff(np.append(begins, len(groups)))[order]
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


class _Batches(Sequence[list[Bundle]]):
    """Batches of consecutive questions, each made when it is asked for, so that any of them is there at once."""

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


def pack_batch(
    bundles: Sequence[Bundle],
    lengths: Sequence[GroupLengths],
    world_size: int,
    tokens_per_pack: int,
    max_questions_per_pack: int | None = None,
) -> tuple[tuple[tuple[Bundle, ...], ...], ...]:
    """Cut one global batch into packs of at most `tokens_per_pack` tokens, the same number of packs on every rank.

    Longest-processing-time first: each bundle goes to the pack that has the fewest tokens so far. A bundle that alone
    exceeds a limit is cut between questions; a single question that exceeds the budget gets a pack of its own.

    Args:
        bundles: the batch.
        lengths: token counts of every image.
        world_size: number of ranks.
        tokens_per_pack: token budget of one pack.
        max_questions_per_pack: cap on the questions of one pack; None for no cap.

    Returns:
        For each rank its packs; packs may be empty when there are fewer bundles than packs.
    """
    most = max_questions_per_pack or sum(len(bundle.questions) for bundle in bundles)
    pieces = [piece for bundle in bundles for piece in _cut(bundle, lengths[bundle.group], tokens_per_pack, most)]
    pieces = _at_least(pieces, world_size)
    costs = [bundle_tokens(piece, lengths[piece.group]) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda index: (-costs[index], index))
    questions = sum(len(piece.questions) for piece in pieces)
    rounds = max(1, -(-sum(costs) // (tokens_per_pack * world_size)), -(-questions // (most * world_size)))
    while True:
        packs: list[list[Bundle]] = [[] for _ in range(rounds * world_size)]
        loads, counts = [0] * len(packs), [0] * len(packs)
        for index in order:
            size = len(pieces[index].questions)
            target = min(range(len(packs)), key=lambda pack: (counts[pack] + size > most, loads[pack], pack))
            packs[target].append(pieces[index])
            loads[target] += costs[index]
            counts[target] += size
        within = all(load <= tokens_per_pack or len(pack) == 1 for load, pack in zip(loads, packs, strict=True))
        if (within and max(counts) <= most) or rounds * world_size >= len(pieces):
            return tuple(tuple(tuple(pack) for pack in packs[rank::world_size]) for rank in range(world_size))
        rounds += 1


def _one_bundle_a_pack(
    ranks: tuple[tuple[tuple[Bundle, ...], ...], ...],
) -> tuple[tuple[tuple[Bundle, ...], ...], ...]:
    """Take the packs of a plan apart; every rank still has the same number of them, some empty at the end."""
    bundles = [bundle for packs in ranks for pack in packs for bundle in pack]
    rounds = -(-len(bundles) // len(ranks))
    padded = [(bundle,) for bundle in bundles] + [()] * (rounds * len(ranks) - len(bundles))
    return tuple(tuple(padded[rank :: len(ranks)]) for rank in range(len(ranks)))


def _at_least(pieces: list[Bundle], count: int) -> list[Bundle]:
    """Halve the pieces with the most questions until there are `count`, so that no rank is without work."""
    pieces = list(pieces)
    while len(pieces) < count:
        largest = max(range(len(pieces)), key=lambda index: (len(pieces[index].questions), -index), default=None)
        if largest is None or len(pieces[largest].questions) == 1:
            break
        piece = pieces.pop(largest)
        half = len(piece.questions) // 2
        pieces += [Bundle(piece.group, piece.questions[:half]), Bundle(piece.group, piece.questions[half:])]
    return pieces


def _cut(bundle: Bundle, lengths: GroupLengths, tokens_per_pack: int, most: int) -> list[Bundle]:
    """Cut a bundle between its questions so that each part fits the limits where that is possible."""
    parts: list[list[int]] = [[]]
    load = lengths.prefix
    for question in bundle.questions:
        full = len(parts[-1]) == most or load + lengths.questions[question] > tokens_per_pack
        if parts[-1] and full:
            parts.append([])
            load = lengths.prefix
        parts[-1].append(question)
        load += lengths.questions[question]
    return [Bundle(bundle.group, tuple(part)) for part in parts]


def bundle_tokens(bundle: Bundle, lengths: GroupLengths) -> int:
    """Tokens that a bundle takes in a pack: its prefix once and its questions."""
    return lengths.prefix + sum(lengths.questions[question] for question in bundle.questions)


@dataclass(frozen=True)
class EpochPlanner:
    """Plans epochs over a fixed set of images and questions.

    Attributes:
        lengths: token counts of each image and its questions.
        global_batch_size: questions of one optimizer step.
        tokens_per_pack: token budget of one forward pass.
        world_size: number of ranks.
        seed: seed of the order.
        max_questions_per_image: cap on one image's questions in one global batch; None for no cap.
        max_questions_per_pack: cap on the questions of one forward pass; None for no cap.
        share_images: False gives every question its own prefix, as trainers without image sharing do.
        packing: False gives every bundle a forward pass of its own.
    """

    lengths: tuple[GroupLengths, ...]
    global_batch_size: int
    tokens_per_pack: int
    world_size: int
    seed: int
    max_questions_per_image: int | None = None
    max_questions_per_pack: int | None = None
    share_images: bool = True
    packing: bool = True

    def __post_init__(self) -> None:
        if not self.lengths:
            raise DataError("there is no question to train on", "look at left_out.jsonl for the reasons")

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.questions_per_epoch // self.global_batch_size)

    @cached_property
    def questions_per_epoch(self) -> int:
        """Questions of one epoch."""
        return sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        """Number of questions of each image."""
        return [len(group.questions) for group in self.lengths]

    def separate(self) -> EpochPlanner:
        """The same plan with one question in every pack, for models whose questions cannot share an image."""
        return replace(self, share_images=False, max_questions_per_pack=1)

    def questions_after(self, steps: int) -> int:
        """Questions that the first optimizer steps train on, repetitions in later epochs counted."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.questions_per_epoch + min(rest * self.global_batch_size, self.questions_per_epoch)

    def epoch(self, epoch: int) -> list[Step]:
        """Plan one epoch, for all ranks."""
        return [self.step_of(batch) for batch in self.batches(epoch)]

    def batches(self, epoch: int) -> Sequence[list[Bundle]]:
        """The global batches of one epoch; what `step_of` packs. A batch is made when it is asked for."""
        if self.max_questions_per_image is None:
            order = EpochOrder.draw(self._sizes, self.global_batch_size, self.seed, epoch)
            return _Batches(order, self.global_batch_size)
        return global_batches(self._sizes, self.global_batch_size, self.seed, epoch, self.max_questions_per_image)

    def step_of(self, bundles: list[Bundle]) -> Step:
        """Pack one global batch and count it."""
        if not self.share_images:
            bundles = [Bundle(bundle.group, (question,)) for bundle in bundles for question in bundle.questions]
        limits = (self.world_size, self.tokens_per_pack, self.max_questions_per_pack)
        packs = pack_batch(bundles, self.lengths, *limits)
        if not self.packing:
            packs = _one_bundle_a_pack(packs)
        return Step(
            packs,
            sum(len(bundle.questions) for bundle in bundles),
            sum(self.lengths[bundle.group].supervised[question] for bundle in bundles for question in bundle.questions),
        )
