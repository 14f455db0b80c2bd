"""What the forecast of a training follows from: plan, questions, what the cache holds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from vlm_sft.data.cache.directory import default_cache_dir
from vlm_sft.data.cache.encoded import record_key
from vlm_sft.data.cache.feature_names import AUTO, OFF
from vlm_sft.data.encode import Encoder, picture_sizes
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.distributed.launch import Launch
from vlm_sft.evaluate.batching import image_counter, plan_packs
from vlm_sft.evaluate.pictures import KEPT_BYTES, scaled_picture
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast.disk import PREDICTION_BYTES, Saving
from vlm_sft.forecast.estimate import Asked, Case, Images
from vlm_sft.forecast.flops import NO_WORK, Work, adapter_of, epoch_work
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.memory import Ranks, feature_bytes
from vlm_sft.forecast.shapes import ModelShape, TextShape, VisionShape, model_shape
from vlm_sft.forecast.time import Setting, tower_seconds
from vlm_sft.model.caches import one_an_image
from vlm_sft.model.gpu import liger
from vlm_sft.model.gpu.flash import gathered_heads
from vlm_sft.model.layout import without_weights
from vlm_sft.model.load import Base
from vlm_sft.planning.cached_items import Kept
from vlm_sft.planning.options import Run
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.validation_plan import ValidationPlan
from vlm_sft.recipe.validation import Schedule

PROMPT_TOKENS = 24  # of a question with its chat template, beside the image
PICTURE_PROBES = 12  # pictures that are scaled down to see how large they become
DISK_SHARE = 0.5  # of the free disk that --feature_cache auto may fill
READ_RATE = 1e9  # bytes of kept features per second


def shape_of(base: Base) -> ModelShape:
    """The sizes of a base model: from its configuration, or counted on a model without weights."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    return model_shape(config.to_dict()) or _counted(config)


def _counted(config: Any) -> ModelShape:
    """The sizes of a model of an unknown family: its modules, built on the device that holds no data."""
    model = without_weights(config)
    text = config.get_text_config()
    decoder = model.get_decoder()
    embedding = model.get_input_embeddings().weight.numel()
    inside = {id(parameter) for parameter in decoder.parameters()}
    language = sum(parameter.numel() for parameter in decoder.parameters()) - embedding
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    heads = text.num_attention_heads
    outside = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and not name.startswith("lm_head")
    ]
    vision = getattr(config, "vision_config", None)
    width = int(getattr(vision, "hidden_size", 0) or 1)
    layers = int(getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0) or 1)
    products = sum(parameter.numel() for _, parameter in outside if parameter.dim() > 1)
    size = getattr(vision, "patch_size", 14)
    patch = int(size[0] if isinstance(size, list | tuple) else size)
    return ModelShape(
        config.model_type,
        TextShape(
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.vocab_size,
            language,
            tied,
        ),
        VisionShape(
            layers, width, products, 0, sum(parameter.numel() for _, parameter in outside), 4, 0, layers, 3 * patch**2
        ),
    )


def setting_of(run: Run, shape: ModelShape, value_bytes: int, rates: Rates, flash: bool) -> Setting:
    """What the time and the memory of a pass depend on, besides its sizes.

    Args:
        run: its recipe, and how its passes are cut where that is decided.
        shape: the base.
        value_bytes: of one number of the computation.
        rates: of one device.
        flash: whether FlashAttention computes the attention.
    """
    return Setting(
        shape,
        adapter_of(run.recipe, shape),
        value_bytes,
        run.checkpointing,
        rates,
        four_bit=run.recipe.load_in_4bit,
        fused=rates.gpu and liger.missing() is None,
        flash_heads=gathered_heads(shape.text.heads, shape.text.kv_heads) if flash else 0,
    )


@dataclass(frozen=True)
class Known:
    """What is known of a run's questions and images before it starts.

    Attributes:
        schedule: its steps.
        images: different ones in the training.
        planner, eval_planner: how questions are packed; `eval_planner` is None when there is no evaluation loss.
        visual, eval_visual: visual tokens of each image, or of several that stand together.
        training_images: samples of training and evaluation, one an image.
        count: tells the visual tokens of an image.
        kept: what the cache holds; None where that cannot be known.
        image_seconds: of processing one image.
        imagined: images that nobody has yet.
    """

    schedule: Schedule
    images: int
    planner: EpochPlanner
    visual: Sequence[int]
    eval_planner: EpochPlanner | None
    eval_visual: Sequence[int]
    training_images: Sequence[Sample]
    count: Callable[[ImageRef], int]
    kept: Kept | None
    image_seconds: float
    imagined: Images = Images()

    @classmethod
    def of_plan(cls, plan: Plan, tasks: Sequence[Task]) -> Known:
        """What the plan of a training says."""
        encoder, evaluation = plan.data.encoder, plan.evaluation
        images = plan.data.image_samples() + (evaluation.image_samples() if evaluation else [])
        final = [task.samples[0] for task in tasks]
        return cls(
            plan.schedule,
            plan.data.distinct_images,
            plan.planner,
            plan.data.visual_tokens,
            plan.eval_planner,
            evaluation.visual_tokens if evaluation else (),
            images,
            _counter(plan, images),
            Kept(plan.engine.root, encoder, plan.base.path),
            image_seconds(encoder, [*final, *images[:2]]),
        )

    def packed(self, tokens: int) -> Known:
        """The same with packs of another size."""
        evaluation = replace(self.eval_planner, tokens_per_pack=tokens) if self.eval_planner else None
        return replace(self, planner=replace(self.planner, tokens_per_pack=tokens), eval_planner=evaluation)


