"""Token counts without a tokenizer or without data: models of the built-in table, and hypothetical data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlm_sft.common.console import say
from vlm_sft.common.errors import DataError, ModelError
from vlm_sft.data.encode import picture_sizes
from vlm_sft.data.engine_options import Rows
from vlm_sft.data.image_tokens import qwen_grid
from vlm_sft.data.packing import GroupLengths
from vlm_sft.data.sample import ImageRef, Sample, distinct_images, group_by_image
from vlm_sft.data.token_estimate import EXPECTED
from vlm_sft.evaluate.batching import image_counter
from vlm_sft.forecast.inputs import ImageLoad
from vlm_sft.forecast.shapes import ModelShape, PublishedModel, find_published
from vlm_sft.model.caches import one_an_image
from vlm_sft.planning.forecast_inputs import RunData
from vlm_sft.planning.options import HypotheticalData
from vlm_sft.planning.run_plan import find_run_base, planner_over
from vlm_sft.planning.run_setting import shape_of
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.recipe.schedule import resolve_schedule
from vlm_sft.recipe.schema import Recipe

IMAGE_SECONDS = 0.02  # of processing one image
_BLANK = ImageRef("", "a hypothetical image", lambda: b"")
Counter = Callable[[ImageRef], int]


def facts_from_table(
    run: TrainingRun, model: PublishedModel, train_samples: Sequence[Sample], eval_samples: Sequence[Sample]
) -> RunData:
    """Count for a Hub model that is not at hand: images by its published bounds, text by its length."""
    count = published_counter(model, run.recipe)
    lengths, visual = _estimated(train_samples, count)
    eval_lengths, eval_visual = _estimated(eval_samples, count)
    planner = planner_over(run, lengths)
    return RunData(
        resolve_schedule(run.recipe, planner.steps_per_epoch),
        distinct_images(train_samples),
        planner,
        visual,
        replace(planner, lengths=eval_lengths) if eval_lengths else None,
        eval_visual,
        one_an_image(train_samples),
        one_an_image(eval_samples),
        count,
        None,
        IMAGE_SECONDS,
    )


def published_counter(model: PublishedModel, recipe: Recipe) -> Counter:
    """A function that gives the visual tokens of an image for a model of the built-in table."""
    high = recipe.max_pixels or model.max_pixels
    low = min(recipe.min_pixels or model.min_pixels, high)

    def tokens(image: ImageRef) -> int:
        ((width, height),) = picture_sizes(Sample("", "", "", (image,), "", "", ()))
        rows, columns = qwen_grid(height, width, model.patch, model.merge, low, high)
        return rows * columns // model.merge**2

    return tokens


def _estimated(samples: Sequence[Sample], count: Counter) -> tuple[tuple[GroupLengths, ...], list[int]]:
    """Token counts without a tokenizer."""
    lengths, visual = [], []
    for members in group_by_image(samples):
        tokens = sum(count(image) for image in members[0].images)
        answers = [EXPECTED.answer + EXPECTED.text(sample.target) for sample in members]
        questions = [EXPECTED.question + EXPECTED.text(sample.question) for sample in members]
        both = tuple(question + answer - 1 for question, answer in zip(questions, answers, strict=True))
        lengths.append(GroupLengths(EXPECTED.prefix + tokens, both, tuple(answers)))
        visual.append(tokens)
    return tuple(lengths), visual


def facts_from_numbers(run: TrainingRun, data: HypotheticalData) -> tuple[RunData, ModelShape]:
    """Make up a data set: all images alike, questions dealt evenly; without an evaluation.

    Raises:
        DataError: there are fewer questions than images.
        ModelError: the base is neither at hand nor in the table.
    """
    image_count = data.questions if data.images is None else data.images
    if image_count < 1 or data.questions < image_count:
        raise DataError(
            f"--questions {data.questions} on --images {image_count}: every image needs a question",
            "give at least one image, and at least as many questions as images",
        )
    questions, most = data.questions, run.recipe.max_train
    if most is not None and most < questions:
        image_count = max(1, min(most, round(image_count * most / questions)))
        questions = most
    count, shape, rows = _sizes_of_base(run)
    width, height = data.image_size
    tokens = count(replace(_BLANK, width=width, height=height))
    lengths = []
    for index in range(image_count):
        members = questions // image_count + (index < questions % image_count)
        size = data.question_tokens + data.answer_tokens - 1
        lengths.append(GroupLengths(EXPECTED.prefix + tokens, (size,) * members, (data.answer_tokens,) * members))
    say(
        f"hypothetical data: {questions:,} questions of {data.question_tokens} tokens with answers of "
        f"{data.answer_tokens} on {image_count:,} images of {width} x {height} pixels "
        f"({tokens:,} visual tokens each); evaluations are not counted"
    )
    planner = planner_over(run, tuple(lengths)).computed_as(rows)
    schedule = resolve_schedule(run.recipe, planner.steps_per_epoch)
    images = ImageLoad(image_count, float(tokens * image_count), float(tokens**2 * image_count))
    visual = [tokens] * image_count
    facts = RunData(schedule, image_count, planner, visual, None, (), (), (), count, None, IMAGE_SECONDS, images)
    return facts, shape


def _sizes_of_base(run: TrainingRun) -> tuple[Counter, ModelShape, Rows | None]:
    """The counter of visual tokens, the sizes of the base, from the table where it is there, and how its packs run."""
    try:
        model = find_published(run.options.base_model)
    except ModelError:
        base = find_run_base(run.options, run.recipe, [])
        return image_counter(base.processor), shape_of(base), base.rows
    say(f"{model.name}: sizes from the built-in table ({model.source})")
    return published_counter(model, run.recipe), model.shape, None  # families of the table share
