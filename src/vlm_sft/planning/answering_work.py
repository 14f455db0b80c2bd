"""What answering a benchmark will take: prompts, steps of generation, lines of predictions, saved pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.token_estimate import CAREFUL
from vlm_sft.evaluate.batching import plan_packs, question_tokens
from vlm_sft.evaluate.pictures import KEPT_BYTES, scaled_picture
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast.disk import PREDICTION_BYTES
from vlm_sft.forecast.flops import NO_WORK, Work
from vlm_sft.forecast.inputs import AnsweringWork
from vlm_sft.model.caches import one_an_image

PICTURE_PROBES = 12  # pictures that are scaled down to see how large they become


def answering_work(
    task: Task, count: Callable[[ImageRef], int], budget: int, times: int, pictures: bool, separate: bool = False
) -> AnsweringWork:
    """The work of answering one benchmark.

    Args:
        task: the questions.
        count: gives the visual tokens of an image.
        budget: tokens of one forward pass.
        times: how often it is answered.
        pictures: whether pictures are saved for the report.
        separate: every question is a sequence of its own.
    """
    packs = plan_packs(task.samples, count, budget, separate)
    works = [prompt_work(pack, count, separate) for pack in packs]
    steps = [generation_steps(pack, task.max_new_tokens) for pack in packs]
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
    return AnsweringWork(task.name, sum(works, NO_WORK), sum(steps), largest, lines, times, stored, seconds)


def prompt_work(pack: Sequence[Sequence[Sample]], count: Callable[[ImageRef], int], separate: bool = False) -> Work:
    """The work of the prompts of one pack of an evaluation; `separate` as in `answering_work`."""
    visual = [sum(count(image) for image in group[0].images) for group in pack]
    sizes = [
        CAREFUL.prefix + tokens + sum(map(question_tokens, group)) for group, tokens in zip(pack, visual, strict=True)
    ]
    questions = sum(len(group) for group in pack)
    if separate:
        longest = max(max(map(question_tokens, group)) + seen for group, seen in zip(pack, visual, strict=True))
        sizes = [CAREFUL.prefix + longest] * questions
    return Work(
        packs=1,
        tokens=sum(sizes),
        squares=sum(size**2 for size in sizes),
        supervised=questions,
        questions=questions,
        images=sum(tokens > 0 for tokens in visual),
        visual=sum(visual),
        visual_squares=sum(tokens**2 for tokens in visual),
    )


def generation_steps(pack: Sequence[Sequence[Sample]], limit: int) -> int:
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
