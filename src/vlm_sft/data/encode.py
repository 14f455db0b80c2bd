"""Samples to token ids and image tensors, once an image. Imports the processor's library; no model.

The questions of one image share the beginning of the processor's own token sequences: the prefix, which holds the
image. Pictures go through the image processor alone, once an image; the placeholder tokens of a picture depend on its
size only, so they are taken from the processor's sequence for a blank picture of that size, and the questions are
spliced into it. Both short cuts are checked against the processor itself the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_sft.data.images import decode_rgb, read_bytes
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.data.sources.spec import is_own
from vlm_sft.errors import ModelError

# Two user texts that share no first token: what their sequences share is the part before the question.
_PROBES = ("A", "9")
# Width and height in pixels of pictures on which the image processor alone is held against the whole processor.
_PROBE_SIZES = ((1201, 397), (101, 61), (64, 150))


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """One question behind a shared prefix.

    Attributes:
        sample_id: id of the sample.
        prompt_ids: (Q,) int32, the prompt's tokens after the prefix; never empty.
        answer_ids: (A,) int32, the answer and its end token: the supervised part. Empty when only a prompt was asked.
    """

    sample_id: str
    prompt_ids: np.ndarray
    answer_ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of this question in a pack: prompt after the prefix and answer; the end token is only predicted."""
        return len(self.prompt_ids) + max(0, len(self.answer_ids) - 1)


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One image (or several that belong together) with all its questions.

    Attributes:
        key: key of the images.
        prefix_ids: (P,) int32, the tokens that all questions share, image tokens included.
        prefix_types: (P,) int32, the processor's token types of the prefix (1 = image), or empty where it has none.
        image_tokens: how many of the prefix tokens are image tokens.
        questions: the questions, in the order of the samples.
        tensors: what the processor made of the images (pixel_values, image_grid_thw, …), batch dimension kept.
    """

    key: str
    prefix_ids: np.ndarray
    prefix_types: np.ndarray
    image_tokens: int
    questions: tuple[EncodedQuestion, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The processor's sequence for a probe question: how the pictures' placeholders are expanded.

    Attributes:
        ids: (L,) int32, expanded.
        plain: int32, the same conversation not expanded.
        types: (L,) int32 token types, or empty where the processor has none.
    """

    ids: np.ndarray
    plain: np.ndarray
    types: np.ndarray


TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """Number of leading tokens that are equal."""
    size = min(len(left), len(right))
    different = np.nonzero(left[:size] != right[:size])[0]
    return int(different[0]) if len(different) else size


