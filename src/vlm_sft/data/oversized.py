"""Samples that are longer than a limit: kept, left out, or their images scaled down until they fit.

A sample is as long as the sequence that it alone would be: conversation, images, question, answer and end token. Its
images are counted by the processor's own arithmetic or by a blank picture of their size, so a picture that is too large
is known before it is processed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from vlm_sft.common.errors import QUOTED_CHARACTERS, SampleError, bounded
from vlm_sft.data.audit import check_images
from vlm_sft.data.encode import Encoder
from vlm_sft.data.image_tokens import grid_tensors
from vlm_sft.data.images import scaled
from vlm_sft.data.processor import visual_tokens
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import OVERSIZED, UNSCALABLE, LeftOut, Sample

Policy = Literal["keep", "leave_out", "scale"]
KEEP, LEAVE_OUT, SCALE = "keep", "leave_out", "scale"
_TEMPLATE_TOKENS = 512  # more than a chat template puts around a question
_LEAST_TOKEN_PIXELS = 64  # no known processor makes a token of fewer pixels
_STEPS = 24  # halvings of a scale: to a ten-millionth


@dataclass(frozen=True, slots=True)
class LengthRule:
    """How long a sample may be, and what happens to a longer one.

    Attributes:
        max_length: tokens, as asked for; None for what the model's positions reach.
        context: tokens that the model's positions reach (`max_position_embeddings`); None where it does not say.
        policy: what happens to longer samples.
    """

    max_length: int | None = None
    context: int | None = None
    policy: Policy = "keep"

    @classmethod
    def recorded(
        cls, prompt: PromptSettings, context: int | None, max_length: int | None = None, oversized: str | None = None
    ) -> LengthRule:
        """The rule that travels with an adapter or a model.

        Args:
            prompt: its settings.
            context: as of `LengthRule`.
            max_length, oversized: of a user, which take their places; None leaves them.
        """
        return cls(max_length or prompt.max_length, context, cast(Policy, oversized or prompt.oversized))

    @property
    def text(self) -> str:
        """As flags; "" where nothing is asked for."""
        length = f"--max_length {self.max_length} " if self.max_length else ""
        return f"{length}--oversized {self.policy}" if length or self.policy != KEEP else ""

    @property
    def limit(self) -> int | None:
        """The limit in tokens; None where there is none."""
        return self.max_length or self.context

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on, for the identity of an evaluation; {} where no question is changed."""
        return {"max_length": self.limit, "oversized": self.policy} if self.policy == SCALE else {}

    @property
    def name(self) -> str:
        """The limit in words."""
        asked = self.max_length is not None
        return f"--max_length {self.max_length}" if asked else f"the model's context of {self.context:,} tokens"


@dataclass(frozen=True, slots=True)
class Oversized:
    """One sample that is longer than its limit.

    Attributes:
        id: of the sample.
        part: of the data, in words: "training", "evaluation loss", or a benchmark.
        tokens: its length.
        limit: what it may have.
        done: "kept", "left out" or "scaled".
        sizes: width and height of its images in pixels; `scaled_sizes` after scaling.
    """

    id: str
    part: str
    tokens: int
    limit: int
    done: str
    sizes: tuple[tuple[int, int], ...] = ()
    scaled_sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Fitted:
    """Samples under a rule.

    Attributes:
        samples: those that are used, in order.
        left_out: the others.
        found: every sample that was too long, whatever was done.
    """

    samples: list[Sample]
    left_out: list[LeftOut] = field(default_factory=list)
    found: list[Oversized] = field(default_factory=list)


