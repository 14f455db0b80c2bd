"""What a forecast follows from: the setting, the passes of a run, its images, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm_sft.forecast.disk import Saving
from vlm_sft.forecast.flops import EpochWork, Work, tower_flops, training_flops
from vlm_sft.forecast.setting import Setting
from vlm_sft.recipe.schedule import Schedule


@dataclass(frozen=True, slots=True)
class AnsweringWork:
    """Questions of one benchmark that are answered by generation.

    Attributes:
        name: of the benchmark.
        work: of the prompts.
        steps: of generation, summed over the packs.
        largest_tokens: of the largest pack, answers included.
        text_bytes: of questions and answers as predictions.jsonl holds them.
        times: how often they are answered.
        picture_bytes, picture_seconds: of the pictures that are saved for the report.
    """

    name: str
    work: Work
    steps: float
    largest_tokens: float
    text_bytes: float
    times: int
    picture_bytes: float = 0.0
    picture_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageLoad:
    """Some images and their sizes; they add up.

    Attributes:
        count: images.
        visual, visual_squares: their visual tokens, and the sum of the squares.
    """

    count: int = 0
    visual: float = 0.0
    visual_squares: float = 0.0

    def __add__(self, other: ImageLoad) -> ImageLoad:
        squares = self.visual_squares + other.visual_squares
        return ImageLoad(self.count + other.count, self.visual + other.visual, squares)

    @property
    def work(self) -> Work:
        """As work of the vision tower, one call per image."""
        return Work(packs=self.count, images=self.count, visual=self.visual, visual_squares=self.visual_squares)


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The forward and backward passes of a run.

    Attributes:
        schedule: steps of the training.
        epoch: the work of one epoch.
        evaluation: that of one evaluation loss; None for none.
        validation: what is answered at each evaluation.
        final: what the final evaluation answers.
        longest_tokens: of the longest question with its image: no pack can be smaller.
        done_steps: of a resumed run.
    """

    schedule: Schedule
    epoch: EpochWork
    evaluation: EpochWork | None = None
    validation: tuple[AnsweringWork, ...] = ()
    final: tuple[AnsweringWork, ...] = ()
    longest_tokens: int = 0
    done_steps: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps that are still to come."""
        return self.schedule.total_steps - self.done_steps

    @property
    def epochs(self) -> float:
        """Passes over the data that are still to come."""
        return self.steps / self.schedule.steps_per_epoch

    @property
    def evaluations(self) -> int:
        """Evaluations that are still to come."""
        return sum(step > self.done_steps for step in self.schedule.evaluation_steps())

    @property
    def answering(self) -> tuple[AnsweringWork, ...]:
        """All that is answered by generation."""
        return (*self.validation, *self.final)


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How the images of a run are prepared, and what of them is kept on disk.

    Attributes:
        training: images of the training, of its evaluations, too.
        to_process: images of training and evaluation loss that no processor has seen yet.
        to_encode: images of the training whose vision features are not kept yet.
        benchmarks: images of the final evaluation alone.
        processing_seconds: of one image on a CPU; 0 where that is over.
        keep_processed: processed images are kept on disk.
        keep_features: vision features are kept in training.
        keep_benchmark_features: the same in the final evaluation.
    """

    training: ImageLoad = ImageLoad()
    to_process: ImageLoad = ImageLoad()
    to_encode: ImageLoad = ImageLoad()
    benchmarks: ImageLoad = ImageLoad()
    processing_seconds: float = 0.0
    keep_processed: bool = True
    keep_features: bool = False
    keep_benchmark_features: bool = False


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What a run writes besides its images, and to whom it reports.

    Attributes:
        saving: when checkpoints are written.
        optim, logging_steps: as in the recipe.
        tensorboard: whether TensorBoard's file is written.
        trackers: how many others are started.
        written_bytes: what the run has added to the disk already.
    """

    saving: Saving
    optim: str
    logging_steps: int
    tensorboard: bool
    trackers: int = 0
    written_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class ForecastInputs:
    """All that the forecast of a run follows from.

    Attributes:
        setting: model, adapter, device and ranks.
        passes, images, output: what is computed, prepared and written.
        process_bytes: memory of the process before the model is loaded (on a CPU); 0 on a GPU.
    """

    setting: Setting
    passes: PassPlan
    images: ImagePlan
    output: OutputPlan
    process_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """Operations of the training steps, on all devices, the vision tower included."""
        setting, work = self.setting, self.passes.epoch.total.times(self.passes.epochs)
        language = training_flops(setting.model, work, setting.adapter, setting.checkpointing)
        encoded = self.images.to_encode.work if self.images.keep_features else work
        return language + tower_flops(setting.model, encoded.visual, encoded.visual_squares)

    def with_setting(self, **changes: object) -> ForecastInputs:
        """The same run in another setting; arguments as for `Setting`."""
        return replace(self, setting=replace(self.setting, **changes))  # type: ignore[arg-type]

    def with_features(self, training: bool, benchmarks: bool) -> ForecastInputs:
        """The same run with vision features kept, or not, in the training and for the benchmarks."""
        images = replace(self.images, keep_features=training, keep_benchmark_features=benchmarks)
        return replace(self, images=images)
