"""Counting the tokens of a data set without processing its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError
from vlm_sft.data.cache.encoded import DataCache, group_key
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.image_tokens import grid_tensors
from vlm_sft.data.sample import Sample


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
