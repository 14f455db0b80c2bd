"""Encoded data sets: token counts for planning, packs for training. Imports encode, packing, collate and cache.

Tokens of all questions are held; image tensors are taken from the cache, or made again, whenever a pack needs them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm_sft.data.audit import histogram, refuse_if_all_fail
from vlm_sft.data.cache import DataCache
from vlm_sft.data.cache_folder import default_cache_dir
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.encode import EncodedGroup, Encoder, group_by_image
from vlm_sft.data.faults import UNREADABLE, WORKER_HUNG, DataFault, substitutes
from vlm_sft.data.packing import Bundle, EpochPlanner, GroupLengths
from vlm_sft.data.sample import LeftOut, Sample, distinct_images, questions_per_image
from vlm_sft.data.workers import WorkerLost, WorkerPool
from vlm_sft.errors import DataError


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
        cache = cache or DataCache(encoder, default_cache_dir(), "", prepared=False)
        for members, found in zip(groups, cache.prepare(groups, description), strict=True):
            if isinstance(found, DataError):
                self.left_out.extend(LeftOut.because(sample.id, found) for sample in members)
                continue
            self._samples.append(members)
            self._groups.append(replace(found, tensors={}))
        refuse_if_all_fail(self.left_out, samples)
        self.lengths = tuple(group_lengths(group) for group in self._groups)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._groups)

    def __getitem__(self, index: int) -> EncodedGroup:
        """One image with its questions and its tensors."""
        return replace(self._groups[index], tensors=self.encoder.image_tensors(self._samples[index][0]))

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Image tokens of each image."""
        return tuple(group.image_tokens for group in self._groups)

    def sample_ids(self, bundle: Bundle) -> tuple[str, ...]:
        """Ids of the questions of a bundle."""
        return tuple(self._samples[bundle.group][number].id for number in bundle.questions)

    def datasets(self) -> list[str]:
        """Name of the data set of each image."""
        return [members[0].dataset for members in self._samples]

    def image_samples(self) -> list[Sample]:
        """One sample of each image."""
        return [members[0] for members in self._samples]

    def samples(self) -> Iterator[tuple[Sample, EncodedGroup, int]]:
        """Yield every sample with its encoded image (without tensors) and its number within it."""
        for members, group in zip(self._samples, self._groups, strict=True):
            for number, sample in enumerate(members):
                yield sample, group, number

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
            "supervised_tokens": sum(len(question.answer_ids) for question in questions),
            "image_tokens": sum(group.image_tokens for group in self._groups),
            "prompt_tokens": sum(len(question.prompt_ids) for question in questions),
            "prefix_tokens": sum(len(group.prefix_ids) for group in self._groups),
            "questions_per_image": {str(k): images for k, images in questions_per_image(samples).items()},
            "by_dataset": dict(Counter(sample.dataset for sample in samples)),
            "token_histograms": {
                "image_tokens": histogram([group.image_tokens for group in self._groups]),
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
        ModelError: the processor fails on all of several images.
    """
    found = [(sample, encoder.problem(sample)) for sample in samples]
    left_out = [LeftOut.because(sample.id, problem) for sample, problem in found if problem is not None]
    refuse_if_all_fail(left_out, samples)
    return [sample for sample, problem in found if problem is None], left_out


def group_lengths(group: EncodedGroup) -> GroupLengths:
    """Token counts of one encoded image, for the planner."""
    return GroupLengths(
        len(group.prefix_ids),
        tuple(question.tokens for question in group.questions),
        tuple(len(question.answer_ids) for question in group.questions),
    )


@dataclass(slots=True)
class StepPacks:
    """What one rank computes in one optimizer step.

    Attributes:
        packs: the packs, the same number on every rank; none where a fault is fatal.
        supervised: supervised tokens of the whole step over all ranks, by the plan.
        questions: questions of the whole step over all ranks.
        change: supervised tokens that this rank has more than planned, where images had to be replaced.
        faults: what went wrong while the step was read.
    """

    packs: list[PackedBatch]
    supervised: int
    questions: int
    change: int = 0
    faults: list[DataFault] = field(default_factory=list)


class StepDataset(Dataset[StepPacks]):
    """The optimizer steps of one rank; indexed by (epoch, step), so that workers need no other state.

    Args:
        data: the encoded data.
        planner: plans the epochs.
        rank: this process's number.
        replace_bad: train another image of the same data set in place of one that cannot be read; otherwise the step
            comes back without packs and with a fatal fault.
        place: computes the positions of a pack; None leaves that to the model.

    Attributes:
        slot, at, bad: as in `workers.Steps`.
    """

    def __init__(
        self,
        data: PreparedData,
        planner: EpochPlanner,
        rank: int,
        replace_bad: bool = False,
        place: Callable[[PackedBatch], torch.Tensor] | None = None,
    ) -> None:
        self.data = data
        self.planner = planner
        self.rank = rank
        self.replace_bad = replace_bad
        self.place = place
        self.slot = 0
        self.at = torch.full((1, 2), -1.0, dtype=torch.float64)
        self.bad: dict[int, str] = {}
        self._planned: tuple[int, Sequence[list[Bundle]]] = (-1, [])

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self.planner.steps_per_epoch

    def __getitem__(self, index: tuple[int, int]) -> StepPacks:
        """Build the packs of one step."""
        epoch, step = index
        if self._planned[0] != epoch:
            self._planned = (epoch, self.planner.batches(epoch))
        planned = self.planner.step_of(self._planned[1][step])
        built = StepPacks([], planned.supervised, planned.questions)
        for pack in planned.ranks[self.rank]:
            collated = self._pack(pack, planned.ranks, built)
            if collated is None:
                built.packs = []
                break
            built.packs.append(collated)
        return built

    def _pack(
        self, pack: tuple[Bundle, ...], ranks: tuple[tuple[tuple[Bundle, ...], ...], ...], built: StepPacks
    ) -> PackedBatch | None:
        """Collate one pack; an empty one becomes a weightless copy of a small part of the step."""
        if pack:
            return self._collate(pack, built, counted=True)
        bundles = [bundle for packs in ranks for other in packs for bundle in other]
        smallest = min(bundles, key=lambda bundle: self.data.lengths[bundle.group].prefix)
        copy = self._collate([Bundle(smallest.group, smallest.questions[:1])], built, counted=False)
        return copy and replace(copy, weight=0.0)

    def _collate(self, pack: Sequence[Bundle], built: StepPacks, counted: bool) -> PackedBatch | None:
        """Read the images of a pack, others where one cannot be read, and put them together."""
        images: dict[int, EncodedGroup] = {}
        found = []
        for bundle in pack:
            taken = self._read(bundle, images, built)
            if taken is None:
                return None
            built.change += (self._supervised(taken) - self._supervised(bundle)) if counted else 0
            found.append(taken)
        batch = collate(found, images)
        batch.positions = self.place(batch) if self.place else None
        return batch

    def _supervised(self, bundle: Bundle) -> int:
        return sum(self.data.lengths[bundle.group].supervised[question] for question in bundle.questions)

    def _read(self, bundle: Bundle, images: dict[int, EncodedGroup], built: StepPacks) -> Bundle | None:
        """Read the image of a bundle into `images`; returns the bundle that can be trained, or None."""
        reason = self._try(bundle.group, images)
        if not reason:
            return bundle
        ids = self.data.sample_ids(bundle)
        if self.replace_bad:
            for other in substitutes(bundle, self.data.lengths, self.data.datasets(), self.planner.seed):
                if not self._try(other.group, images):
                    built.faults.append(DataFault(UNREADABLE, ids, reason, self.data.sample_ids(other)))
                    return other
        built.faults.append(DataFault(UNREADABLE, ids, reason, fatal=True))
        return None

    def _try(self, group: int, images: dict[int, EncodedGroup]) -> str:
        """Read one image; returns why that failed, or ""."""
        if group in images:
            return ""
        if group in self.bad:
            return self.bad[group]
        self.at[self.slot, 1] = time.monotonic()
        self.at[self.slot, 0] = group
        try:
            images[group] = self.data[group]
        except DataError as error:
            return error.what
        return ""


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, step) in order; `set_epoch` and `start` move it without touching the data.

    Args:
        steps: steps of one epoch.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield what is left of the current epoch."""
        start, self.start = self.start, 0
        return iter([(self.epoch, step) for step in range(start, self.steps)])


class StepLoader(DataLoader[StepPacks]):
    """A loader of whole optimizer steps for transformers.Trainer.

    Args:
        dataset: the steps of this rank.
        workers: loader processes. A lost one is started again; an image that loses its worker twice, or that a worker
            hangs at, counts as one that cannot be read.
    """

    LOSSES = 8  # of workers in one epoch, after which something else than an image must be wrong

    def __init__(self, dataset: StepDataset, workers: int) -> None:
        dataset.at = torch.full((max(1, workers), 2), -1.0, dtype=torch.float64).share_memory_()
        super().__init__(dataset, batch_size=None, sampler=EpochSampler(len(dataset)), num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; called by the Trainer."""
        self.sampler.epoch = epoch  # type: ignore[attr-defined]

    def start_at(self, step: int) -> None:
        """Let the next iteration begin at a step within the epoch."""
        self.sampler.start = step  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[StepPacks]:  # type: ignore[override]
        """Yield what is left of the current epoch."""
        indices = list(self.sampler)
        if not self.num_workers:
            return map(self.dataset.__getitem__, indices)
        return self._from_workers(indices)

    def _from_workers(self, indices: list[Any]) -> Iterator[StepPacks]:
        pool = WorkerPool(self.dataset, indices, self.num_workers)  # type: ignore[arg-type]
        losses: Counter[int] = Counter()
        faults: list[DataFault] = []
        try:
            for _ in indices:
                step = None
                while step is None:
                    try:
                        step = pool.next()
                    except WorkerLost as lost:
                        losses[lost.image] += 1
                        faults.append(self._judge(lost, losses))
                        if faults[-1].fatal:
                            step = StepPacks([], 1, 0)
                        else:
                            pool.restart()
                step.faults[:0] = faults
                faults = []
                yield step
        finally:
            pool.close()

    def _judge(self, lost: WorkerLost, losses: Counter[int]) -> DataFault:
        """Whether the training can go on without a worker, and whether the image that it was reading is to blame."""
        steps: StepDataset = self.dataset  # type: ignore[assignment]
        known = lost.image >= 0
        every = range(len(steps.data.lengths[lost.image].questions)) if known else range(0)
        ids = steps.data.sample_ids(Bundle(lost.image, tuple(every)))
        blamed = known and (lost.kind == WORKER_HUNG or losses[lost.image] > 1)
        if blamed:
            steps.bad[lost.image] = lost.reason
        fatal = (blamed and not steps.replace_bad) or losses.total() > self.LOSSES
        return DataFault(lost.kind, ids, lost.reason, fatal=fatal)
