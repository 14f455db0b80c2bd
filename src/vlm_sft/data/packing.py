"""The plan of an epoch: the questions of each global batch, and how they are packed. Pure functions.

A plan is a function of (lengths, batch size, seed, epoch). The number of ranks and the token budget only determine how
a global batch is split into packs, so 1, 2 and 8 devices follow the same optimization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from vlm_sft.common.errors import DataError
from vlm_sft.data.engine_options import Rows
from vlm_sft.data.epoch_order import Bundle, conversations, global_batches

# A question joins a padded batch when it has at least this share of the tokens of the longest one.
LEAST_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """Token counts of one image and its questions.

    Attributes:
        prefix: tokens of the shared prefix.
        questions: tokens of each question: prompt after the prefix, answer and end token.
        supervised: supervised tokens of each question.
        weights: weight of each question in the loss; empty if all are 1.
        follows: as of `EncodedGroup`.
    """

    prefix: int
    questions: tuple[int, ...]
    supervised: tuple[int, ...]
    weights: tuple[float, ...] = ()
    follows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        ranks: the packs of each rank; every rank has equally many, and a pack may be empty.
        questions: questions in the step, over all ranks.
        supervised: weighted number of supervised tokens in the step, over all ranks: the divisor of the loss.
    """

    ranks: tuple[tuple[tuple[Bundle, ...], ...], ...]
    questions: int
    supervised: float


