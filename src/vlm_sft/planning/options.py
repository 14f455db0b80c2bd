"""What one training run was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.common.record import RunRecord
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.distributed.launch import Launch, pack_tokens
from vlm_sft.distributed.signals import StopSignals
from vlm_sft.forecast.pack_size import Passes
from vlm_sft.model.caches import EngineOptions
from vlm_sft.model.load import DEFAULT_BASE
from vlm_sft.recipe.schema import Recipe

MAX_BAD_STEPS = 3
GPU_WORKERS = 4  # processes that prepare batches for one GPU
AUTO = "auto"


@dataclass(frozen=True)
class TrainOptions:
    """The command line of one training run.

    Attributes:
        output_dir: the run's folder.
        sft_config: recipe file, or None for the defaults.
        overrides: recipe keys given as flags.
        base_model: "pocket", a folder or a Hub id.
        dataset: data sets in the grammar of `--dataset`.
        flash_attn: use FlashAttention where it can run.
        deepspeed: "zero2", "zero3", a file, or None.
        local_rank: from the deepspeed launcher.
        resume: None, "auto" or a checkpoint folder.
        overwrite: start over in a folder that holds a run.
        allow_changes: resume although recipe, data, base model or prompt are not those of the checkpoint.
        on_save_error: "continue" or "stop" when a checkpoint cannot be written.
        on_bad_sample: "stop" or "replace" when an image cannot be read during the training.
        max_bad_steps: steps in a row without finite numbers that end the training.
        eval_benchmarks: benchmarks of the final evaluation; None for those of the data sets, "none" for no evaluation.
        max_left_out: share of samples that may be left out, 0 to 1.
        eval_samples: questions a benchmark that are answered at each evaluation; None for `EVAL_SAMPLES` where a task
            metric or a guard needs them, and no such questions elsewhere.
        guard: `BENCHMARK:POINTS,…` that a checkpoint may lose against the base at most; None for no guard.
        prompt_template, system: instead of what the base comes with; None keeps that.
        max_new_tokens: limit of an answer in tokens, as in an evaluation; it is saved with the adapter.
        shard_weights: "true", "false" or "auto": the ranks share out the weights in the final evaluation.
        probe: run a few passes before the training to make the forecast of time and memory better.
        ignore_forecast: start although memory or disk surely do not suffice.
        engine: caches and packing; they change no result.
    """

    output_dir: Path
    sft_config: Path | None = None
    overrides: dict[str, object] = field(default_factory=dict)
    base_model: str = DEFAULT_BASE
    dataset: str = "chartqa,textvqa"
    flash_attn: bool = False
    deepspeed: str | None = None
    local_rank: int | None = None
    resume: str | None = None
    overwrite: bool = False
    allow_changes: bool = False
    on_save_error: str = "continue"
    on_bad_sample: str = "stop"
    max_bad_steps: int = MAX_BAD_STEPS
    eval_benchmarks: str | None = None
    max_left_out: float = 0.01
    eval_samples: int | None = None
    guard: str | None = None
    prompt_template: str | None = None
    system: str | None = None
    max_new_tokens: str | None = None
    shard_weights: str = AUTO
    probe: bool = False
    ignore_forecast: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class Run:
    """A run that has begun: what was asked for, resolved.

    Attributes:
        options: the command line.
        recipe: the resolved recipe.
        specs: the data sets.
        launch: ranks and device.
        record: run.json.
        checkpoint: what it goes on from, or None.
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

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.passes.gradient_checkpointing if self.passes else self.recipe.gradient_checkpointing is True

    @property
    def data_workers(self) -> int:
        """Processes that prepare batches: a GPU needs some where nobody chose to have none.

        The recipe files of the package say 0, which suits CPUs, so a 0 counts as a choice only as a flag.
        """
        asked = self.recipe.dataloader_num_workers
        if asked == AUTO or (asked == 0 and "dataloader_num_workers" not in self.options.overrides):
            return 0 if self.launch.cpu else GPU_WORKERS
        return int(asked)

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
