"""Samples to token ids and image tensors, once per image; text rows to token ids only.

The questions about an image share the beginning of the processor's token sequences: the prefix, which holds the image.
Only the image processor sees the picture, once per image. The placeholder tokens of a picture depend only on its size,
so they come from the processor's sequence for a blank picture of that size, and the questions are spliced into it. Both
shortcuts are checked against the whole processor on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_sft.common.errors import ModelError, SampleError
from vlm_sft.data.boxes import Convention
from vlm_sft.data.chat import TEXT_KEYS, Chat, Message
from vlm_sft.data.conversation import PROBES, conversation, probe_conversation, template_of
from vlm_sft.data.images import pictures_of, sources_of
from vlm_sft.data.processor import apply_pixel_bounds, blamed_on, end_ids, image_token_id, visual_tokens
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import UNPLACEABLE, Sample

ImageSource = Callable[[Sample], dict[str, torch.Tensor]]  # the processor's output for a sample's pictures
# Width and height in pixels of pictures on which the image processor is compared with the whole processor.
_PROBE_SIZES = ((1201, 397), (101, 61), (64, 150))
_SMALL, _LONG = 64, 8  # shortest side in pixels and largest aspect ratio that are used without a trial


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """One question after a shared prefix.

    Attributes:
        sample_id: id of the sample.
        prompt_ids: (Q,) int32, the prompt's tokens after the prefix; never empty.
        answer_ids: (A,) int32, the answer and its end token: the supervised part. Empty without answers.
        weight: weight of these tokens in the training loss.
    """

    sample_id: str
    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of this question in a pack: prompt after the prefix and answer; the end token is only predicted."""
        return len(self.prompt_ids) + max(0, len(self.answer_ids) - 1)


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """One image (or several that belong together, or only an opening text) with all its questions.

    Attributes:
        key: the subject of the questions, see `Sample.subject`.
        prefix_ids: (P,) int32, the tokens that all questions share, image tokens included.
        prefix_types: (P,) int32, the processor's token types of the prefix (1 = image); empty if it has none.
        image_tokens: number of image tokens in the prefix.
        questions: the questions, in the order of the samples.
        tensors: the processor's output for the images (pixel_values, image_grid_thw, …) with batch dimension; empty
            for text rows.
        follows: for each question the index of the one whose sequence, answer included, its prompt continues; -1 for
            none. Empty if there is no such turn.
    """

    key: str
    prefix_ids: np.ndarray
    prefix_types: np.ndarray
    image_tokens: int
    questions: tuple[EncodedQuestion, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False, compare=False)
    follows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Frame:
    """The processor's sequence for a probe question, which shows how the pictures' placeholders expand.

    Attributes:
        ids: (L,) int32, expanded.
        plain: int32, the same conversation not expanded.
        types: (L,) int32 token types; empty if the processor has none.
    """

    ids: np.ndarray
    plain: np.ndarray
    types: np.ndarray


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
        family: as of `boxes.Convention`.

    Raises:
        ModelError: the token that ends an answer, or that stands for an image, is unknown.
    """

    def __init__(
        self, processor: Any, prompt: PromptSettings, stop_ids: Sequence[int] = (), family: Callable[[], str] = str
    ) -> None:
        self.processor = processor
        self.boxes = Convention(family, processor)
        self.tokenizer = processor.tokenizer
        self.prompt = prompt
        self.stop_ids = tuple(stop_ids) or end_ids(self.tokenizer)
        self.chat = Chat(processor, self.stop_ids)
        self.image_token_id = image_token_id(processor)
        self._splice_is_exact: dict[bool, bool] = {}  # by whether images stand behind words
        self._alone_is_exact: bool | None = None
        self._text_is_exact: bool | None = None
        self._tensor_names: tuple[str, ...] = ()
        self._frames: dict[Any, _Frame] = {}
        self._probes: dict[Any, list[np.ndarray]] = {}
        self._tried: set[tuple[tuple[int, int], ...]] = set()
        apply_pixel_bounds(processor, prompt)

    def encode(
        self, samples: Sequence[Sample], with_answers: bool = True, tensors: dict[str, torch.Tensor] | None = None
    ) -> EncodedGroup:
        """Encode all questions of one image.

        Args:
            samples: at least one; all with the same subject, system text and opening.
            with_answers: False omits the answers, for generation.
            tensors: the processor's output for the images if it is available; None processes them.

        Raises:
            DataError: an image cannot be read or processed, or a text cannot be told from a control token.
            ModelError: the chat template does not fit.
        """
        samples = [self._asked(sample) for sample in samples]
        first = samples[0]
        self._require_places(first)
        tensors = self.process_images(first) if tensors is None else tensors
        frame = self._frame(first, tensors) if first.images else None
        conversations = [conversation(sample, self.prompt) for sample in samples]
        texts, plains = zip(*map(self.chat.prompt, conversations), strict=True)
        sequences = [
            self._splice(frame, plain, messages, first) for plain, messages in zip(plains, conversations, strict=True)
        ]
        size = self._prefix_length(first, sequences, plains[0])
        prefix = sequences[0][:size]
        types = np.zeros(0, dtype=np.int32)
        if frame is not None and len(frame.types):
            types = np.zeros(size, dtype=np.int32)
            # Behind the images, where a history may differ from the probe, all tokens are text: type 0.
            known = _common_prefix(frame.ids, prefix)
            types[:known] = frame.types[:known]
        questions = tuple(
            EncodedQuestion(
                sample.id, ids[size:], self.answer_ids(sample, text) if with_answers else ids[:0], sample.weight
            )
            for sample, ids, text in zip(samples, sequences, texts, strict=True)
        )
        image_tokens = int((prefix == self.image_token_id).sum())
        return EncodedGroup(first.subject, prefix, types, image_tokens, questions, tensors)

    def problem(self, sample: Sample) -> SampleError | None:
        """Why a sample cannot be encoded, found without decoding its images; None where nothing is known against it.

        Args:
            sample: a question. Images whose size is not known yet are not judged.
        """
        try:
            sample = self._asked(sample)
            self._require_places(sample)
            if all(image.width for image in sample.images):
                self._try_sizes(sample)
            if self.holds_control(sample):
                self.answer_ids(sample, self.prompt_tokens(sample)[0])
        except SampleError as error:
            return error
        return None

    def holds_control(self, sample: Sample) -> bool:
        """Whether a text of a sample holds the string of a control token of this model."""
        return bool(self.chat.plain.found_in(sample.texts))

    def _require_places(self, sample: Sample) -> None:
        """Refuse a sample whose images this model's chat template would put elsewhere.

        Raises:
            SampleError: it moves one in front of words behind which it stands, or leaves one out.
        """
        if sample.places and not self.chat.keeps_places(conversation(sample, self.prompt)):
            raise SampleError(
                UNPLACEABLE,
                f"{sample.metadata.get('where', sample.id)}: an image stands behind words, and the chat template of "
                f"{type(self.processor).__name__} does not leave it there",
                "use a base model whose chat template takes images between words, or put the images first",
            )

    def _try_sizes(self, sample: Sample) -> None:
        """Process blank pictures of unusual sizes; every size is looked at once.

        Raises:
            SampleError: the processor fails on them.
        """
        sizes = picture_sizes(sample)
        if sizes in self._tried:
            return
        if any(map(self._is_unusual, sizes)):
            self.chat.process(
                probe_conversation(sample, self.prompt),
                [Image.new("RGB", size, "white") for size in sizes],
                sources_of(sample.images),
            )
        self._tried.add(sizes)

    def _is_unusual(self, size: tuple[int, int]) -> bool:
        """Whether a processor might fail on a picture of this width and height: it is small, long, or refused."""
        if min(size) < _SMALL or max(size) > _LONG * min(size):
            return True
        try:
            visual_tokens(self.processor, *size)
        except SampleError:
            return True
        return False

    @property
    def images_alone(self) -> bool | None:
        """True when `process_images` needs no tokenizer, which must not run in two threads at once; None: unknown."""
        return self._alone_is_exact

    def process_images(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What the processor makes of a sample's pictures (pixel_values, image_grid_thw, …), batch dimension kept.

        Raises:
            DataError: an image cannot be read or processed.
        """
        if not sample.images:
            return {}
        pictures = pictures_of(sample.images)
        if self._alone_is_exact:
            with blamed_on(sources_of(sample.images), self.processor.image_processor):
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
        whole = self.chat.process(probe_conversation(sample, self.prompt), pictures, sources_of(sample.images))
        return {name: torch.as_tensor(value) for name, value in whole.items() if name not in TEXT_KEYS}

    def _process_alone(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the image processor makes of pictures, with the settings that the processor gives it."""
        settings = {**getattr(self.processor, "images_kwargs", {}), "return_tensors": "pt"}
        alone = self.processor.image_processor(images=[pictures], **settings)
        return {name: torch.as_tensor(alone[name]) for name in self._tensor_names if name in alone}

    def _is_same(self, tensors: dict[str, torch.Tensor], pictures: list[Image.Image]) -> bool:
        """Whether the image processor alone makes these tensors of these pictures."""
        alone = self._process_alone(pictures)
        return alone.keys() == tensors.keys() and all(torch.equal(alone[name], tensors[name]) for name in tensors)

    def _frame(self, sample: Sample, tensors: dict[str, torch.Tensor]) -> _Frame:
        """The expanded sequence of a probe question for pictures of these sizes; made once a size (Qwen: a grid).

        One whose pictures stand behind words of a sample is of use to its group alone, and not kept.
        """
        grid = tensors.get("image_grid_thw")
        sizes = picture_sizes(sample) if grid is None else ()
        key = (sample.system, len(sample.images), sizes, None if grid is None else tuple(grid.flatten().tolist()))
        frame = None if sample.places else self._frames.get(key)
        if frame is None:
            blank = [Image.new("RGB", size, "white") for size in sizes or picture_sizes(sample)]
            probe = probe_conversation(sample, self.prompt)
            whole = self.chat.process(probe, blank, sources_of(sample.images))
            types = whole.get("mm_token_type_ids", whole.get("token_type_ids"))
            if types is None and grid is not None:  # M-RoPE needs them (Cosmos 3 Edge's processor gives them on demand)
                types = (whole["input_ids"] == self.image_token_id).int()
            frame = _Frame(
                whole["input_ids"][0].numpy().astype(np.int32),
                self.chat.prompt(probe)[1],
                np.zeros(0, dtype=np.int32) if types is None else types[0].numpy().astype(np.int32),
            )
            if not sample.places:
                self._frames[key] = frame
        return frame

    def _asked(self, sample: Sample) -> Sample:
        """A sample as the model is asked it."""
        return sample if sample.boxes is None else self.boxes.written(sample)

    def prompt_text(self, sample: Sample) -> str:
        """Render the conversation up to the place where the answer begins."""
        return self.chat.render(conversation(self._asked(sample), self.prompt))

    def has_ordinary_prompt(self, sample: Sample) -> bool:
        """Whether any program that tokenises `prompt_text` gets the tokens of training."""
        return self.chat.is_ordinary(conversation(self._asked(sample), self.prompt))

    def prompt_tokens(self, sample: Sample) -> tuple[str, np.ndarray]:
        """The conversation up to the place where the answer begins: text, and tokens before images are expanded."""
        return self.chat.prompt(conversation(self._asked(sample), self.prompt))

    def answer_ids(self, sample: Sample, prompt: str = "") -> np.ndarray:
        """Tokens of the answer and its end token, (A,) int32: what is supervised, and nothing else.

        Args:
            sample: the question with its answer.
            prompt: its rendered prompt, where that is known already.
        """
        sample = self._asked(sample)
        ids = self.chat.answer(conversation(sample, self.prompt), sample.target, prompt)
        stops = np.nonzero(np.isin(ids, self.stop_ids))[0]
        if len(stops):
            return ids[: stops[0] + 1]
        return np.append(ids, np.int32(self.stop_ids[0]))

    def _splice(self, frame: _Frame | None, plain: np.ndarray, messages: list[Message], sample: Sample) -> np.ndarray:
        """The processor's sequence for a question about the pictures of a frame (or none), none processed."""
        if frame is None:
            if self._text_is_exact is None:
                self._text_is_exact = np.array_equal(plain, self._exact(messages, sample))
            return plain if self._text_is_exact else self._exact(messages, sample)
        placed = bool(sample.places)
        if self._splice_is_exact.get(placed, True):
            rest = len(frame.plain) - _common_prefix(frame.plain, plain)
            unchanged = _common_prefix(frame.ids[::-1], frame.plain[::-1])
            if rest <= unchanged:
                spliced = np.concatenate([frame.ids[: len(frame.ids) - rest], plain[len(frame.plain) - rest :]])
                if placed not in self._splice_is_exact:
                    self._splice_is_exact[placed] = np.array_equal(spliced, self._exact(messages, sample))
                if self._splice_is_exact[placed]:
                    return spliced
        return self._exact(messages, sample)

    def _exact(self, messages: list[Message], sample: Sample) -> np.ndarray:
        """The processor's own sequence, (L,) int32."""
        return (
            self.chat.process(messages, pictures_of(sample.images), sources_of(sample.images))["input_ids"][0]
            .numpy()
            .astype(np.int32)
        )

    def _probe_tokens(self, sample: Sample) -> list[np.ndarray]:
        """Tokens of the sample's conversation with each probe for a question, not expanded."""
        key = (sample.system, len(sample.images), template_of(self.prompt, sample.dataset))
        kept = not (sample.history or sample.places)
        if not kept or key not in self._probes:
            asked = [conversation(sample, self.prompt, sample.opening_words + probe) for probe in PROBES]
            found = [self.chat.prompt(messages)[1] for messages in asked]
            if not kept:
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
        size = max(size, 1)  # a template may begin with a text row's own words, which the group's texts have in common
        if (sequences[0][size:] == self.image_token_id).any():
            raise ModelError(
                "the chat template puts the image after the question, so no prefix can be shared",
                "move the image before the text in the chat template",
            )
        return size


def picture_sizes(sample: Sample) -> tuple[tuple[int, int], ...]:
    """Width and height of a sample's images in pixels; those that no check has measured are decoded."""
    return tuple(
        (image.width, image.height) if image.width else pictures_of([image])[0].size for image in sample.images
    )
