"""The synthetic benchmarks "demo_charts" and "demo_text" as samples.

Picture number `index` of a split, and the questions about it, depend on (kind, split, seed, index) and on nothing else.
So the first 100 of 1,000 samples are the 100 samples that are generated alone, and splits never share a random stream.
A picture is kept as its drawing specification and drawn only when `ImageRef.load` is called. Its key is the SHA-256
of the specification, not of encoded bytes as elsewhere: it then costs no drawing, and no other Pillow changes it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import count as count_from
from random import Random
from typing import Any

from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.demo.chart_questions import chart_questions
from vlm_sft.data.demo.charts import random_chart
from vlm_sft.data.demo.drawing import draw_chart
from vlm_sft.data.demo.sign_drawing import draw_sign
from vlm_sft.data.demo.sign_questions import sign_questions
from vlm_sft.data.demo.signs import SignSpec, random_sign
from vlm_sft.data.demo.spec import ChartSpec
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.splits import SPLITS

KINDS = ("demo_charts", "demo_text")
CHART_QUESTION_COUNTS = (3, 4, 5, 6)
SIGN_QUESTION_COUNTS = (2, 3, 4)
# Pictures whose questions are held in memory, about 10 kB each: a run asks for the same splits several times.
CACHED_QUESTIONS = 2048
# Encoded pictures held in memory, about 5 kB each: as many as a few batches have.
CACHED_PICTURES = 512


def demo_samples(kind: str, split: str, count: int, seed: int = 0) -> list[Sample]:
    """Generate synthetic questions about synthetic pictures.

    Args:
        kind: "demo_charts" (in the spirit of ChartQA) or "demo_text" (in the spirit of TextVQA).
        split: "train", "validation" or "test"; they share no picture.
        count: number of questions. A picture has 3 to 6 of them (charts) or 2 to 4 (signs); the last may have fewer.
        seed: another seed gives another data set.

    Returns:
        `count` samples; those of one picture follow each other and share its `ImageRef`.

    Raises:
        DataError: an unknown kind or split, or a negative count.
    """
    if kind not in KINDS:
        raise DataError(f"unknown synthetic data set {quoted(kind)}", f"use one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise DataError(f"{kind} has no split {quoted(split)}", f"use one of {', '.join(SPLITS)}")
    if count < 0:
        raise DataError(f"{kind}: {count} questions cannot be generated", "ask for 0 or more")
    samples: list[Sample] = []
    for index in count_from():
        if len(samples) >= count:
            break
        for sample in _picture_samples(kind, split, index, seed):
            name = f"{_prefix(kind, split, seed)}/{len(samples):06d}"
            samples.append(replace(sample, id=name, metadata=dict(sample.metadata)))
    return samples[:count]


def spec_key(spec: ChartSpec | SignSpec) -> str:
    """SHA-256 hex digest of a specification, the stable identity of its picture."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=CACHED_PICTURES)
def render_png(spec: ChartSpec | SignSpec) -> bytes:
    """Draw a picture and encode it; equal specifications give equal bytes on one version of Pillow and numpy."""
    image = draw_chart(spec) if isinstance(spec, ChartSpec) else draw_sign(spec)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _prefix(kind: str, split: str, seed: int) -> str:
    """Beginning of sample ids; seed 0 is the benchmark and is not named."""
    return f"{kind}/{split}" if seed == 0 else f"{kind}/{split}-seed{seed}"


def picture_stream(kind: str, split: str, index: int, seed: int = 0) -> Random:
    """The source of randomness of picture number `index` of a split, and of its questions."""
    # Python seeds from a string through SHA-512, whatever PYTHONHASHSEED says.
    return Random(f"{kind}/{split}/{seed}/{index}")


@lru_cache(maxsize=CACHED_QUESTIONS)
def _picture_samples(kind: str, split: str, index: int, seed: int) -> tuple[Sample, ...]:
    """The samples of one picture, still without their ids."""
    return tuple(_drawn(kind, split, index, seed))


def _drawn(kind: str, split: str, index: int, seed: int) -> Iterator[Sample]:
    rng = picture_stream(kind, split, index, seed)
    spec: ChartSpec | SignSpec = random_chart(rng) if kind == "demo_charts" else random_sign(rng)
    source = f"synthetic picture {index} of {_prefix(kind, split, seed)}"
    images = (ImageRef(spec_key(spec), source, partial(render_png, spec), spec.width, spec.height),)
    metadata: dict[str, Any]
    if isinstance(spec, ChartSpec):
        for one in chart_questions(spec, rng, rng.choice(CHART_QUESTION_COUNTS)):
            metadata = {"question_type": one.question_type, "answer_type": one.answer_type}
            metadata |= {"chart_type": spec.chart_type, "synthetic": True}
            yield Sample("", kind, one.split, images, one.text, one.answer, (one.answer,), metadata=metadata)
    else:
        for sign in sign_questions(spec, rng, rng.choice(SIGN_QUESTION_COUNTS)):
            metadata = {"question_type": sign.question_type, "sign_type": spec.sign_type, "synthetic": True}
            yield Sample("", kind, "", images, sign.text, sign.target, sign.answers, metadata=metadata)
