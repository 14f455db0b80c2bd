"""What the forecast of a training follows from: its plan, its questions, and what the cache holds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.cache.encoded import record_key
from vlm_sft.data.encode import Encoder, picture_sizes
from vlm_sft.data.engine_options import OFF
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.evaluate.batching import image_counter
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast.disk import Saving
from vlm_sft.forecast.flops import epoch_work
from vlm_sft.forecast.inputs import AnsweringWork, ForecastInputs, ImageLoad, ImagePlan, OutputPlan, PassPlan
from vlm_sft.forecast.memory import feature_bytes
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.time import tower_seconds
from vlm_sft.model.caches import one_an_image
from vlm_sft.model.feature_choice import FeatureCost
from vlm_sft.planning.answering_work import answering_work
from vlm_sft.planning.cached_items import CachedImages
from vlm_sft.planning.run_plan import Plan, image_uses
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.planning.validation_plan import ValidationPlan
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe

FEATURE_RATE = 1e9  # bytes of kept features per second, to the disk or from it


@dataclass(frozen=True)
class RunData:
    """A run's questions and images, as they are known before it starts.

    Attributes:
        schedule: its steps.
        distinct_images: different ones in the training.
        planner, eval_planner: how questions are packed; `eval_planner` is None without an evaluation loss.
        visual, eval_visual: visual tokens of each image, or of several that stand together.
        train_images, eval_images: one sample per image of the training and of the evaluation loss.
        count: gives the visual tokens of an image.
        cached: what the cache holds; None where that cannot be known.
        image_seconds: of processing one image.
        hypothetical: images without samples.
    """

    schedule: Schedule
    distinct_images: int
    planner: EpochPlanner
    visual: Sequence[int]
    eval_planner: EpochPlanner | None
    eval_visual: Sequence[int]
    train_images: Sequence[Sample]
    eval_images: Sequence[Sample]
    count: Callable[[ImageRef], int]
    cached: CachedImages | None
    image_seconds: float
    hypothetical: ImageLoad = ImageLoad()

    @classmethod
    def of_plan(cls, plan: Plan, tasks: Sequence[Task]) -> RunData:
        """What the plan of a training says."""
        encoder, evaluation = plan.data.encoder, plan.evaluation
        train_images = plan.data.image_samples()
        eval_images = evaluation.image_samples() if evaluation else []
        images = [*train_images, *eval_images]
        return cls(
            plan.schedule,
            plan.data.distinct_images,
            plan.planner,
            plan.data.visual_tokens,
            plan.eval_planner,
            evaluation.visual_tokens if evaluation else (),
            train_images,
            eval_images,
            _counter(plan),
            CachedImages(plan.engine.root, encoder, plan.base.path),
            image_seconds(encoder, [*(task.samples[0] for task in tasks), *images[:2]]),
        )

    @property
    def separate(self) -> bool:
        """Whether every question is a sequence of its own."""
        return self.planner.rows is not None

    def packed(self, tokens: int) -> RunData:
        """The same with packs of another size."""
        evaluation = replace(self.eval_planner, tokens_per_pack=tokens) if self.eval_planner else None
        return replace(self, planner=replace(self.planner, tokens_per_pack=tokens), eval_planner=evaluation)


def _counter(plan: Plan) -> Callable[[ImageRef], int]:
    """A function that gives the visual tokens of an image: as they were counted, else by its size."""
    parts = [part for part in (plan.data, plan.evaluation) if part is not None]
    counted = {sample.image_key: group.image_tokens for part in parts for sample, group, _ in part.samples()}
    by_size = image_counter(plan.data.encoder.processor)

    def count(image: ImageRef) -> int:
        if image.key in counted:
            return counted[image.key]
        ((width, height),) = picture_sizes(Sample("", "", "", (image,), "", "", ()))
        return by_size(replace(image, width=width, height=height))

    return count


def image_seconds(encoder: Encoder, samples: Sequence[Sample]) -> float:
    """Seconds of processing one image, measured on two."""
    chosen = [sample for sample in samples if sample.images][:3]
    if not chosen:
        return 0.0
    encoder.process_images(chosen[0])
    began = time.perf_counter()
    for sample in chosen[1:] or chosen:
        encoder.process_images(sample)
    return (time.perf_counter() - began) / len(chosen[1:] or chosen)


def forecast_inputs(
    run: TrainingRun,
    data: RunData,
    validation: ValidationPlan | None,
    tasks: Sequence[Task],
    setting: Setting,
    *,
    prepared_already: bool,
    process_bytes: float = 0.0,
    written_bytes: float = 0.0,
    done_steps: int = 0,
) -> ForecastInputs:
    """Put together what a forecast of a run follows from.

    Args:
        run, validation, tasks: the run, as training knows it before it loads the weights.
        data: its questions and images.
        setting: from `run_setting.setting_of`.
        prepared_already: the training images are processed and kept.
        process_bytes: as in `ForecastInputs`.
        written_bytes: as in `OutputPlan`.
        done_steps: as in `PassPlan`.
    """
    passes = PassPlan(
        data.schedule,
        epoch_work(data.planner, data.visual),
        epoch_work(data.eval_planner, data.eval_visual) if data.eval_planner else None,
        _validation_work(run, data, validation, done_steps),
        tuple(answering_work(task, data.count, run.tokens_per_pack, 2, True, data.separate) for task in tasks),
        max(max(group.questions, default=0) + group.prefix for group in data.planner.lengths),
        done_steps,
    )
    images = _image_plan(run, data, validation, tasks, setting, prepared_already)
    return ForecastInputs(
        setting, passes, images, _output_plan(run.recipe, data.schedule, written_bytes), process_bytes
    )


def _output_plan(recipe: Recipe, schedule: Schedule, written_bytes: float) -> OutputPlan:
    """What a recipe writes."""
    return OutputPlan(
        Saving(tuple(schedule.save_steps_list()), recipe.save_total_limit),
        recipe.optim,
        recipe.logging_steps,
        "tensorboard" in recipe.report_to,
        sum(name not in ("none", "tensorboard") for name in recipe.report_to),
        written_bytes,
    )


def _validation_work(
    run: TrainingRun, data: RunData, validation: ValidationPlan | None, done_steps: int
) -> tuple[AnsweringWork, ...]:
    """What is answered at each evaluation; guarded benchmarks once more, by the base."""
    if validation is None:
        return ()
    guarded = {guard.name for guard in validation.guards}
    coming = sum(step > done_steps for step in data.schedule.evaluation_steps())
    return tuple(
        answering_work(task, data.count, run.tokens_per_pack, coming + (task.name in guarded), False, data.separate)
        for task in validation.tasks
    )


def _image_plan(
    run: TrainingRun,
    data: RunData,
    validation: ValidationPlan | None,
    tasks: Sequence[Task],
    setting: Setting,
    prepared_already: bool,
) -> ImagePlan:
    """Which images are still to be prepared, and whether their vision features will be kept."""
    uses = image_uses(data.schedule, data.train_images, data.eval_images, validation)
    training = one_an_image([sample for part, _ in uses for sample in part])
    benchmarks = one_an_image([sample for task in tasks for sample in task.samples])
    to_encode, later = training, benchmarks
    to_process = [] if prepared_already else one_an_image([*data.train_images, *data.eval_images])
    if data.cached is not None:
        before = not setting.adapter.frozen_tower
        to_encode, later = (data.cached.without_features(part, before) for part in (training, benchmarks))
        to_process = data.cached.without_images(to_process)
    first = {record_key(sample.image_key) for sample in to_encode}
    later = [sample for sample in later if record_key(sample.image_key) not in first]
    engine, made_up = run.options.engine, data.hypothetical
    plan = ImagePlan(
        _load(training, data.count) + made_up,
        _load(to_process, data.count) + made_up,
        _load(to_encode, data.count) + made_up,
        _load(later, data.count),
        data.image_seconds,
        engine.prepared_cache,
    )
    frozen = setting.adapter.frozen_tower
    divided = setting.ranks.shared_weights > 1  # then a trained projector is not run apart from the model
    if setting.adapter.trained_tower or (divided and not frozen) or engine.feature_cache == OFF:
        return plan
    free = free_bytes(engine.cache_dir or default_cache_dir())

    def kept(load: ImageLoad, images: int, looks: float) -> bool:
        cost = _feature_cost(setting, load)
        return not cost.objection(images, load.count, looks, engine.feature_cache, free)

    looks = sum(len(part) * count for part, count in uses) + made_up.count * data.schedule.epochs
    return replace(
        plan,
        keep_features=kept(plan.to_encode, len(training) + made_up.count, looks),
        # The base and the adapter both look at the images of a benchmark; behind a projector of its own it sees others.
        keep_benchmark_features=frozen
        and bool(tasks)
        and kept(plan.benchmarks, len(benchmarks), 2.0 * len(benchmarks)),
    )


def _feature_cost(setting: Setting, load: ImageLoad) -> FeatureCost:
    """What the features of one of these images cost, as far as it is known before it is measured."""
    images = max(1, load.count)
    size = feature_bytes(setting, load.visual) / images
    return FeatureCost(size, tower_seconds(setting, load.work) / images, size / FEATURE_RATE, size / FEATURE_RATE)


def _load(samples: Sequence[Sample], count: Callable[[ImageRef], int]) -> ImageLoad:
    tokens = [sum(count(image) for image in sample.images) for sample in samples]
    return ImageLoad(len(samples), float(sum(tokens)), float(sum(value**2 for value in tokens)))


def free_bytes(folder: Path) -> float:
    """Bytes free on the disk of a folder that may not exist yet."""
    return float(shutil.disk_usage(_existing(folder)).free)


def free_space(output: Path, cache: Path) -> tuple[float, float | None]:
    """Bytes free on the disk of a run's folder, and on that of its cache; None for that where it is the same."""
    same = _existing(output).stat().st_dev == _existing(cache).stat().st_dev
    return free_bytes(output), None if same else free_bytes(cache)


def _existing(folder: Path) -> Path:
    """The innermost folder of a path that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder
