"""Questions about an image, or several, put to a base and its adapter: one load, one prefix a side."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_sft.common.console import warn
from vlm_sft.common.errors import DataError, ModelError, quoted
from vlm_sft.data.oversized import LengthRule, fit
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample, group_by_image
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.sources.turns import plain_question
from vlm_sft.distributed.launch import quiet_libraries
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.model.adapters import load_adapter
from vlm_sft.model.load import POCKET, find_base, load_model
from vlm_sft.model.saved_adapter import base_of_adapter, recorded_bf16, require_fit


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with its answers; `tuned` is None where there is no adapter.

    An answer that the limit of tokens ended, not the model, says so at its end.
    """

    question: str
    base: str
    tuned: str | None


class Asker:
    """Answers questions with a base and, where there is one, its adapter.

    Args:
        backend: the loaded model, wrapped by the adapter or not.
        adapter: its folder, or None.
        max_new_tokens: limit of an answer in tokens.
        rule: how long a question may be; the images of longer ones are scaled down where it says so.
    """

    def __init__(
        self, backend: SharedPrefixBackend, adapter: Path | None, max_new_tokens: int, rule: LengthRule | None = None
    ) -> None:
        self.backend = backend
        self.rule = rule
        self.tuned = adapter is not None
        self.base_name = backend.base.name
        self.title = f"{self.base_name} and {adapter}" if adapter else self.base_name
        self.max_new_tokens = max_new_tokens
        self._one_at_a_time = threading.Lock()  # the adapter is switched on the one model there is

    def ask(self, images: ImageRef | Sequence[ImageRef], questions: Sequence[str]) -> list[Answer]:
        """Answer questions about one image, or several shown together, from one prefix where the model allows it.

        Args:
            images: checked images. `<image>` in a question says where one stands, as in a plain record; the others
                stand before the question.
            questions: at least one.

        Raises:
            DataError: an image cannot be read, or a question marks more images than there are.
            ModelError: the chat template cannot show an image where a question has it.
        """
        shown = (images,) if isinstance(images, ImageRef) else tuple(images)
        samples = self._fitted([_sample(str(number), shown, text) for number, text in enumerate(questions)])
        with self._one_at_a_time:
            with self.backend.model.disable_adapter() if self.tuned else nullcontext():
                base = self._texts(samples)
            tuned = self._texts(samples) if self.tuned else [None] * len(samples)
        return [Answer(*row) for row in zip(questions, base, tuned, strict=True)]

    def _fitted(self, samples: list[Sample]) -> list[Sample]:
        """Questions as they are put to the model; warns of those that are too long."""
        if self.rule is None or not self.rule.text:
            return samples
        fitted = fit(samples, self.backend.encoder, self.rule, "questions")
        for row in fitted.found:
            said = quoted(samples[int(row.id)].question)
            if row.done == "scaled":
                sizes = ", ".join("{} x {}".format(*size) for size in row.scaled_sizes)
                warn(f"{said}: the pictures are scaled down to {sizes} pixels ({self.rule.name}, --oversized scale)")
            else:
                warn(f"{said}: its {row.tokens:,} tokens are more than {self.rule.name}; it is asked as it is")
        found = {sample.id: sample for sample in fitted.samples}
        return [found.get(sample.id, sample) for sample in samples]

    def _texts(self, samples: list[Sample]) -> list[str]:
        (replies,) = self.backend.answers([group_by_image(samples)], self.max_new_tokens)
        mark = f" … [cut at the limit of {self.max_new_tokens} tokens; --max_new_tokens raises it]"
        texts = {reply.sample.id: reply.text + mark if reply.cut else reply.text for reply in replies}
        return [texts[sample.id] for sample in samples]


def _sample(number: str, images: tuple[ImageRef, ...], text: str) -> Sample:
    """A question as a plain record has it.

    Raises:
        DataError: it marks more images than there are.
    """
    try:
        question, places = plain_question(text, len(images))
    except RowProblem as problem:
        raise DataError(f"{quoted(text)}: {problem.detail}", "show as many images, or leave the marks out") from problem
    return Sample(number, "ask", "", images, question, "", (), places=places)


def open_asker(
    base_model: str | None,
    adapter: Path | None,
    flash_attn: bool = False,
    max_new_tokens: int | None = None,
    allow_other_base: bool = False,
    max_length: int | None = None,
    oversized: str | None = None,
) -> Asker:
    """Load what answers.

    Args:
        base_model: "pocket", a folder or a Hub id; None for the one that the adapter names, or pocket.
        adapter: folder of an adapter, or None. Its prompt and image settings hold for both sides.
        flash_attn: use FlashAttention where it can run.
        max_new_tokens: limit of an answer in tokens; None for that of the prompt settings.
        allow_other_base: the base may be another one than the adapter was trained on.
        max_length, oversized: as in a recipe; None for what travels with the adapter or the base. Nothing is left out.

    Raises:
        ModelError: base or adapter cannot be found or do not fit.
    """
    quiet_libraries()
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ModelError(f"--max_new_tokens {max_new_tokens}: an answer needs one token at least", "pass 1 or more")
    prompt = None
    if adapter is not None:
        base_model = base_of_adapter(adapter, base_model)
        prompt = PromptSettings.find(adapter)
    name = base_model or POCKET
    base = find_base(name, flash_attn=flash_attn, bf16=recorded_bf16(adapter or Path(name)), prompt=prompt)
    for note in base.notes:
        warn(note)  # standard output holds the answer
    if adapter is not None:
        require_fit(adapter, base, allow_other_base)
    model = load_model(base, "cuda:0" if torch.cuda.is_available() else "cpu")
    if adapter is not None:
        model = load_adapter(model, adapter)
    limit = max_new_tokens or base.prompt.max_new_tokens
    rule = LengthRule.recorded(base.prompt, base.context, max_length, oversized)
    return Asker(SharedPrefixBackend(base, model), adapter, limit, rule)