def _counter(plan: Plan, images: Sequence[Sample]) -> Callable[[ImageRef], int]:
    """What tells the visual tokens of an image: as they were counted, else by the size of the image."""
    parts = [part for part in (plan.data, plan.evaluation) if part is not None]
    tokens = [count for part in parts for count in part.visual_tokens]
    counted = {sample.image_key: count for sample, count in zip(images, tokens, strict=True)}
    by_size = image_counter(plan.data.encoder.processor)

    def count(image: ImageRef) -> int:
        if image.key in counted:
            return counted[image.key]
        ((width, height),) = picture_sizes(Sample("", "", "", (image,), "", "", ()))
        return by_size(replace(image, width=width, height=height))

    return count


def case_of(
    run: Run,
    known: Known,
    asked: ValidationPlan | None,
    tasks: Sequence[Task],
    setting: Setting,
    *,
    prepared_already: bool,
    process_bytes: float = 0.0,
    written_bytes: float = 0.0,
    done_steps: int = 0,
) -> Case:
    """Put together what a forecast of a run follows from.

    Args:
        run, asked, tasks: the run, as training knows it before it loads the weights.
        known: its questions and images.
        setting: from `setting_of`.
        prepared_already: the training images are processed and kept.
        process_bytes, written_bytes, done_steps: as in `Case`.
    """
    recipe, schedule, kept = run.recipe, known.schedule, known.kept
    validated = [sample for task in (asked.tasks if asked else []) for sample in task.samples]
    featured = one_an_image([*known.training_images, *validated])
    final = one_an_image([sample for task in tasks for sample in task.samples])
    new_images = [] if prepared_already else one_an_image(known.training_images)
    if kept is not None:
        featured, final = kept.without_features(featured), kept.without_features(final)
        new_images = kept.without_images(new_images)
    first = {record_key(sample.image_key) for sample in featured}
    later = [sample for sample in final if record_key(sample.image_key) not in first]
    engine = run.options.engine
    case = Case(
        setting=setting,
        ranks=Ranks(run.launch.world_size, run.launch.parallel),
        schedule=schedule,
        epoch=epoch_work(known.planner, known.visual),
        evaluation=epoch_work(known.eval_planner, known.eval_visual) if known.eval_planner else None,
        validation=_validation(run, known, asked, done_steps),
        final=tuple(asked_of(task, known.count, run.tokens_per_pack, 2, True) for task in tasks),
        saving=Saving(tuple(schedule.save_steps_list()), recipe.save_total_limit),
        optim=recipe.optim,
        logging_steps=recipe.logging_steps,
        tensorboard="tensorboard" in recipe.report_to,
        trackers=sum(name not in ("none", "tensorboard") for name in recipe.report_to),
        features=False,
        new_images=_images(new_images, known.count) + known.imagined,
        new_features=_images(featured, known.count) + known.imagined,
        new_final=_images(later, known.count),
        prepared=engine.prepared_cache,
        image_seconds=known.image_seconds,
        process_bytes=process_bytes,
        written_bytes=written_bytes,
        done_steps=done_steps,
        longest=max(max(group.questions, default=0) + group.prefix for group in known.planner.lengths),
    )
    free = free_bytes(engine.cache_dir or default_cache_dir())
    if not setting.adapter.frozen_tower or engine.feature_cache == OFF:
        return case
    # The base and its adapter both look at a benchmark's images, so keeping those features pays nearly always.
    return replace(case, features=keeps_features(case, engine.feature_cache, free), final_features=bool(tasks))


def _validation(run: Run, known: Known, asked: ValidationPlan | None, done_steps: int) -> tuple[Asked, ...]:
    """What is answered at each evaluation; guarded benchmarks once more, by the base."""
    if asked is None:
        return ()
    guarded = {guard.name for guard in asked.guards}
    coming = sum(step > done_steps for step in known.schedule.evaluation_steps())
    return tuple(
        asked_of(task, known.count, run.tokens_per_pack, coming + (task.name in guarded), False) for task in asked.tasks
    )


