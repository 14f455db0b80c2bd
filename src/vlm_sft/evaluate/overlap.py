"""Whether the questions of a final table are as new as it takes: what chose the checkpoint, what was trained on.

Imports data's samples and splits; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.splits import own_images, shared_images


def overlaps(
    final: Mapping[str, Sequence[Sample]], chosen: Sequence[Sample], trained: Sequence[Sample]
) -> dict[str, dict[str, int]]:
    """Count the questions about images that a run has used before, by the hash of their bytes.

    Images that stand beside many others (`shared_images`) are meant to be everywhere and do not count.

    Args:
        final: the questions of each benchmark of the final table.
        chosen: those whose answers or loss chose the checkpoint; none where nothing was chosen.
        trained: those of the training.

    Returns:
        For each benchmark `also_chose` and `also_trained`: how many of its questions are about such images.
    """
    shared = shared_images([*chain.from_iterable(final.values()), *chosen, *trained])
    before = {
        "also_chose": {key for sample in chosen for key in own_images(sample, shared)},
        "also_trained": {key for sample in trained for key in own_images(sample, shared)},
    }
    return {
        name: {
            what: sum(not keys.isdisjoint(own_images(sample, shared)) for sample in samples)
            for what, keys in before.items()
        }
        for name, samples in final.items()
    }


def cautions(name: str, n: int, also_chose: int, also_trained: int) -> list[str]:
    """What a reader of the table has to know, as sentences without a full stop.

    Args:
        name: of the benchmark.
        n: its questions.
        also_chose, also_trained: from `overlaps`.
    """
    found = []
    if also_chose:
        found.append(
            f"{name}: {also_chose:,} of {n:,} questions are about images that chose the checkpoint too, so the tuned "
            "accuracy is rather too high; questions for the table alone go into a file named test"
        )
    if also_trained:
        found.append(
            f"{name}: {also_trained:,} of {n:,} questions are about images that were trained on, so the tuned accuracy "
            "is too high"
        )
    return found