def pack_batch(
    bundles: Sequence[Bundle],
    lengths: Sequence[GroupLengths],
    world_size: int,
    tokens_per_pack: int,
    max_questions_per_pack: int | None = None,
) -> tuple[tuple[tuple[Bundle, ...], ...], ...]:
    """Cut one global batch into packs of at most `tokens_per_pack` tokens, the same number of packs on every rank.

    Longest-processing-time first: each bundle goes to the pack with the fewest tokens so far; then bundles are
    exchanged as long as that makes the largest pack smaller. A bundle that exceeds a limit on its own is split between
    questions; a single question that exceeds the budget gets its own pack.

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
    pieces = [piece for bundle in bundles for piece in _pieces(bundle, lengths[bundle.group], tokens_per_pack, most)]
    pieces = _at_least(pieces, world_size)
    tokens = sum(bundle_tokens(piece, lengths[piece.group]) for piece in pieces)
    questions = sum(len(piece.questions) for piece in pieces)
    rounds = max(1, -(-tokens // (tokens_per_pack * world_size)), -(-questions // (most * world_size)))
    while True:
        packs = _distributed(pieces, lengths, rounds * world_size, most)
        sizes = [sum(bundle_tokens(piece, lengths[piece.group]) for piece in pack) for pack in packs]
        within = all(size <= tokens_per_pack or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
        most_asked = max(sum(len(piece.questions) for piece in pack) for pack in packs)
        if (within and most_asked <= most) or rounds * world_size >= len(pieces):
            return tuple(tuple(tuple(pack) for pack in packs[rank::world_size]) for rank in range(world_size))
        rounds += 1


def _distributed(
    pieces: Sequence[Bundle], lengths: Sequence[GroupLengths], count: int, most: int
) -> list[list[Bundle]]:
    """Distribute pieces over `count` packs, balanced by their tokens."""
    costs = [bundle_tokens(piece, lengths[piece.group]) for piece in pieces]
    packs: list[list[Bundle]] = [[] for _ in range(count)]
    loads, counts = [0] * count, [0] * count
    for index in sorted(range(len(pieces)), key=lambda index: (-costs[index], index)):
        size = len(pieces[index].questions)
        target = min(range(count), key=lambda pack: (counts[pack] + size > most, loads[pack], pack))
        packs[target].append(pieces[index])
        loads[target] += costs[index]
        counts[target] += size
    if max(counts) <= most:
        _level(packs, lengths, most)
    return packs


def _level(packs: list[list[Bundle]], lengths: Sequence[GroupLengths], most: int) -> None:
    """Exchange bundles of the largest pack for smaller ones of another pack, or none, while that balances the two.

    Args:
        packs: changed in place.
        lengths: token counts of every image.
        most: cap on the questions of one pack, which no exchange exceeds.
    """
    sizes = [[(bundle_tokens(piece, lengths[piece.group]), len(piece.questions)) for piece in pack] for pack in packs]
    for _ in range(4 * len(packs)):
        loads = [sum(tokens for tokens, _ in pack) for pack in sizes]
        counts = [sum(questions for _, questions in pack) for pack in sizes]
        full = loads.index(max(loads))
        best = (loads[full], -1, -1, -1)
        for other in range(len(packs)):
            gap = loads[full] - loads[other]
            for give, (tokens, questions) in enumerate(sizes[full]):
                for take, (back, fewer) in enumerate([*sizes[other], (0, 0)]):
                    moved, asked = tokens - back, questions - fewer
                    if 0 < moved < gap and counts[other] + asked <= most and counts[full] - asked <= most:
                        best = min(best, (max(loads[full] - moved, loads[other] + moved), other, give, take))
        _, other, give, take = best
        if other < 0:
            return
        for rows in (packs, sizes):
            given: Any = rows[full].pop(give)
            if take < len(rows[other]):
                rows[full].append(rows[other].pop(take))  # type: ignore[arg-type]
            rows[other].append(given)


def pack_rows(
    bundles: Sequence[Bundle],
    lengths: Sequence[GroupLengths],
    world_size: int,
    tokens_per_pack: int,
    max_questions_per_pack: int | None = None,
    rows: Rows = "padded",
) -> tuple[tuple[tuple[Bundle, ...], ...], ...]:
    """Cut one global batch into packs of separate sequences of similar length, the same number on every rank.

    A pack costs its number of questions times the tokens of the longest one, padding included. Questions about one
    image stay together if they fit, so that its vision features are computed once.

    Args:
        bundles, lengths, world_size, tokens_per_pack, max_questions_per_pack: as in `pack_batch`.
        rows: which questions may share a pack.

    Returns:
        For each rank its packs, the longest sequences first; packs may be empty.
    """
    most = 1 if rows == "single" else max_questions_per_pack
    share = 1.0 if rows == "equal" else LEAST_SHARE
    pieces: list[Bundle] = []
    for bundle in bundles:
        own = lengths[bundle.group]
        asked = sorted(bundle.questions, key=own.questions.__getitem__, reverse=True)
        sizes = [(own.prefix + own.questions[question], 1) for question in asked]
        runs = fill_rows(sizes, tokens_per_pack, most, share)
        pieces += [Bundle(bundle.group, tuple(asked[start:stop])) for start, stop in runs]
    pieces = _at_least(pieces, world_size)
    pieces.sort(key=lambda piece: -max(row_tokens(piece, lengths[piece.group])))
    sized = [(max(row_tokens(piece, lengths[piece.group])), len(piece.questions)) for piece in pieces]
    rounds = -(-len(fill_rows(sized, tokens_per_pack, most, share)) // world_size)
    low, high = 1, tokens_per_pack
    while low < high:  # the smallest largest pack in as many rounds
        middle = (low + high) // 2
        if len(fill_rows(sized, middle, most, share)) <= rounds * world_size:
            high = middle
        else:
            low = middle + 1
    packs = [tuple(pieces[start:stop]) for start, stop in fill_rows(sized, high, most, share)]
    packs += [()] * (rounds * world_size - len(packs))
    return tuple(tuple(packs[rank::world_size]) for rank in range(world_size))


def fill_rows(
    sized: Sequence[tuple[int, int]], budget: int, most: int | None = None, share: float = LEAST_SHARE
) -> list[tuple[int, int]]:
    """Fill padded batches in order.

    Args:
        sized: for each piece the tokens of its longest sequence, descending, and its number of sequences.
        budget: tokens of one batch, padding included; a piece that exceeds it is a batch of its own.
        most: cap on the sequences of a batch; None for no cap.
        share: the least share of a batch's longest sequence that a piece's longest must have.

    Returns:
        For each batch the index of its first piece, and of the first piece after it.
    """
    cuts = [0]
    count = 0
    for index, (size, sequences) in enumerate(sized):
        longest = sized[cuts[-1]][0]
        count += sequences
        full = count * longest > budget or (most is not None and count > most)
        if index > cuts[-1] and (full or size < share * longest):
            cuts.append(index)
            count = sequences
    return list(pairwise([*cuts, len(sized)])) if sized else []


def row_tokens(bundle: Bundle, lengths: GroupLengths) -> list[int]:
    """Tokens of each question of a bundle as a separate sequence, with its image."""
    return [lengths.prefix + lengths.questions[question] for question in bundle.questions]


def _one_bundle_a_pack(ranks: tuple[tuple[tuple[Bundle, ...], ...], ...]) -> tuple[tuple[tuple[Bundle, ...], ...], ...]:
    """Put every bundle into its own pack; every rank still has equally many, some empty at the end."""
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


def _pieces(bundle: Bundle, lengths: GroupLengths, tokens_per_pack: int, most: int) -> list[Bundle]:
    """Split a bundle between its conversations so that each part fits the limits, if possible."""
    talks = conversations(bundle.questions, lengths.follows)
    talks = [talk[start : start + most] for talk in talks for start in range(0, len(talk), most)]
    pieces: list[Bundle] = []
    for start, stop, _ in cut_questions(
        lengths.prefix, [lengths.questions[talk[-1]] for talk in talks], tokens_per_pack
    ):
        questions = [question for talk in talks[start:stop] for question in talk]
        if len(questions) <= most:
            pieces.append(Bundle(bundle.group, tuple(questions)))
        else:
            pieces += [Bundle(bundle.group, questions_) for questions_ in _at_most(talks[start:stop], most)]
    return pieces


def _at_most(talks: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Join conversations of at most `most` questions, in order, into parts of at most `most` questions."""
    parts: list[tuple[int, ...]] = []
    for talk in talks:
        if parts and len(parts[-1]) + len(talk) <= most:
            parts[-1] += talk
        else:
            parts.append(talk)
    return parts