class Encoder:
    """Turns the samples of one image into an `EncodedGroup`.

    Args:
        processor: a Hugging Face processor with a chat template.
        prompt: prompt and image settings; pixel bounds are applied to the processor's image processor.
        stop_ids: token ids that end an answer (the generation config's eos ids); the tokenizer's eos when empty.

    Attributes:
        image_source: asked first for the tensors of a sample's pictures; None, or its answer None, means that they are
            processed here.
    """

    def __init__(self, processor: Any, prompt: PromptSettings, stop_ids: Sequence[int] = ()) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.prompt = prompt
        self.stop_ids = tuple(stop_ids) or (int(self.tokenizer.eos_token_id),)
        self.image_token_id = _image_token_id(processor)
        self.image_source: Callable[[Sample], dict[str, torch.Tensor] | None] | None = None
        self._splice_is_exact: bool | None = None
        self._alone_is_exact: bool | None = None
        self._tensor_names: tuple[str, ...] = ()
        self._frames: dict[Any, _Frame] = {}
        self._probes: dict[Any, list[np.ndarray]] = {}
        apply_pixel_bounds(processor, prompt)

    def encode(
        self, samples: Sequence[Sample], with_answers: bool = True, tensors: dict[str, torch.Tensor] | None = None
    ) -> EncodedGroup:
        """Encode all questions of one image.

        Args:
            samples: at least one; all with the same images.
            with_answers: False leaves the answers out, for generation.
            tensors: what `image_tensors` gave for them, where that is at hand.

        Raises:
            DataError: an image cannot be read.
            ModelError: the chat template does not fit.
        """
        first = samples[0]
        tensors = self.image_tensors(first) if tensors is None else tensors
        frame = self._frame(first, tensors)
        texts = [self.prompt_text(sample) for sample in samples]
        plains = [self._tokenize(text) for text in texts]
        sequences = [self._splice(frame, plain, text, first) for plain, text in zip(plains, texts, strict=True)]
        size = self._prefix_length(first, sequences, plains[0])
        prefix = sequences[0][:size]
        types = np.zeros(size if len(frame.types) else 0, dtype=np.int32)
        # Behind the images, where a history may differ from the probe, all tokens are text: type 0.
        known = min(len(types), _common_prefix(frame.ids, prefix))
        types[:known] = frame.types[:known]
        questions = tuple(
            EncodedQuestion(sample.id, ids[size:], self.answer_ids(sample, text) if with_answers else ids[:0])
            for sample, ids, text in zip(samples, sequences, texts, strict=True)
        )
        image_tokens = int((prefix == self.image_token_id).sum())
        return EncodedGroup(first.image_key, prefix, types, image_tokens, questions, tensors)

    def image_tensors(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What the processor makes of a sample's pictures (pixel_values, image_grid_thw, …), batch dimension kept.

        Raises:
            DataError: an image cannot be read.
        """
        found = self.image_source(sample) if self.image_source is not None else None
        return self.process_images(sample) if found is None else found

    @property
    def images_alone(self) -> bool:
        """True when `process_images` needs no tokenizer, which must not run in two threads at once."""
        return self._alone_is_exact is not False

    def process_images(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Run the image processor on a sample's pictures, whatever `image_source` has.

        Raises:
            DataError: an image cannot be read.
        """
        pictures = _pictures(sample)
        if self._alone_is_exact:
            return self._process_alone(pictures)
        tensors = self._process_whole(sample, pictures)
        if self._alone_is_exact is None:
            self._tensor_names = tuple(tensors)
            # One picture may look the same in both and another not: some processors cut images into tiles, or round
            # their sizes, in their own call only.
            shapes = [[Image.new("RGB", size, "white")] * len(pictures) for size in _PROBE_SIZES]
            self._alone_is_exact = self._is_same(tensors, pictures) and all(
                self._is_same(self._process_whole(sample, blank), blank) for blank in shapes
            )
        return tensors

    def _process_whole(self, sample: Sample, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the processor makes of pictures in a conversation like the sample's, without the text."""
        whole = self._process(self._probe_text(sample), pictures)
        return {name: value for name, value in whole.items() if name not in TEXT_KEYS}

    def _process_alone(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the image processor makes of pictures, with the settings that the processor gives it."""
        settings = {**getattr(self.processor, "images_kwargs", {}), "return_tensors": "pt"}
        alone = self.processor.image_processor(images=[pictures], **settings)
        return {name: torch.as_tensor(alone[name]) for name in self._tensor_names if name in alone}

    def _is_same(self, tensors: dict[str, torch.Tensor], pictures: list[Image.Image]) -> bool:
        """Whether the image processor alone makes these tensors of these pictures."""
        alone = self._process_alone(pictures)
        return alone.keys() == tensors.keys() and all(torch.equal(alone[name], tensors[name]) for name in tensors)

    def _probe_text(self, sample: Sample) -> str:
        """A conversation with the sample's pictures and system text, and nothing else of its own."""
        bare = replace(sample, history=())
        return self._render(self._messages(bare, _PROBES[0]), add_generation_prompt=True)

    def _frame(self, sample: Sample, tensors: dict[str, torch.Tensor]) -> _Frame:
        """The expanded sequence of a probe question for pictures of these sizes; made once a size (Qwen: a grid)."""
        grid = tensors.get("image_grid_thw")
        sizes = picture_sizes(sample) if grid is None else ()
        key = (sample.system, len(sample.images), sizes, None if grid is None else tuple(grid.flatten().tolist()))
        if key not in self._frames:
            blank = [Image.new("RGB", size, "white") for size in sizes or picture_sizes(sample)]
            text = self._probe_text(sample)
            whole = self._process(text, blank)
            types = whole.get("mm_token_type_ids", whole.get("token_type_ids"))
            self._frames[key] = _Frame(
                whole["input_ids"][0].numpy().astype(np.int32),
                self._tokenize(text),
                np.zeros(0, dtype=np.int32) if types is None else types[0].numpy().astype(np.int32),
            )
        return self._frames[key]

    def prompt_text(self, sample: Sample) -> str:
        """Render the conversation up to the place where the answer begins."""
        return self._render(self._messages(sample, sample.question), add_generation_prompt=True)

    def answer_ids(self, sample: Sample, prompt: str = "") -> np.ndarray:
        """Tokens of the answer and its end token, (A,) int32: what is supervised, and nothing else.

        Args:
            sample: the question with its answer.
            prompt: its `prompt_text`, where that is known already.
        """
        messages = self._messages(sample, sample.question)
        prompt = prompt or self._render(messages, add_generation_prompt=True)
        answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}]
        whole = self._render(answered, add_generation_prompt=False)
        text = whole[len(prompt) :] if whole.startswith(prompt) else sample.target
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        stops = np.nonzero(np.isin(ids, self.stop_ids))[0]
        if len(stops):
            return ids[: stops[0] + 1]
        return np.append(ids, np.int32(self.stop_ids[0]))

    def _messages(self, sample: Sample, question: str) -> list[dict[str, Any]]:
        """The conversation in the chat format; the images stand before the first user text."""
        messages: list[dict[str, Any]] = []
        system = sample.system or self.prompt.system
        if system:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        turns = [(turn.role, turn.text) for turn in sample.history]
        turns.append(("user", self.prompt.fill(question, is_own(sample.dataset))))
        pictures: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
        for role, text in turns:
            content = [{"type": "text", "text": text}]
            if role == "user":
                content, pictures = [*pictures, *content], []
            messages.append({"role": role, "content": content})
        return messages

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Apply the processor's chat template."""
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything
            raise ModelError(
                f"the chat template of {type(self.processor).__name__} cannot render a question: {error}",
                "use an instruct model, or put a chat_template.jinja into the model folder",
            ) from error

    def _process(self, text: str, pictures: list[Any]) -> dict[str, torch.Tensor]:
        """Run the processor itself on one conversation."""
        return dict(self.processor(text=[text], images=[pictures], return_tensors="pt"))

    def _tokenize(self, text: str) -> np.ndarray:
        """Tokens of a conversation whose image placeholders are not expanded."""
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int32)

    def _splice(self, frame: _Frame, plain: np.ndarray, text: str, sample: Sample) -> np.ndarray:
        """The processor's sequence for a question about the pictures of a frame, without processing them."""
        if self._splice_is_exact is not False:
            rest = len(frame.plain) - _common_prefix(frame.plain, plain)
            unchanged = _common_prefix(frame.ids[::-1], frame.plain[::-1])
            if rest <= unchanged:
                spliced = np.concatenate([frame.ids[: len(frame.ids) - rest], plain[len(frame.plain) - rest :]])
                if self._splice_is_exact is None:
                    self._splice_is_exact = np.array_equal(spliced, self._exact(text, sample))
                if self._splice_is_exact:
                    return spliced
        return self._exact(text, sample)

    def _exact(self, text: str, sample: Sample) -> np.ndarray:
        """The processor's own sequence, (L,) int32."""
        return self._process(text, _pictures(sample))["input_ids"][0].numpy().astype(np.int32)

    def _probe_tokens(self, sample: Sample) -> list[np.ndarray]:
        """Tokens of the sample's conversation with each probe for a question, not expanded."""
        key = (sample.system, len(sample.images), is_own(sample.dataset))
        if sample.history or key not in self._probes:
            found = [
                self._tokenize(self._render(self._messages(sample, probe), add_generation_prompt=True))
                for probe in _PROBES
            ]
            if sample.history:
                return found
            self._probes[key] = found
        return self._probes[key]

    def _prefix_length(self, sample: Sample, sequences: list[np.ndarray], plain: np.ndarray) -> int:
        """Number of leading tokens that belong to the image and the template, not to a question."""
        probes = self._probe_tokens(sample)
        expansion = len(sequences[0]) - len(plain)
        size = min(_common_prefix(*probes), *(_common_prefix(plain, probe) for probe in probes)) + expansion
        size = min([size, *(_common_prefix(sequences[0], other) for other in sequences[1:])])
        size = min(size, min(len(ids) for ids in sequences) - 1)
        if (sequences[0][size:] == self.image_token_id).any():
            raise ModelError(
                "the chat template puts the image behind the question, so no prefix can be shared",
                "move the image before the text in the chat template",
            )
        return size


