"""Encoded data sets: token counts for planning, packs for training.

Tokens of all questions are held; image tensors are taken from the cache, or made again, whenever a pack needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from vlm_sft.common.errors import DataError
from vlm_sft.data.audit import histogram, refuse_if_all_fail
from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.packing import Bundle, GroupLengths
from vlm_sft.data.sample import LeftOut, Sample, distinct_images, group_by_image, questions_per_image, text_rows


class PreparedData:
    """The encoded questions of a data set, grouped by image.

    Args:
        samples: the samples; those that cannot be encoded are collected in `left_out`.
        encoder: turns the samples of one image into tokens and tensors.
        description: what the progress bar says.
        cache: where prepared data is kept; None keeps nothing.
    """

    def __init__(
        self, samples: Sequence[Sample], encoder: Encoder, description: str, cache: DataCache | None = None
    ) -> None:
        self.encoder = encoder
        usable, self.left_out = usable_samples(encoder, samples)
        self._samples: list[list[Sample]] = []
        self._groups: list[EncodedGroup] = []
        groups = group_by_image(usable)
        self.cache = cache or DataCache(encoder, default_cache_dir(), "", prepared=False)
        for members, found in zip(groups, self.cache.prepare(groups, description), strict=True):
            if isinstance(found, DataError):
                self.left_out.extend(LeftOut.because(sample.id, found) for sample in members)
                continue
            self._samples.append(members)
            self._groups.append(replace(found, tensors={}, follows=followed_turns(members, found)))
        refuse_if_all_fail(self.left_out, samples)
        self.lengths = tuple(group_lengths(group) for group in self._groups)

    def __len__(self) -> int:
        """Number of images, and of openings of text rows."""
        return len(self._groups)

    def __getitem__(self, index: int) -> EncodedGroup:
        """One image with its questions and its tensors."""
        return replace(self._groups[index], tensors=self.cache.image_tensors(self._samples[index][0]))

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Image tokens of each image; 0 for text rows."""
        return tuple(group.image_tokens for group in self._groups)

    def sample_ids(self, bundle: Bundle) -> tuple[str, ...]:
        """Ids of the questions of a bundle."""
        return tuple(self._samples[bundle.group][number].id for number in bundle.questions)

    def datasets(self) -> list[str]:
        """Name of the data set of each image."""
        return [members[0].dataset for members in self._samples]

    @cached_property
    def loss_shares(self) -> dict[str, float]:
        """The share of each data set in the training loss: its supervised tokens times their weights, over all sets."""
        sums: dict[str, float] = {}
        for sample, group, number in self.samples():
            tokens = len(group.questions[number].answer_ids) * sample.weight
            sums[sample.dataset] = sums.get(sample.dataset, 0.0) + tokens
        total = sum(sums.values())
        return {name: tokens / total for name, tokens in sorted(sums.items())} if total else {}

    def image_samples(self) -> list[Sample]:
        """One sample of each group that shows an image."""
        return [members[0] for members in self._samples if members[0].images]

    def samples(self) -> Iterator[tuple[Sample, EncodedGroup, int]]:
        """Yield every sample with its encoded image (without tensors) and its number within it."""
        for members, group in zip(self._samples, self._groups, strict=True):
            for number, sample in enumerate(members):
                yield sample, group, number

    def sample_lengths(self) -> Iterator[tuple[Sample, int]]:
        """Yield every sample with the tokens of the sequence that it alone would be, end token included."""
        for sample, group, number in self.samples():
            question = group.questions[number]
            yield sample, len(group.prefix_ids) + len(question.prompt_ids) + len(question.answer_ids)

    @property
    def distinct_images(self) -> int:
        """How many different images there are; a question about several of them has a group of its own."""
        return distinct_images(sample for members in self._samples for sample in members)

    def summary(self) -> dict[str, Any]:
        """Counts for data.json: samples, images, tokens, questions per image."""
        samples = [sample for sample, _, _ in self.samples()]
        questions = [question for group in self._groups for question in group.questions]
        return {
            "samples": len(questions),
            "images": self.distinct_images,
            "text_rows": text_rows(samples),
            "supervised_tokens": sum(len(question.answer_ids) for question in questions),
            "image_tokens": sum(group.image_tokens for group in self._groups),
            "prompt_tokens": sum(len(question.prompt_ids) for question in questions),
            "prefix_tokens": sum(len(group.prefix_ids) for group in self._groups),
            "questions_per_image": {str(k): images for k, images in questions_per_image(samples).items()},
            "by_dataset": dict(Counter(sample.dataset for sample in samples)),
            "token_histograms": {
                "image_tokens": histogram([group.image_tokens for group in self._groups if group.image_tokens]),
                "question_tokens": histogram([question.tokens for question in questions]),
                "answer_tokens": histogram([len(question.answer_ids) for question in questions]),
            },
        }

    def marked_example(self) -> str:
        """One decoded sample with the supervised part between ⟦ and ⟧; runs of image tokens are counted, not shown."""
        group = self._groups[0]
        tokenizer = self.encoder.tokenizer
        question = group.questions[0]
        image = self.encoder.image_token_id
        parts, run = [], 0
        for token in [*group.prefix_ids.tolist(), -1]:
            if token == image:
                run += 1
                continue
            if run:
                parts.append(f"{tokenizer.convert_ids_to_tokens(image)} x {run}")
                run = 0
            if token >= 0:
                parts.append(tokenizer.decode([token]))
        prompt, answer = tokenizer.decode(question.prompt_ids), tokenizer.decode(question.answer_ids)
        return "".join(parts) + prompt + "⟦" + answer + "⟧"


def usable_samples(encoder: Encoder, samples: Sequence[Sample]) -> tuple[list[Sample], list[LeftOut]]:
    """Sort out what `Encoder.problem` speaks against, before anything is decoded.

    Returns:
        The samples that can be encoded, as far as that is known, and the others.

    Raises:
        ModelError: the processor fails on all of several images, or how the model writes boxes is not known.
    """
    found = [(sample, encoder.problem(sample)) for sample in samples]
    left_out = [LeftOut.because(sample.id, problem) for sample, problem in found if problem is not None]
    refuse_if_all_fail(left_out, samples)
    return [sample for sample, problem in found if problem is None], left_out


def group_lengths(group: EncodedGroup) -> GroupLengths:
    """Token counts of one encoded image, for the planner."""
    weights = tuple(question.weight for question in group.questions)
    return GroupLengths(
        len(group.prefix_ids),
        tuple(question.tokens for question in group.questions),
        tuple(len(question.answer_ids) for question in group.questions),
        weights if any(weight != 1 for weight in weights) else (),
        group.follows,
    )


def followed_turns(members: Sequence[Sample], group: EncodedGroup) -> tuple[int, ...]:
    """Which turns of conversations go on from which, token for token; see `EncodedGroup.follows`.

    A turn does not go on from an earlier one where the chat template renders that otherwise now (without its thinking),
    or where questions have a prompt template, which a history does not have.

    Args:
        members: the samples of the group.
        group: their tokens.
    """
    if not any(sample.history for sample in members):
        return ()
    whole: dict[bytes, int] = {}
    for number, question in enumerate(group.questions):
        whole.setdefault(question.prompt_ids.tobytes() + question.answer_ids.tobytes(), number)
    sizes = sorted({len(tokens) for tokens in whole}, reverse=True)
    prompts = [question.prompt_ids.tobytes() for question in group.questions]
    follows = tuple(
        next((whole[prompt[:size]] for size in sizes if size < len(prompt) and prompt[:size] in whole), -1)
        for prompt in prompts
    )
    return follows if max(follows) >= 0 else ()