def cut_questions(
    prefix: int, sizes: Sequence[int], tokens_per_pack: int, most: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Split the questions of an image into runs that fit into a pack after the image's prefix.

    Args:
        prefix: tokens of the prefix.
        sizes: tokens of each question; at least one.
        tokens_per_pack: token budget of one pack; a single question that exceeds it is a run of its own.
        most: cap on the questions of a run; None for no cap.

    Yields:
        Index of the first question of a run, index of the first one after it, and its tokens with the prefix.
    """
    start, load = 0, prefix
    for index, size in enumerate(sizes):
        if index > start and (index - start == most or load + size > tokens_per_pack):
            yield start, index, load
            start, load = index, prefix
        load += size
    yield start, len(sizes), load


def bundle_tokens(bundle: Bundle, lengths: GroupLengths) -> int:
    """Tokens that a bundle takes in a pack: its prefix once and its conversations, each as long as its last turn."""
    return lengths.prefix + sum(
        lengths.questions[talk[-1]] for talk in conversations(bundle.questions, lengths.follows)
    )


def supervised_tokens(bundle: Bundle, lengths: GroupLengths) -> float:
    """Supervised tokens of a bundle, each weighted by its question's weight in the loss."""
    weights = lengths.weights or (1,) * len(lengths.supervised)
    return sum(weights[question] * lengths.supervised[question] for question in bundle.questions)


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
        packing: False gives every bundle its own forward pass.
        rows: how questions that cannot share an image run; None if they share it.
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
    rows: Rows | None = None

    def __post_init__(self) -> None:
        if not self.lengths:
            raise DataError("there are no questions to train on", "see left_out.jsonl for the reasons")

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

    def computed_as(self, rows: Rows | None) -> EpochPlanner:
        """The same plan for questions that share their image (None), or with packs of separate sequences."""
        return replace(self, rows=rows)

    def questions_after(self, steps: int) -> int:
        """Questions trained in the first `steps` optimizer steps, repetitions in later epochs included."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.questions_per_epoch + min(rest * self.global_batch_size, self.questions_per_epoch)

    def epoch(self, epoch: int) -> list[Step]:
        """Plan one epoch, for all ranks."""
        return [self.step_of(batch) for batch in self.batches(epoch)]

    def batches(self, epoch: int) -> Sequence[list[Bundle]]:
        """The global batches of one epoch, which `step_of` packs."""
        return global_batches(self._sizes, self.global_batch_size, self.seed, epoch, self.max_questions_per_image)

    def step_of(self, bundles: list[Bundle]) -> Step:
        """Pack one global batch and count it."""
        if not self.share_images:
            bundles = [Bundle(bundle.group, (question,)) for bundle in bundles for question in bundle.questions]
        limits = (self.world_size, self.tokens_per_pack, self.max_questions_per_pack)
        if self.rows is not None:
            packs = pack_rows(bundles, self.lengths, *limits, self.rows if self.packing else "single")
        else:
            packs = pack_batch(bundles, self.lengths, *limits)
            if not self.packing:
                packs = _one_bundle_a_pack(packs)
        return Step(
            packs,
            sum(len(bundle.questions) for bundle in bundles),
            sum(supervised_tokens(bundle, self.lengths[bundle.group]) for bundle in bundles),
        )
