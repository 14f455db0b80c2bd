"""Token counts where no tokenizer or no data is at hand: models of the built-in table, questions that nobody has yet.

Imports data, model.load, forecast and case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vlm_sft.common.console import say
from vlm_sft.common.errors import DataError, ModelError
from vlm_sft.data.encode import group_by_image, picture_sizes
from vlm_sft.data.packing import GroupLengths
from vlm_sft.data.sample import ImageRef, Sample, distinct_images
from vlm_sft.evaluate.batching import image_counter
from vlm_sft.forecast.estimate import Images
from vlm_sft.forecast.image_tokens import qwen_grid
from vlm_sft.forecast.shapes import ModelShape, PublishedModel, find_published
from vlm_sft.planning.forecast_inputs import Known, shape_of
from vlm_sft.planning.options import Run
from vlm_sft.planning.run_plan import find_run_base, planner_over
from vlm_sft.recipe.schema import Recipe
from vlm_sft.recipe.validation import resolve_schedule

PREFIX_TOKENS = 18  # of a chat template around an image
QUESTION_TOKENS, ANSWER_TOKENS = 6, 2  # of a chat template around a question and an answer
CHARACTERS_PER_TOKEN = 4  # of English
IMAGE_SECONDS = 0.02  # of processing one image
_BLANK = ImageRef("", "an imagined image", lambda: b"")
Counter = Callable[[ImageRef], int]


@dataclass(frozen=True)
class Imagined:
    """Questions that nobody has yet.

    Attributes:
        questions, images: how many.
        size: width and height of an image in pixels.
        question_tokens, answer_tokens: of one question.
    """

    questions: int
    images: int
    size: tuple[int, int]
    question_tokens: int
    answer_tokens: int


def known_from_table(
    run: Run, model: PublishedModel, train_samples: Sequence[Sample], eval_samples: Sequence[Sample]
) -> Known:
    """What is known for a Hub model that is not at hand: images by its published bounds, text by its length."""
    count = published_counter(model, run.recipe)
    lengths, visual = _estimated(train_samples, count)
    eval_lengths, eval_visual = _estimated(eval_samples, count)
    planner = planner_over(run, lengths)
    return Known(
        resolve_schedule(run.recipe, planner.steps_per_epoch),
        distinct_images(train_samples),
        planner,
        visual,
        replace(planner, lengths=eval_lengths) if eval_lengths else None,
        eval_visual,
        [*train_samples, *eval_samples],
        count,
        None,
        IMAGE_SECONDS,
    )


def published_counter(model: PublishedModel, recipe: Recipe) -> Counter:
    """What tells the visual tokens of an image for a model of the built-in table."""
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
        answers = [len(sample.target) // CHARACTERS_PER_TOKEN + ANSWER_TOKENS for sample in members]
        asked = [len(sample.question) // CHARACTERS_PER_TOKEN + QUESTION_TOKENS for sample in members]
        both = tuple(question + answer - 1 for question, answer in zip(asked, answers, strict=True))
        lengths.append(GroupLengths(PREFIX_TOKENS + tokens, both, tuple(answers)))
        visual.append(tokens)
    return tuple(lengths), visual


def known_from_numbers(run: Run, asked: Imagined) -> tuple[Known, ModelShape]:
    """What is known of questions that nobody has yet: all images alike, questions dealt evenly; no evaluation.

    Raises:
        DataError: there are fewer questions than images.
        ModelError: the base is neither at hand nor in the table.
    """
    if asked.images < 1 or asked.questions < asked.images:
        raise DataError(
            f"--questions {asked.questions} on --images {asked.images}: every image needs a question",
            "give at least one image, and at least as many questions as images",
        )
    most = run.recipe.max_train
    if most is not None and most < asked.questions:
        fewer = max(1, min(most, round(asked.images * most / asked.questions)))
        asked = replace(asked, questions=most, images=fewer)
    count, shape = _counter_and_shape(run)
    tokens = count(replace(_BLANK, width=asked.size[0], height=asked.size[1]))
    lengths = []
    for index in range(asked.images):
        members = asked.questions // asked.images + (index < asked.questions % asked.images)
        size = asked.question_tokens + asked.answer_tokens - 1
        lengths.append(GroupLengths(PREFIX_TOKENS + tokens, (size,) * members, (asked.answer_tokens,) * members))
    say(
        f"imagined: {asked.questions:,} questions of {asked.question_tokens} tokens with answers of "
        f"{asked.answer_tokens} on {asked.images:,} images of {asked.size[0]} x {asked.size[1]} pixels "
        f"({tokens:,} visual tokens each); evaluations are not counted"
    )
    planner = planner_over(run, tuple(lengths))
    schedule = resolve_schedule(run.recipe, planner.steps_per_epoch)
    images = Images(asked.images, float(tokens * asked.images), float(tokens**2 * asked.images))
    known = Known(
        schedule,
        asked.images,
        planner,
        [tokens] * asked.images,
        None,
        (),
        (),
        count,
        None,
        IMAGE_SECONDS,
        imagined=images,
    )
    return known, shape


def _counter_and_shape(run: Run) -> tuple[Counter, ModelShape]:
    """The counter of visual tokens and the sizes of the base, from the table where it is there."""
    try:
        model = find_published(run.options.base_model)
    except ModelError:
        base = find_run_base(run.options, run.recipe, [])
        return image_counter(base.processor), shape_of(base)
    say(f"{model.name}: sizes from the built-in table ({model.source})")
    return published_counter(model, run.recipe), model.shape
