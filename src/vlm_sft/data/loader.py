"""Packs for training: one batch of the loader is one optimizer step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm_sft.common.errors import DataError
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.image_failures import UNREADABLE, WORKER_HUNG, DataFault, substitutes
from vlm_sft.data.packing import Bundle, EpochPlanner, supervised_tokens
from vlm_sft.data.workers import WorkerLost, WorkerPool


@dataclass(slots=True)
class StepPacks:
    """What one rank computes in one optimizer step.

    Attributes:
        packs: the packs, the same number on every rank; none where a fault is fatal.
        supervised: supervised tokens of the whole step by their weights, over all ranks, by the plan.
        questions: questions of the whole step over all ranks.
        change: by how much this rank has more of them than planned, where images had to be replaced.
        faults: what went wrong while the step was read.
    """

    packs: list[PackedBatch]
    supervised: float
    questions: int
    change: float = 0
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
        accompany: add a question about a small image, with a weight of 0, to packs without an image: every rank then
            runs the vision tower in every pass, which it has to where it is divided over the ranks.

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
        accompany: bool = False,
    ) -> None:
        self.data = data
        self.planner = planner
        self.rank = rank
        self.replace_bad = replace_bad
        self.place = place
        self.accompany = accompany
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
            lengths = self.data.lengths
            more = supervised_tokens(taken, lengths[taken.group]) - supervised_tokens(bundle, lengths[bundle.group])
            built.change += more if counted else 0
            found.append(taken)
        companion = self._companion(found)
        if companion is not None:
            if self._read(companion, images, built) != companion:
                return None
            group = images[companion.group]
            images[companion.group] = replace(group, questions=tuple(replace(q, weight=0.0) for q in group.questions))
            found.append(companion)
        batch = collate(found, images, turns=self.planner.rows is None)
        batch.positions = self.place(batch) if self.place else None
        return batch

    def _companion(self, pack: Sequence[Bundle]) -> Bundle | None:
        """What a pack has to compute beside its own questions; None where nothing.

        Kept features run no tower, so there no rank waits for another one there.
        """
        visual = self.data.visual_tokens if self.accompany and self.data.cache.features is None else ()
        if not any(visual) or any(visual[bundle.group] for bundle in pack):
            return None
        lengths = self.data.lengths
        seen = (group for group, tokens in enumerate(visual) if tokens and group not in self.bad)
        group = min(seen, key=lambda one: lengths[one].prefix + min(lengths[one].questions), default=None)
        if group is None:
            return None
        asked = lengths[group].questions
        return Bundle(group, (asked.index(min(asked)),))

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
