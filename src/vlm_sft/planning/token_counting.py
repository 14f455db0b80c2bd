"""Counting the tokens of a data set without processing its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError
from vlm_sft.data.cache.encoded import DataCache, group_key
from vlm_sft.data.encode import EncodedGroup, Encoder, picture_sizes
from vlm_sft.data.processor import visual_tokens
from vlm_sft.data.sample import Sample
from vlm_sft.forecast.image_tokens import qwen_grid


class CountingCache(DataCache):
    """Encodes questions without processing their images, wherever their tokens follow from the images' sizes.

    Args:
        encoder, root, name: as for `DataCache`.
        counted: what was encoded already, by `group_key`; several plans share it.
    """

    def __init__(self, encoder: Encoder, root: Path, name: str, counted: dict[str, EncodedGroup]) -> None:
        super().__init__(encoder, root, name, prepared=False)
        self.counted = counted

    def prepare(self, groups: Sequence[Sequence[Sample]], description: str) -> Iterator[EncodedGroup | DataError]:
        """As in `DataCache`; the tensors hold the grids of the images alone."""
        with progress(sum(map(len, groups)), description, "questions") as bar:
            for members in groups:
                key = group_key(members)
                try:
                    if key not in self.counted:
                        tensors = grid_tensors(self.encoder, members[0])
                        self.counted[key] = self.encoder.encode(members, tensors=tensors)
                    yield self.counted[key]
                except DataError as error:
                    yield error
                bar.advance(len(members))


def grid_tensors(encoder: Encoder, sample: Sample) -> dict[str, torch.Tensor]:
    """The grids that the processor would report for a sample's images.

    {} for a text row, and for a processor whose rule is not known.

    Raises:
        SampleError: it refuses one of them.
    """
    images = encoder.processor.image_processor
    size = dict(getattr(images, "size", None) or {})
    if not sample.images or not hasattr(images, "merge_size") or not {"shortest_edge", "longest_edge"} <= set(size):
        return {}
    bounds = (images.patch_size, images.merge_size, size["shortest_edge"], size["longest_edge"])
    grids = []
    for image, (width, height) in zip(sample.images, picture_sizes(sample), strict=True):
        visual_tokens(encoder.processor, width, height, f"{image.source} ({width} x {height} pixels)")
        grids.append([1, *qwen_grid(height, width, *bounds)])
    return {"image_grid_thw": torch.tensor(grids)}
