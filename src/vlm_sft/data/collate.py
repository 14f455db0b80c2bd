"""A pack of bundles to tensors: one sequence of image prefixes and their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from vlm_sft.data.cache.image_tensors import stays_on_cpu, unpack_pixels
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.epoch_order import conversations
from vlm_sft.data.packing import Bundle


class Groups(Protocol):
    """Encoded images by index: a list, or something that makes them when they are asked for."""

    def __getitem__(self, index: int, /) -> EncodedGroup:
        """Return one encoded image."""
        ...


IGNORED_TYPE = 0  # token type of text in processors that have token types


@dataclass(slots=True)
class PackedBatch:
    """One sequence `[prefix 1][q a][q a]…[prefix 2]…` of L tokens, its layout and the images of its prefixes.

    A branch is one question with its answer, or a conversation of which several answers are supervised; branch 0 is a
    prefix. S is the number of supervised tokens.

    Attributes:
        input_ids: (1, L) int64.
        ends: for each image the start of its prefix, the end of its prefix and the end of each question, in tokens.
        group: (L,) int64, index of the image that a token belongs to.
        branch: (L,) int64, 0 in a prefix, else 1 + index of the question within the whole pack.
        offset: (L,) int64, index of the token within its prefix or branch.
        index: (L,) int64, index of the token in the sequence that its question alone would be.
        prefix_types: (L,) int64, the processor's token types; 0 outside prefixes.
        predict: (S,) int64, positions whose next token is supervised. In a pack without answers (generation): the
            last token of each question.
        targets: (S,) int64, the supervised tokens.
        target_branch: (S,) int64, branch of each supervised token.
        weights: (S,) float64, the weight of each supervised token in the loss; None where all are 1.
        weight: 1.0, or 0.0 for a pack that only keeps this rank in step with the others.
        keys: (L,) int64, a number that depends only on the question (or image) and the offset: for dropout masks that
            do not depend on packing.
        sample_ids: the question of each branch, of a conversation its last one.
        rows: how many positions of `predict` each image has.
        tensors: for each image the processor's tensors, or what `pixels.pack_pixels` made of them.
        positions: (1, L) or (3, 1, L) int64, what the model rotates by; None where nobody has computed them yet.
    """

    input_ids: torch.Tensor
    ends: list[list[int]]
    group: torch.Tensor
    branch: torch.Tensor
    offset: torch.Tensor
    index: torch.Tensor
    prefix_types: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    target_branch: torch.Tensor
    keys: torch.Tensor
    sample_ids: list[str]
    rows: list[int]
    tensors: list[dict[str, torch.Tensor]] = field(repr=False)
    positions: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Length L of the sequence."""
        return self.input_ids.shape[1]

    @property
    def padded_tokens(self) -> int:
        """Tokens of its questions as a padded batch of separate sequences."""
        sizes = [bounds[1] - bounds[0] + b - a for bounds in self.ends for a, b in pairwise(bounds[1:])]
        return len(sizes) * max(sizes)

    def weighted_sum(self, losses: torch.Tensor) -> torch.Tensor:
        """() sum of token losses (S,), each times its weight and that of the pack."""
        return self.weight * (losses if self.weights is None else losses * self.weights.to(losses)).sum()

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the tensors to a device, without waiting for it, and decode the pixels there."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {
            name: moved_to(device, value) for name, value in values.items() if torch.is_tensor(value)
        }
        tensors = [
            {name: value if stays_on_cpu(name) else moved_to(device, value) for name, value in image.items()}
            for image in self.tensors
        ]
        return replace(self, **moved, tensors=[unpack_pixels(image) for image in tensors])


