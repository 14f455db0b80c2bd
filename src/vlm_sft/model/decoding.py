"""Attention of one new token a question behind shared prefixes, on CPUs, with no key that it may not see.

A step of generation has one token of each question, and one cache holds the keys of all images and questions. Under a
mask over that cache nearly all products are thrown away. Here the questions of an image are multiplied with its prefix,
a slice of the cache, and each question with its own tokens, which are few and gathered; one softmax goes over both.

Shape suffixes: F questions of a step, T own tokens of a question, K key/value heads, R query heads of each, D head
width, L tokens in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from vlm_sft.data.collate import PackedBatch
from vlm_sft.model.cpu.matmul import EXACT, stream_dtype
from vlm_sft.model.forward_patch import is_plain
from vlm_sft.model.protocols import VisionLanguageModel

Prefix = tuple[int, int, int]  # start and end in the cache, and how many questions of the step look at it


@dataclass(frozen=True, slots=True)
class DecodingStep:
    """What the questions of one step see of a cache.

    Attributes:
        length: L.
        prefixes: of the images, in the order of their questions.
        own: (F, T) int64, where the cache holds each question's own tokens; rows are filled up with one of them.
        filler: (F, T) bool, True where they are.
    """

    length: int
    prefixes: list[Prefix]
    own: torch.Tensor
    filler: torch.Tensor

    def marker(self) -> torch.Tensor:
        """What a layer gets instead of a mask, (1, 1, 1, 1) bool: it keeps transformers from building one."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def computes(self, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether a layer with these keys (1, K, L, D) was given the marker."""
        return key.shape[2] == self.length and mask is not None and mask.shape[-1] == 1

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Scaled dot-product attention.

        Args:
            query: (1, K R, F, D), head h belonging to key/value head h // R.
            key, value: (1, K, L, D).
            scale: factor on the products; 1 / sqrt(D) when None.

        Returns:
            (1, F, K R, D).
        """
        kinds, (questions, tokens) = key.shape[1], self.own.shape
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        queries = (query[0] * scale).unflatten(0, (kinds, -1)).transpose(1, 2)  # (K, F, R, D)
        repeats = queries.shape[2]
        own_keys, own_values = (states[0][:, self.own] for states in (key, value))  # (K, F, T, D)
        own_scores = (queries @ own_keys.mT).masked_fill_(self.filler[:, None], float("-inf"))

        # A row of scores: a question's own tokens, then its image's prefix, then nothing.
        longest = max(end - start for start, end, _ in self.prefixes)
        scores = F.pad(own_scores.flatten(1, 2), (0, longest), value=float("-inf"))
        rows = [count * repeats for _, _, count in self.prefixes]
        for (start, end, _), some, part in zip(
            self.prefixes, queries.flatten(1, 2).split(rows, 1), scores.split(rows, 1), strict=True
        ):
            part[..., tokens : tokens + end - start] = some @ key[0, :, start:end].mT

        weights = scores.softmax(-1)
        looked_at = [
            part[..., tokens : tokens + end - start] @ value[0, :, start:end]
            for (start, end, _), part in zip(self.prefixes, weights.split(rows, 1), strict=True)
        ]
        output = torch.cat(looked_at, 1).unflatten(1, (questions, repeats))
        output += weights[..., :tokens].unflatten(1, (questions, repeats)) @ own_values
        return output.transpose(0, 1).flatten(1, 2)[None]


class OwnTokens:
    """Where a cache holds the own tokens of each question of a pack: its prompt, then what is generated for it.

    Args:
        batch: the pack, without answers.

    Attributes:
        longest: tokens of the longest sequence that a question alone would be by now.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self._images = [(ends[0], ends[1]) for ends in batch.ends]
        self._image_of = [image for image, ends in enumerate(batch.ends) for _ in ends[2:]]
        starts, ends = (
            torch.tensor([place for bounds in batch.ends for place in bounds[side]], device=batch.group.device)[:, None]
            for side in (slice(1, -1), slice(2, None))
        )
        columns = torch.arange(int((ends - starts).max()), device=starts.device)
        self._places = torch.minimum(starts + columns, ends - 1)
        self._filler = starts + columns >= ends
        self._length = batch.tokens
        self.longest = int(batch.index.max()) + 1

    def step(self, fed: torch.Tensor) -> DecodingStep:
        """Add one token of each of the questions `fed`, (F,) int64 and ascending, behind the cache."""
        new = torch.zeros_like(self._places[:, 0])
        new[fed] = torch.arange(self._length, self._length + len(fed), device=fed.device)
        self._length += len(fed)
        self.longest += 1
        self._places = torch.cat([self._places, new[:, None]], 1)
        self._filler = torch.cat([self._filler, torch.zeros_like(self._filler[:, :1])], 1)
        counted = [(image, len(list(same))) for image, same in groupby(self._image_of[one] for one in fed.tolist())]
        prefixes = [(*self._images[image], count) for image, count in counted]
        return DecodingStep(self._length, prefixes, self._places[fed], self._filler[fed])


def computes_by_image(base: VisionLanguageModel) -> bool:
    """Whether a model whose packs are computed image by image decodes so, too: where its keys are exact, on a CPU."""
    weight = base.get_input_embeddings().weight
    return weight.device.type == "cpu" and stream_dtype(weight) in EXACT and not is_plain()
