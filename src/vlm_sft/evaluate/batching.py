"""Which questions are answered in one forward pass.

The plan depends on the questions, the token budget and whether the model shares images: not on the number of ranks, nor
on what an interrupted evaluation had answered already. So the same questions always share the same forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vlm_sft.data.packing import cut_questions, fill_rows
from vlm_sft.data.processor import visual_tokens
from vlm_sft.data.sample import ImageRef, Sample, group_by_image
from vlm_sft.data.token_estimate import CAREFUL

Pack = list[list[Sample]]  # images of one forward pass, each with the questions that are asked about it

_PIXELS_PER_TOKEN = 784  # 28 x 28: of processors that cannot say themselves


def plan_packs(
    samples: Sequence[Sample], image_tokens: Callable[[ImageRef], int], budget: int, separate: bool = False
) -> list[Pack]:
    """Sort the images by length and fill packs up to the token budget.

    Args:
        samples: the questions; the sizes of their images are known.
        image_tokens: estimates the tokens of an image.
        budget: tokens of one forward pass. An image with more questions than fit is cut between questions; a single
            question that exceeds it gets a pack of its own.
        separate: every question is a sequence of its own, padded to the longest of its pack.

    Returns:
        The packs, largest first, so that memory runs out at the start or never. Every question comes once.
    """
    groups = group_by_image(samples)
    prefixes = [CAREFUL.prefix + sum(image_tokens(image) for image in group[0].images) for group in groups]
    if separate:
        return _separate_packs(groups, prefixes, budget)
    pieces: list[tuple[int, int, list[Sample]]] = []
    for group, prefix in zip(groups, prefixes, strict=True):
        for start, stop, load in cut_questions(prefix, [question_tokens(sample) for sample in group], budget):
            pieces.append((-load, len(pieces), group[start:stop]))
    packs: list[Pack] = []
    room = 0
    for negative_load, _, members in sorted(pieces):
        if not packs or room + negative_load < 0:
            packs.append([])
            room = budget
        packs[-1].append(members)
        room += negative_load
    return packs


def _separate_packs(groups: Sequence[list[Sample]], prefixes: Sequence[int], budget: int) -> list[Pack]:
    """Packs of separate sequences of similar length, the longest first; images stay whole where they fit."""
    pieces: list[tuple[int, list[Sample]]] = []
    for group, prefix in zip(groups, prefixes, strict=True):
        members = sorted(group, key=lambda sample: -question_tokens(sample))
        sizes = [prefix + question_tokens(sample) for sample in members]
        for start, stop in fill_rows([(size, 1) for size in sizes], budget):
            pieces.append((sizes[start], members[start:stop]))
    pieces.sort(key=lambda piece: -piece[0])
    runs = fill_rows([(size, len(members)) for size, members in pieces], budget)
    return [[members for _, members in pieces[start:stop]] for start, stop in runs]


def question_tokens(sample: Sample) -> int:
    """About how many tokens a question takes behind its image."""
    return CAREFUL.question + CAREFUL.text(sample.question, *(turn.text for turn in sample.history))


def image_counter(processor: Any) -> Callable[[ImageRef], int]:
    """What estimates the tokens of an image: the processor's own count where it has one, else its area.

    It raises a SampleError for an image that the processor refuses.
    """

    def tokens(image: ImageRef) -> int:
        if image.width:
            source = f"{image.source} ({image.width} x {image.height} pixels)"
            count = visual_tokens(processor, image.width, image.height, source)
            if count is not None:
                return count
        return image.width * image.height // _PIXELS_PER_TOKEN

    return tokens


def share(packs: Sequence[Pack], done: Iterable[str], rank: int, world_size: int) -> list[Pack]:
    """The packs of one rank that still hold an unanswered question.

    Packs are dealt in turn, so every rank gets its part of the large ones; a pack that an interruption tore is
    answered again as a whole.

    Args:
        packs: the plan.
        done: ids of the answered questions.
        rank, world_size: of this process.
    """
    answered = set(done)
    left = [pack for pack in packs if any(sample.id not in answered for group in pack for sample in group)]
    return left[rank::world_size]


def rounds(packs: Sequence[Pack], done: Iterable[str], world_size: int) -> int:
    """How many packs the busiest rank has: rank 0."""
    return len(share(packs, done, 0, world_size))