def moved_to(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to a device; to a GPU through page-locked memory, so that nobody waits for what is queued there."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class _Sequence:
    """The sequence of one pack while it grows."""

    def __init__(self) -> None:
        self.length = 0
        self.columns: dict[str, list[torch.Tensor]] = {
            name: [] for name in ("ids", "group", "branch", "offset", "index", "types", "keys")
        }

    def add(self, tokens: torch.Tensor, types: torch.Tensor, group: int, branch: int, key: int, before: int) -> None:
        """Append the tokens of one prefix, or of one question behind a prefix of `before` tokens."""
        offset = torch.arange(len(tokens))
        parts = {
            "ids": tokens,
            "group": torch.full_like(offset, group),
            "branch": torch.full_like(offset, branch),
            "offset": offset,
            "index": before + offset,
            "types": types,
            "keys": key + offset,
        }
        for name, part in parts.items():
            self.columns[name].append(part)
        self.length += len(tokens)

    def column(self, name: str) -> torch.Tensor:
        """One column of the whole sequence, (L,)."""
        return torch.cat(self.columns[name])


def collate(pack: Sequence[Bundle], groups: Groups, turns: bool = True) -> PackedBatch:
    """Build the sequence of one pack.

    Args:
        pack: the bundles; each names an image of `groups` and some of its questions.
        groups: the encoded images.
        turns: let the turns of a conversation be one branch; False gives every question a branch of its own.

    Returns:
        The packed batch; supervised positions are predicted from the token before them in the same branch.
    """
    sequence = _Sequence()
    predict: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    target_branch: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    ends: list[list[int]] = []
    sample_ids: list[str] = []
    encoded = [groups[bundle.group] for bundle in pack]
    for index, (bundle, group) in enumerate(zip(pack, encoded, strict=True)):
        ends.append([sequence.length])
        prefix = torch.from_numpy(group.prefix_ids).long()
        types = torch.from_numpy(group.prefix_types).long() if len(group.prefix_types) else torch.zeros_like(prefix)
        sequence.add(prefix, types, index, 0, _key(bundle.group, 0), 0)
        ends[-1].append(sequence.length)
        for talk in conversations(bundle.questions, group.follows if turns else ()):
            question = group.questions[talk[-1]]
            sample_ids.append(question.sample_id)
            branch = len(sample_ids)
            for turn in (group.questions[number] for number in talk):
                answer = torch.from_numpy(turn.answer_ids).long()
                predict.append(sequence.length + len(turn.prompt_ids) - 1 + torch.arange(max(1, len(answer))))
                targets.append(answer)
                target_branch.append(torch.full_like(answer, branch))
                weights.append(torch.full_like(answer, turn.weight, dtype=torch.float64))
            # The end token predicts nothing, so it is not fed.
            fed = torch.from_numpy(np.concatenate([question.prompt_ids, question.answer_ids[:-1]])).long()
            key = _key(bundle.group, 1 + _first_turn(talk[0], group.follows))
            sequence.add(fed, torch.full_like(fed, IGNORED_TYPE), index, branch, key, len(prefix))
            ends[-1].append(sequence.length)
    images, predicted = sequence.column("group"), torch.cat(predict)
    return PackedBatch(
        input_ids=sequence.column("ids")[None],
        ends=ends,
        group=images,
        branch=sequence.column("branch"),
        offset=sequence.column("offset"),
        index=sequence.column("index"),
        prefix_types=sequence.column("types"),
        predict=predicted,
        targets=torch.cat(targets),
        target_branch=torch.cat(target_branch),
        keys=sequence.column("keys"),
        sample_ids=sample_ids,
        rows=torch.bincount(images[predicted], minlength=len(ends)).tolist(),
        tensors=[group.tensors for group in encoded],
        weights=None if all((part == 1).all() for part in weights) else torch.cat(weights),
    )


def _first_turn(question: int, follows: Sequence[int]) -> int:
    """The first turn of a question's conversation, whose keys all turns have, in one branch or in several."""
    while follows and follows[question] >= 0:
        question = follows[question]
    return question


def split_pack(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch] | None:
    """Cut a pack with answers into two, between images, or between the questions of its only image.

    Args:
        batch: the pack.

    Returns:
        Two packs that hold its questions in order, with their dropout keys, so that the sum of their losses is the
        loss of the whole; None for a pack of one question.
    """
    counts = [len(ends) - 2 for ends in batch.ends]
    if len(counts) > 1:
        sizes = [ends[-1] - ends[0] for ends in batch.ends]
        cut = min(range(1, len(sizes)), key=lambda place: abs(2 * sum(sizes[:place]) - sum(sizes)))
        picks = [(image, range(count)) for image, count in enumerate(counts)]
        return _part(batch, picks[:cut]), _part(batch, picks[cut:])
    if counts[0] < 2:
        return None
    half = counts[0] // 2
    return _part(batch, [(0, range(half))]), _part(batch, [(0, range(half, counts[0]))])


def _part(batch: PackedBatch, picks: Sequence[tuple[int, range]]) -> PackedBatch:
    """The pack that holds some questions of some images of another pack, in the same order."""
    firsts = list(accumulate((len(bounds) - 2 for bounds in batch.ends), initial=0))
    questions = [firsts[image] + number for image, numbers in picks for number in numbers]
    ends: list[list[int]] = []
    for image, numbers in picks:
        bounds = batch.ends[image]
        sizes = [bounds[1] - bounds[0], *(bounds[2 + number] - bounds[1 + number] for number in numbers)]
        ends.append(list(accumulate(sizes, initial=ends[-1][-1] if ends else 0)))
    chosen = torch.tensor(questions, device=batch.branch.device)
    new_branch = batch.branch.new_zeros(len(batch.sample_ids) + 1)  # by the old one; 0 for a question that is not taken
    new_branch[chosen + 1] = torch.arange(1, 1 + len(questions), device=chosen.device)
    new_image = batch.group.new_full((len(batch.ends),), -1)
    new_image[[image for image, _ in picks]] = torch.arange(len(picks), device=chosen.device)
    taken = (new_image[batch.group] >= 0) & ((batch.branch == 0) | (new_branch[batch.branch] > 0))
    tokens = taken.nonzero()[:, 0]
    place = taken.cumsum(0) - 1  # in the new sequence, of the tokens that are taken
    kept = new_branch[batch.target_branch] > 0
    images, predict = new_image[batch.group[tokens]], place[batch.predict[kept]]
    return replace(
        batch,
        input_ids=batch.input_ids[:, tokens],
        ends=ends,
        group=images,
        branch=new_branch[batch.branch[tokens]],
        offset=batch.offset[tokens],
        index=batch.index[tokens],
        prefix_types=batch.prefix_types[tokens],
        predict=predict,
        targets=batch.targets[kept],
        target_branch=new_branch[batch.target_branch[kept]],
        keys=batch.keys[tokens],
        sample_ids=[batch.sample_ids[number] for number in questions],
        rows=torch.bincount(images[predict], minlength=len(ends)).tolist(),
        positions=None if batch.positions is None else batch.positions[..., tokens],
        weights=None if batch.weights is None else batch.weights[kept],
        tensors=[batch.tensors[image] for image, _ in picks],
    )


def _key(group: int, part: int) -> int:
    """A number for the prefix (part 0) or a question of an image, far from that of any other."""
    return (group * 1_048_576 + part) * 65_536