def fit(samples: Sequence[Sample], encoder: Encoder, rule: LengthRule, part: str) -> Fitted:
    """Apply a rule to samples before anything of them is processed.

    All oversized questions about the same images get them in one size, so they still share them.

    Args:
        samples: of one part of the data; images of unknown size are measured where the rule may change samples.
        encoder: of the model.
        rule: the limit and the policy.
        part: as of `Oversized`.
    """
    limit = rule.limit
    if limit is None or not samples:
        return Fitted(list(samples))
    checked: list[Sample] = list(samples)
    left_out: list[LeftOut] = []
    if rule.policy != KEEP:
        checked, left_out = check_images(samples)
    counter = _Counter(encoder, thorough=rule.policy != KEEP or rule.max_length is not None)
    long = {sample.id: tokens for sample in checked if (tokens := counter.longer(sample, limit))}
    fits = _scaled(checked, long, counter, limit) if rule.policy == SCALE else {}
    kept, found = [], []
    for sample in checked:
        tokens = long.get(sample.id)
        if tokens is None:
            kept.append(sample)
            continue
        fitting = sample if rule.policy == KEEP else fits.get(sample.id)
        done = "left out" if fitting is None else "kept" if fitting is sample else "scaled"
        row = Oversized(sample.id, part, tokens, limit, done, _sizes(sample))
        found.append(row if done != "scaled" else replace(row, scaled_sizes=_sizes(fitting)))
        if fitting is None:
            reason = OVERSIZED if rule.policy == LEAVE_OUT else UNSCALABLE
            left_out.append(LeftOut(sample.id, reason, f"{tokens:,} tokens, more than {rule.name}"))
        else:
            kept.append(fitting)
    return Fitted(kept, left_out, found)


def oversized(lengths: Iterable[tuple[Sample, int]], rule: LengthRule, part: str) -> list[Oversized]:
    """Those of encoded samples that a rule keeps although they are too long.

    Args:
        lengths: samples with their tokens.
        rule, part: as in `fit`.
    """
    limit = rule.limit
    return [
        Oversized(sample.id, part, tokens, limit, "kept", _sizes(sample))
        for sample, tokens in lengths
        if limit is not None and tokens > limit
    ]


def lines(found: Sequence[Oversized], rule: LengthRule, total: int, part: str, file: str = "") -> list[str]:
    """What to warn of, a line for each thing that was done.

    Args:
        found: the samples that are too long.
        rule: that they do not keep to.
        total: how many samples there are.
        part: of the data, in words.
        file: which names them; "" where there is none.
    """
    said = {
        "kept": "are kept, and may not fit into memory (--oversized leave_out|scale)",
        "left out": "are left out",
        "scaled": "have their images scaled down to fit",
    }
    told = []
    for done, what in said.items():
        rows = [one for one in found if one.done == done]
        if not rows:
            continue
        longest = max(rows, key=lambda one: one.tokens)
        named = f"; all are in {file}" if file else ""
        beyond = rule.context is not None and done == "kept" and longest.tokens > rule.context
        reach = f"; the model's positions reach {rule.context:,}" if beyond and rule.max_length is not None else ""
        told.append(
            f"{part}: {len(rows):,} of {total:,} samples are longer than {rule.name} and {what}: {_named(rows)}; "
            f"the longest has {longest.tokens:,} tokens{reach}{named}"
        )
    return told


def _named(rows: Sequence[Oversized]) -> str:
    """The first of some samples by their ids."""
    first = ", ".join(bounded(one.id, QUOTED_CHARACTERS) for one in rows[:3])
    return first if len(rows) <= 3 else f"{first}, …"


def _sizes(sample: Sample | None) -> tuple[tuple[int, int], ...]:
    return tuple((image.width, image.height) for image in sample.images) if sample is not None else ()


def _scaled(samples: Sequence[Sample], long: dict[str, int], counter: _Counter, limit: int) -> dict[str, Sample]:
    """The samples that fit with smaller images, by id; one size for all that are about the same images."""
    by_images: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.id in long and sample.images:
            by_images.setdefault(sample.image_key, []).append(sample)
    fits: dict[str, Sample] = {}
    for members in by_images.values():
        images = None
        for sample in sorted(members, key=lambda one: -long[one.id]):
            if images is None:
                shrunk = counter.shrunk(sample, limit)
                images = shrunk.images if shrunk else None
            if images is not None:
                fits[sample.id] = replace(sample, images=images)
    return fits