def _pictures(sample: Sample) -> list[Image.Image]:
    """Read and decode a sample's images.

    Raises:
        DataError: one cannot be read or decoded.
    """
    return [_picture(image) for image in sample.images]


def _picture(image: ImageRef) -> Image.Image:
    return decode_rgb(read_bytes(image), image.source)


def picture_sizes(sample: Sample) -> tuple[tuple[int, int], ...]:
    """Width and height of a sample's images in pixels; those that no check has measured are decoded."""
    return tuple((image.width, image.height) if image.width else _picture(image).size for image in sample.images)


def _image_token_id(processor: Any) -> int:
    """The id of the token that stands for one visual token."""
    # The tokenizer first: in Gemma 3 the processor's own token marks where an image begins.
    named = [getattr(owner, "image_token_id", None) for owner in (processor.tokenizer, processor)]
    token = getattr(processor, "image_token", None)
    if token is not None:
        named.append(processor.tokenizer.convert_tokens_to_ids(str(token)))
    found = next((value for value in named if isinstance(value, int)), None)
    if found is None:
        raise ModelError(f"{type(processor).__name__} names no image token", "use an image-text-to-text model")
    # Molmo 2 replaces its image token by others, of which the first stands for a visual token.
    expanded = [value for value in getattr(processor, "image_token_ids", ()) if isinstance(value, int)]
    return found if found in expanded or len(expanded) < 2 else expanded[0]


def apply_pixel_bounds(processor: Any, prompt: PromptSettings) -> None:
    """Set the bounds of the image area on processors that resize by area (Qwen: `size.shortest_edge/longest_edge`).

    Raises:
        ModelError: bounds were asked for and the processor has no such setting.
    """
    if prompt.min_pixels is None and prompt.max_pixels is None:
        return
    images = processor.image_processor
    size = getattr(images, "size", None)
    keys = dict(size) if size is not None else {}
    edges = {key: value for key, value in keys.items() if value is not None}
    if hasattr(images, "merge_size") and {"shortest_edge", "longest_edge"} <= set(edges):
        low = prompt.min_pixels or edges["shortest_edge"]
        high = prompt.max_pixels or edges["longest_edge"]
        images.size = {"shortest_edge": min(low, high), "longest_edge": high}
        return
    raise ModelError(
        f"{type(images).__name__} has no bounds on an image's area, so max_pixels cannot be applied",
        "leave out --max_pixels and --min_pixels for this model",
    )


def group_by_image(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Put the questions of one image together, images in the order of their first question.

    A system text stands before the image, so samples with different ones are not put together; a conversation's
    history stands behind it.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.image_key, sample.system), []).append(sample)
    return list(groups.values())
