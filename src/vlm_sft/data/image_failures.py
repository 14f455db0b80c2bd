"""Images that fail while the training reads them: what is recorded, and what is read instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_sft.data.packing import Bundle, GroupLengths, bundle_tokens

UNREADABLE, WORKER_DIED, WORKER_HUNG = "unreadable_image", "worker_died", "worker_hung"
TRIES = 16  # images that are tried in place of one that cannot be read


@dataclass(frozen=True, slots=True)
class DataFault:
    """Something that went wrong while a step was read.

    Attributes:
        kind: `UNREADABLE`, `WORKER_DIED` or `WORKER_HUNG`.
        sample_ids: the questions that were to be read.
        reason: one sentence.
        replaced_by: the questions that are trained instead; () where nothing was replaced.
        fatal: True where the step cannot be computed, so that the training must end.
    """

    kind: str
    sample_ids: tuple[str, ...]
    reason: str
    replaced_by: tuple[str, ...] = ()
    fatal: bool = False


def substitutes(
    bundle: Bundle, lengths: Sequence[GroupLengths], datasets: Sequence[str], seed: int
) -> Iterator[Bundle]:
    """Bundles that may stand in for one whose image cannot be read, best first.

    They are of the same data set. The order is drawn from the seed and the image alone, so every rank, worker and
    resumed run tries the same ones; those that need no more tokens and have as many questions come first.

    Args:
        bundle: the one that cannot be read.
        lengths: token counts of every image.
        datasets: name of the data set of every image.
        seed: seed of the run.

    Yields:
        At most `TRIES` bundles.
    """
    order = np.random.default_rng([seed, bundle.group]).permutation(len(lengths)).tolist()
    same = [other for other in order if other != bundle.group and datasets[other] == datasets[bundle.group]]
    wanted = len(bundle.questions)
    found = [Bundle(other, tuple(range(min(wanted, len(lengths[other].questions))))) for other in same]
    room = bundle_tokens(bundle, lengths[bundle.group])
    found.sort(key=lambda one: (bundle_tokens(one, lengths[one.group]) > room, len(one.questions) < wanted))
    yield from found[:TRIES]