class _Counter:
    """Counts the tokens of samples without processing their images.

    Args:
        encoder: of the model.
        thorough: encode a sample whose images no arithmetic counts, which takes long for many.
    """

    def __init__(self, encoder: Encoder, thorough: bool) -> None:
        self.encoder = encoder
        self.thorough = thorough
        self._visual = functools.cache(lambda width, height: visual_tokens(encoder.processor, width, height))

    def longer(self, sample: Sample, limit: int) -> int | None:
        """The tokens of a sample that has more than `limit`; None for any other, and for one that cannot be encoded."""
        template = self.encoder.prompt.template_for(True) + self.encoder.prompt.system
        text = sum(len(part.encode("utf-8", "surrogatepass")) for part in (*sample.texts, template))
        areas = sum(image.width * image.height for image in sample.images)
        if (
            all(image.width for image in sample.images)
            and text + areas // _LEAST_TOKEN_PIXELS + _TEMPLATE_TOKENS <= limit
        ):
            return None
        try:
            visual = self._visual_of(sample)
            if visual is None and not self.thorough:
                return None
            # A processor may put words and marks around the parts of an image.
            if visual is not None and visual + visual // 4 + text + _TEMPLATE_TOKENS <= limit:
                return None
            tokens = self._estimate(sample)
            if tokens is None or tokens <= limit:
                tokens = self._count(sample)
        except SampleError:
            return None
        return tokens if tokens > limit else None

    def shrunk(self, sample: Sample, limit: int) -> Sample | None:
        """The sample with its images scaled down by one factor until it fits; None where they cannot be."""
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._fits(_resized(sample, middle), limit) else (low, middle)
        factor = low
        for _ in range(_STEPS):
            smaller = _resized(sample, factor)
            if not factor or smaller is None:
                return None
            try:
                if self._count(smaller) <= limit:
                    return smaller
            except SampleError:
                return None
            factor *= 0.95
        return None

    def _fits(self, sample: Sample | None, limit: int) -> bool:
        """Whether a sample seems to fit."""
        try:
            if sample is None:
                return True  # no picture is that small, and `shrunk` looks again
            estimate = self._estimate(sample)
            return (self._count(sample) if estimate is None else estimate) <= limit
        except SampleError:
            return False

    def _visual_of(self, sample: Sample) -> int | None:
        """The visual tokens of a sample's images by arithmetic; None where the processor has none."""
        counts = [self._visual(image.width, image.height) for image in sample.images if image.width]
        return None if None in counts or len(counts) < len(sample.images) else sum(filter(None, counts))

    def _estimate(self, sample: Sample) -> int | None:
        """At least as many tokens as this a sample has; None where that is not known without its pictures."""
        visual = self._visual_of(sample)
        if visual is None:
            return None
        text, plain = self.encoder.prompt_tokens(sample)
        return len(plain) - len(sample.images) + visual + len(self.encoder.answer_ids(sample, text))

    def _count(self, sample: Sample) -> int:
        """The tokens of a sample.

        Raises:
            SampleError: it cannot be encoded.
        """
        group = self.encoder.encode([sample], tensors=grid_tensors(self.encoder, sample))
        (question,) = group.questions
        return len(group.prefix_ids) + len(question.prompt_ids) + len(question.answer_ids)


def _resized(sample: Sample, factor: float) -> Sample | None:
    """A sample with its images scaled by a factor; None where nothing would be left of one."""
    sizes = [(math.floor(image.width * factor), math.floor(image.height * factor)) for image in sample.images]
    if not all(min(size) for size in sizes):
        return None
    images = tuple(scaled(image, *size) for image, size in zip(sample.images, sizes, strict=True))
    return replace(sample, images=images)


def to_json(row: Oversized) -> dict[str, Any]:
    """A line of oversized.jsonl."""
    values: dict[str, Any] = {
        "id": row.id,
        "part": row.part,
        "tokens": row.tokens,
        "limit": row.limit,
        "done": row.done,
    }
    values |= {"images": [list(size) for size in row.sizes]} if row.sizes else {}
    return values | ({"scaled_images": [list(size) for size in row.scaled_sizes]} if row.scaled_sizes else {})
