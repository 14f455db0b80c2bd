"""The prepared data of one encoder in the cache: images, tokens, vision features.

Pixels depend on the image and the image processor, tokens on the questions too: they are separate entries, so that a
changed question or template processes no image again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_sft.common.console import progress, warn
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.common.record import version_of
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.data.cache.directory import FEATURES, IMAGES, TOKENS, open_entry
from vlm_sft.data.cache.image_tensors import PixelFormat, pack_pixels, unpack_pixels
from vlm_sft.data.cache.store import Record, Store
from vlm_sft.data.cache.team import ALONE, Team
from vlm_sft.data.encode import EncodedGroup, EncodedQuestion, Encoder
from vlm_sft.data.prompt import LENGTH_KEYS
from vlm_sft.data.sample import Sample
from vlm_sft.data.sources.spec import is_own
from vlm_sft.data.threads import ordered_map

_PACKAGES = ("transformers", "torchvision", "pillow", "tokenizers")


class DataCache:
    """Prepared images and tokens of one encoder.

    Args:
        encoder: prepares what is not there.
        root: the cache folder.
        name: of the base model, for `vlm-sft data cache list`.
        team: the ranks that prepare together.
        prepared: False keeps neither images nor tokens, only vision features.
        weights: folder or Hub id of the base model; "" where it is not known.

    Attributes:
        coded: pixels come as 8-bit codes (`unpack_pixels` decodes them), an eighth of the bytes: so they travel to a
            GPU, which decodes them. On a CPU workers decode them beside the training.
    """

    def __init__(
        self, encoder: Encoder, root: Path, name: str, team: Team = ALONE, prepared: bool = True, weights: str = ""
    ) -> None:
        self.encoder = encoder
        self.root = root
        self.name = name
        self.weights = weights
        self.team = team
        self.coded = torch.cuda.is_available()
        self.features: Store | None = None
        self.processed_images = 0
        self.tokenised_groups = 0
        self._images: Store | None = None
        self._tokens: Store | None = None
        self._layout = PixelFormat.of(encoder.processor.image_processor)
        if prepared:
            self._try(self._open_entries)

    def _open_entries(self) -> None:
        self._images = Store(open_entry(self.root, IMAGES, image_settings(self.encoder), self.name))
        self._tokens = Store(open_entry(self.root, TOKENS, token_settings(self.encoder), self.name))

    def _try(self, write: Callable[[], None]) -> None:
        """Run something that writes; where that fails, say so once and go on without writing."""
        try:
            write()
        except (OSError, RunError) as error:
            reason = error.what if isinstance(error, RunError) else str(error)
            effect = "images are processed when they are needed"
            warn(f"prepared data cannot be stored in {self.root}: {reason}; {effect}", any_rank=True)

    def feature_store(self, settings: dict[str, Any]) -> Store:
        """The entry of vision features of one tower.

        Raises:
            RunError: the folder cannot be written.
        """
        mark = weights_fingerprint(self.weights) if self.weights else ""
        return Store(open_entry(self.root, FEATURES, image_settings(self.encoder) | settings, self.name, mark))

    def image_tensors(self, sample: Sample) -> Record:
        """The tensors of a sample's images: features where they are kept, else pixels.

        Raises:
            DataError: an image cannot be read or processed.
        """
        if not sample.images:
            return {}
        features = self.features.get(record_key(sample.image_key)) if self.features is not None else None
        return self.pixel_tensors(sample) if features is None else features

    def pixel_tensors(self, sample: Sample) -> Record:
        """The processor's tensors of a sample's images: kept ones, packed where `coded`, else processed now.

        Raises:
            DataError: an image cannot be read or processed.
        """
        stored = self._images.get(record_key(sample.image_key)) if self._images is not None else None
        if stored is None:
            return self.encoder.process_images(sample)
        return stored if self.coded else unpack_pixels(stored)

    def prepare(self, groups: Sequence[Sequence[Sample]], description: str) -> Iterator[EncodedGroup | DataError]:
        """Encode images with their questions, or read them where that was done before; all ranks must call it.

        Each rank of a team does its share first. An image that any rank cannot read counts as one on every rank, so
        that all of them plan the same steps.

        Args:
            groups: the questions of one image each.
            description: what the progress bar says.

        Yields:
            For each group its tokens, without tensors, or why its image cannot be read.
        """
        named = {group_key(members): members for members in groups}
        self._open(named)
        done: dict[str, EncodedGroup | DataError] = {}
        if self.team.ranks > 1:
            own = {key: members for key, members in named.items() if self._is_mine(members[0])}
            for key, found in zip(own, self._encode(own, f"{description}{self.team.share}"), strict=True):
                done[key] = found if isinstance(found, DataError) else replace(found, tensors={})
            self.team.wait(f"prepare {len(named):,} images{self.team.share}")
            for failed in self.team.gather({key: one for key, one in done.items() if isinstance(one, DataError)}):
                done |= failed
            self._open(named)
        rest = self._encode({key: members for key, members in named.items() if key not in done}, description)
        for key in named:
            yield done[key] if key in done else next(rest)
        next(rest, None)  # at its end it writes what is left

    def _open(self, groups: Mapping[str, Sequence[Sample]]) -> None:
        """Map what is there of some images and their questions."""
        if self._images is not None and self._tokens is not None:
            firsts = [members[0] for members in groups.values()]
            self._images.open(record_key(first.image_key) for first in firsts if first.images)
            self._tokens.open(groups)

    def _is_mine(self, sample: Sample) -> bool:
        """Whether this rank prepares an image: each one that it shares no folder for, else its share."""
        return self._images is None or self.team.owns(record_key(sample.subject))

    def _encode(self, groups: Mapping[str, Sequence[Sample]], description: str) -> Iterator[EncodedGroup | DataError]:
        """Encode or read groups, by their keys, on this rank alone."""
        firsts = [members[0] for members in groups.values()]
        with progress(sum(map(len, groups.values())), description, "questions") as bar, ExitStack() as stack:
            keep_image = self._keeper(stack, self._images)
            keep_tokens = self._keeper(stack, self._tokens)
            prepared = self._prepared(firsts)
            for (key, members), image in zip(groups.items(), prepared, strict=True):
                yield self._encoded(members, key, image, keep_image, keep_tokens)
                bar.advance(len(members))

    def prepare_images(self, samples: Sequence[Sample], description: str) -> None:
        """Process and keep the images of samples, each rank its share; those that cannot be read are passed over.

        Args:
            samples: one an image.
            description: what the progress bar says.
        """
        if self._images is not None:
            self._images.open(record_key(sample.image_key) for sample in samples)
            own = [sample for sample in samples if self._is_mine(sample)]
            self._process(own, self._images, f"{description}{self.team.share}")
        self.team.wait(f"prepare {len(samples):,} images{self.team.share}")
        if self._images is not None:
            self._images.open(record_key(sample.image_key) for sample in samples)

    def _process(self, samples: Sequence[Sample], images: Store, description: str) -> None:
        """Process and keep those images that are not there yet, on this rank alone."""
        missing = [sample for sample in samples if record_key(sample.image_key) not in images]
        with progress(len(missing), description, "images") as bar, ExitStack() as stack:
            keep = self._keeper(stack, images)
            prepared = self._prepared(missing)
            for sample, image in zip(missing, prepared, strict=True):
                if not isinstance(image, DataError) and image[1] is not None:
                    self.processed_images += 1
                    keep(record_key(sample.image_key), image[1])
                bar.advance()

    def _prepared(self, samples: Iterable[Sample]) -> Iterator[tuple[Record | None, Record | None] | DataError]:
        """Process images in order, in threads once the encoder knows that they need no tokenizer."""
        remaining = iter(samples)
        for sample in remaining:
            yield self._image_or_error(sample)
            if self.encoder.images_alone:
                break
        yield from ordered_map(self._image_or_error, remaining, self.team.threads, 4 * self.team.threads)

    def _image_or_error(self, sample: Sample) -> tuple[Record | None, Record | None] | DataError:
        """Process an image that is not kept yet; its tensors and how they are stored."""
        if not sample.images:
            return {}, None
        if self._images is not None and record_key(sample.image_key) in self._images:
            return None, None
        try:
            tensors = self.encoder.process_images(sample)
        except DataError as error:
            return error
        return tensors, None if self._images is None else pack_pixels(tensors, self._layout)

    def _encoded(
        self,
        members: Sequence[Sample],
        key: str,
        image: tuple[Record | None, Record | None] | DataError,
        keep_image: Callable[[str, Record], None],
        keep_tokens: Callable[[str, Record], None],
    ) -> EncodedGroup | DataError:
        """Encode one group, keep what is new."""
        if isinstance(image, DataError):
            return image
        tensors, stored = image
        if stored is not None:
            self.processed_images += 1
            keep_image(record_key(members[0].image_key), stored)
        record = self._tokens.get(key) if self._tokens is not None else None
        if record is not None:
            return _read_tokens(record, members)
        group = self.encoder.encode(members, tensors=tensors)
        self.tokenised_groups += 1
        keep_tokens(key, _token_record(group))
        return group

    def _keeper(self, stack: ExitStack, store: Store | None) -> Callable[[str, Record], None]:
        """A function that adds a record to a store, and stops adding when that fails once."""
        if store is None:
            return lambda key, record: None
        writer = store.writer()
        stack.callback(lambda: self._try(writer.close) if writer.usable else None)

        def keep(key: str, record: Record) -> None:
            if writer.usable:
                self._try(lambda: writer.add(key, record))

        return keep


def record_key(image_key: str) -> str:
    """Key of the images (or the subject) of a sample; several images are hashed together."""
    return image_key if len(image_key) <= 64 else hashlib.sha256(image_key.encode()).hexdigest()


def group_key(members: Sequence[Sample]) -> str:
    """Key of an image with its questions, whatever their ids; own data may be asked by a template of its own."""
    first = members[0]
    asked = [[[(turn.role, turn.text) for turn in s.history], s.question, s.target, is_own(s.dataset)] for s in members]
    text = json.dumps([first.image_key, first.system, asked, *filter(None, (first.places, first.boxes))])
    return hashlib.sha256(text.encode()).hexdigest()


def image_settings(encoder: Encoder) -> dict[str, Any]:
    """All that the pixels of an image depend on, besides the image."""
    images = encoder.processor.image_processor
    return {
        "processor": type(encoder.processor).__name__,
        "image_processor": [type(images).__name__, images.to_dict()],
        "versions": {name: version_of(name) or "" for name in _PACKAGES},
    }


def token_settings(encoder: Encoder) -> dict[str, Any]:
    """All that the tokens of a question depend on, besides the question."""
    prompt = asdict(encoder.prompt)
    for limit in ("max_new_tokens", "answer_tokens", *LENGTH_KEYS):
        prompt.pop(limit)
    templates = [getattr(owner, "chat_template", None) for owner in (encoder.processor, encoder.tokenizer)]
    return image_settings(encoder) | {
        "processor_settings": encoder.processor.to_dict(),
        "tokenizer": _tokenizer_hash(encoder.tokenizer),
        "templates": templates,
        "prompt": prompt,
        "stop_ids": list(encoder.stop_ids),
        "texts": "never control tokens",
    }


def _tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        added = {str(key): str(value) for key, value in tokenizer.added_tokens_decoder.items()}
        text = json.dumps([tokenizer.get_vocab(), added], sort_keys=True)
    settings = json.dumps([type(tokenizer).__name__, tokenizer.init_kwargs], sort_keys=True, default=str)
    return hashlib.sha256((text + settings).encode("utf-8", "surrogatepass")).hexdigest()


def _token_record(group: EncodedGroup) -> Record:
    """The tokens of a group: prefix, types, and all questions in a row with their lengths."""
    parts = [part for question in group.questions for part in (question.prompt_ids, question.answer_ids)]
    arrays = {
        "prefix": group.prefix_ids,
        "types": group.prefix_types,
        "lengths": np.asarray([len(part) for part in parts], dtype=np.int32),
        "tokens": np.concatenate(parts),
        "image_tokens": np.asarray([group.image_tokens], dtype=np.int32),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _read_tokens(record: Record, members: Sequence[Sample]) -> EncodedGroup:
    """What `_token_record` stored, with the ids of the samples at hand."""
    arrays = {name: tensor.numpy() for name, tensor in record.items()}
    ends = np.cumsum(arrays["lengths"]).tolist()
    parts = [arrays["tokens"][begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    questions = tuple(
        EncodedQuestion(sample.id, prompt, answer, sample.weight)
        for sample, prompt, answer in zip(members, parts[::2], parts[1::2], strict=True)
    )
    count = int(arrays["image_tokens"][0])
    return EncodedGroup(members[0].subject, arrays["prefix"], arrays["types"], count, questions, {})