def asked_of(task: Task, count: Callable[[ImageRef], int], budget: int, times: int, pictures: bool) -> Asked:
    """The work of answering one benchmark.

    Args:
        task: the questions.
        count: tells the visual tokens of an image.
        budget: tokens of one forward pass.
        times: how often it is answered.
        pictures: whether pictures are saved for the report.
    """
    packs = plan_packs(task.samples, count, budget)
    works = [answer_work(pack, count) for pack in packs]
    steps = [_answer_steps(pack, task.max_new_tokens) for pack in packs]
    largest = max((work.tokens + work.questions * step for work, step in zip(works, steps, strict=True)), default=0.0)
    texts = sum(
        len((sample.id + sample.question + "".join(sample.answers)).encode())
        + 4 * len(sample.answers)
        + len(sample.target.encode())
        + len(str(sample.metadata.get("question_type", "")))
        for sample in task.samples
    )
    lines = texts + PREDICTION_BYTES * len(task.samples)
    stored, seconds = _pictures(task.samples) if pictures else (0.0, 0.0)
    return Asked(task.name, sum(works, NO_WORK), sum(steps), largest, lines, times, stored, seconds)


def answer_work(pack: Sequence[Sequence[Sample]], count: Callable[[ImageRef], int]) -> Work:
    """The work of the prompts of one pack of an evaluation."""
    visual = [sum(count(image) for image in group[0].images) for group in pack]
    sizes = [
        PROMPT_TOKENS * (1 + len(group)) + tokens + sum(len(sample.question) // 4 for sample in group)
        for group, tokens in zip(pack, visual, strict=True)
    ]
    questions = sum(len(group) for group in pack)
    return Work(
        packs=1,
        tokens=sum(sizes),
        squares=sum(size**2 for size in sizes),
        supervised=questions,
        questions=questions,
        images=len(pack),
        visual=sum(visual),
        visual_squares=sum(tokens**2 for tokens in visual),
    )


def _answer_steps(pack: Sequence[Sequence[Sample]], limit: int) -> int:
    """Steps of generation: the longest answer of the pack with its end, as the data has it."""
    return min(limit, 2 + max(len(sample.target) for group in pack for sample in group) // 2)


def _pictures(samples: Sequence[Sample]) -> tuple[float, float]:
    """Bytes and seconds of the copies that are saved for the report: a few are made and weighed."""
    firsts = one_an_image(samples)
    chosen = firsts[:: max(1, len(firsts) // PICTURE_PROBES)][:PICTURE_PROBES]
    began = time.perf_counter()
    sizes = [len(scaled_picture(sample.images)) for sample in chosen if sample.images]
    seconds = time.perf_counter() - began
    if not sizes:
        return 0.0, 0.0
    mean = float(np.mean(sizes))
    images = min(len(firsts), KEPT_BYTES / mean)
    return mean * images, seconds / len(sizes) * images


def image_seconds(encoder: Encoder, samples: Sequence[Sample]) -> float:
    """Seconds of processing one image, measured on two."""
    chosen = list(samples[:3])
    if not chosen:
        return 0.0
    encoder.process_images(chosen[0])
    began = time.perf_counter()
    for sample in chosen[1:] or chosen:
        encoder.process_images(sample)
    return (time.perf_counter() - began) / len(chosen[1:] or chosen)


def _images(samples: Sequence[Sample], count: Callable[[ImageRef], int]) -> Images:
    tokens = [sum(count(image) for image in sample.images) for sample in samples]
    return Images(len(samples), float(sum(tokens)), float(sum(value**2 for value in tokens)))


def keeps_features(case: Case, budget: int | str, free: float) -> bool:
    """Whether vision features will be kept: what `--feature_cache` decides from measurements, foreseen.

    Args:
        case: the run.
        budget: the value of `--feature_cache`.
        free: bytes on the disk of the cache.
    """
    size = feature_bytes(case.setting, case.new_features.visual)
    if size > (free * DISK_SHARE if budget == AUTO else float(budget)):
        return False
    if budget != AUTO or not case.new_features.count:
        return True
    tower = tower_seconds(case.setting, case.new_features.work)
    looks = case.epochs
    return bool((looks - 1) * tower > (1 + looks) * size / READ_RATE)


def free_bytes(folder: Path) -> float:
    """Bytes free on the disk of a folder that may not exist yet."""
    return float(shutil.disk_usage(_there(folder)).free)


def free_space(output: Path, cache: Path) -> tuple[float, float | None]:
    """Bytes free on the disk of a run's folder, and on that of its cache; None for that where it is the same."""
    same = _there(output).stat().st_dev == _there(cache).stat().st_dev
    return free_bytes(output), None if same else free_bytes(cache)


def _there(folder: Path) -> Path:
    """The innermost folder of a path that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def history_setting(launch: Launch, setting: Setting) -> dict[str, Any]:
    """What else changes the rates of a run: for `calibration.history_key`."""
    return {
        "value_bytes": setting.value_bytes,
        "checkpointing": setting.checkpointing,
        "world_size": launch.world_size,
        "parallel": launch.parallel,
        "dropout": setting.adapter.dropout,
        "targets": [setting.adapter.r, *setting.adapter.targets],
        "train": [setting.adapter.vision, setting.adapter.projector, setting.adapter.everything],
    }
