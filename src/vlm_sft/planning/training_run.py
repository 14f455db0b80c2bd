"""One training run: its options resolved, its ranks, its record, and what happens when something fails."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common.record import RunRecord
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.distributed.launch import Launch, answer_tokens, pack_tokens
from vlm_sft.distributed.signals import StopSignals
from vlm_sft.forecast.pack_size import Passes
from vlm_sft.planning.options import AUTO, MAX_BAD_STEPS, TrainOptions
from vlm_sft.recipe.schema import Recipe

GPU_WORKERS = 4  # processes that prepare batches for one GPU


@dataclass(frozen=True)
class TrainingRun:
    """A run that has begun: its options, resolved.

    Attributes:
        options: the command line.
        recipe: the resolved recipe.
        specs: the data sets.
        launch: ranks and device.
        record: run.json.
        checkpoint: what it resumes from, or None.
        signals: what watches for signals, or None.
        passes: how forward passes are cut, once the data is known (`planning/pack_choice.py`).
    """

    options: TrainOptions
    recipe: Recipe
    specs: list[DatasetSpec]
    launch: Launch
    record: RunRecord
    checkpoint: Path | None
    signals: StopSignals | None = None
    passes: Passes | None = None

    @property
    def tokens_per_pack(self) -> int:
        """Token budget of one forward pass."""
        if self.passes is not None:
            return self.passes.tokens_per_pack
        return self.recipe.tokens_per_pack or pack_tokens(self.launch)

    def answer_tokens(self, blockwise: bool) -> int:
        """Token budget of one forward pass that answers questions; `blockwise` as of `launch.answer_tokens`."""
        chosen = self.recipe.tokens_per_pack is not None or not self.launch.cpu
        return self.tokens_per_pack if chosen else answer_tokens(self.launch, blockwise)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.passes.gradient_checkpointing if self.passes else self.recipe.gradient_checkpointing is True

    @property
    def data_workers(self) -> int:
        """Processes that prepare batches: a GPU needs some unless the user chose none.

        The recipe files of the package say 0, which suits CPUs, so a 0 counts as a choice only as a flag.
        """
        workers = self.recipe.dataloader_num_workers
        if workers == AUTO or (workers == 0 and "dataloader_num_workers" not in self.options.overrides):
            return 0 if self.launch.cpu else GPU_WORKERS
        return int(workers)

    @property
    def faults(self) -> FaultPolicy:
        """What happens when numbers, images or processes fail."""
        return FaultPolicy(self.options.max_bad_steps, self.options.on_bad_sample == "replace", self.signals)


@dataclass(frozen=True)
class FaultPolicy:
    """What a training does when something fails.

    Attributes:
        max_bad_steps: steps in a row without finite numbers that end it.
        replace_bad: train another sample in place of one whose image cannot be read; False ends the training.
        signals: what watches for signals; None where nothing does.
    """

    max_bad_steps: int = MAX_BAD_STEPS
    replace_bad: bool = False
    signals: StopSignals | None = None
