"""Conversations to token ids, the texts in them always as text.

An ordinary conversation goes through the chat template, tokenizer and processor as it is. Where it does not come out
with the control tokens of the same conversation about single letters, a text holds the string of one: such texts are
put in afterwards, see `plain_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_sft.common.errors import ModelError
from vlm_sft.data.plain_text import PlainText
from vlm_sft.data.processor import blamed_on
from vlm_sft.data.sample import pieces

Message = dict[str, Any]
TEXT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids", "labels")
_LETTER = "A"


def message(role: str, text: str, places: Sequence[int] = ()) -> Message:
    """One turn in the chat format: its text, and images behind so many characters of it."""
    parts = [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces(text, places)]
    return {"role": role, "content": parts}


class Chat:
    """Renders and tokenises conversations with one processor.

    Args:
        processor: a Hugging Face processor with a chat template.
        stop_ids: token ids that end an answer.
    """

    def __init__(self, processor: Any, stop_ids: Sequence[int]) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        turns = [message("user", _LETTER), message("assistant", _LETTER), message("user", _LETTER)]
        self.plain = PlainText(processor, stop_ids, self._ids(self.render(turns, False)).tolist())
        self._control: dict[Any, np.ndarray] = {}
        self._kept: dict[Any, bool] = {}

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """Apply the chat template; the text is for showing and for programs that take nothing else.

        Raises:
            ModelError: the template cannot render the conversation.
        """
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything
            raise ModelError(
                f"the chat template of {type(self.processor).__name__} cannot render a question: {error}",
                "use an instruct model, or put a chat_template.jinja into the model folder",
            ) from error

    def keeps_places(self, messages: list[Message]) -> bool:
        """Whether the chat template leaves each image of a conversation between the texts between which it stands.

        Asked of the template itself, once a shape: taking an image away must change what is rendered between its
        neighbours, and nothing else.
        """
        parts = [(number, part["type"]) for number, turn in enumerate(messages) for part in turn["content"]]
        key = ("places", *(turn["role"] for turn in messages), *parts)
        if key not in self._kept:
            self._kept[key] = self._asked_places(messages)
        return self._kept[key]

    def _asked_places(self, messages: list[Message]) -> bool:
        """Render with numbered texts, and again without one image after the other, the last one first."""
        turns = [turn | {"content": list(turn["content"])} for turn in messages]
        images: list[tuple[Message, int, int]] = []  # of each: its turn, its part, how many texts stand before it
        texts = 0
        for turn in turns:
            for place, part in enumerate(turn["content"]):
                if part["type"] == "image":
                    images.append((turn, place, texts))
                else:
                    turn["content"][place] = {"type": "text", "text": f"{self.plain.mark}{texts};"}
                    texts += 1
        marks = [f"{number};" for number in range(texts)]
        before = self._between(turns, marks)
        for turn, place, gap in reversed(images):
            del turn["content"][place]  # not of a list that was kept: transformers 5.10 puts a copy in its place
            after = self._between(turns, marks)
            if before is None or after is None or before[gap] == after[gap]:
                return False
            if before[:gap] + before[gap + 1 :] != after[:gap] + after[gap + 1 :]:
                return False
            before = after
        return True

    def _between(self, turns: list[Message], marks: list[str]) -> list[str] | None:
        """What a template renders around numbered texts; None where these are not all there once, in order."""
        first, *rest = self.render(turns).split(self.plain.mark)
        if len(rest) != len(marks) or not all(map(str.startswith, rest, marks)):
            return None
        return [first, *(gap[len(mark) :] for gap, mark in zip(rest, marks, strict=True))]

    def is_ordinary(self, messages: list[Message]) -> bool:
        """Whether no text of a conversation before its answer holds the string of a control token."""
        return self._is_ordinary(messages, self._ids(self.render(messages)))

    def prompt(self, messages: list[Message]) -> tuple[str, np.ndarray]:
        """Tokenise a conversation up to the place where the answer begins; image placeholders are not expanded.

        Returns:
            The rendered text, and its tokens, (L,) int32.

        Raises:
            SampleError: a text cannot be told from a control token.
        """
        text = self.render(messages)
        ids = self._ids(text)
        if not self._is_ordinary(messages, ids):
            ids = self._put_in(self._marked_ids(self.render(self._marked(messages))), _texts(messages), leads=False)[0]
        return text, ids

    def process(self, messages: list[Message], pictures: list[Image.Image], source: str) -> dict[str, torch.Tensor]:
        """What the processor itself makes of a conversation with its pictures, batch dimension kept.

        Args:
            messages: the conversation.
            pictures: its pictures, mode "RGB"; none for a text row.
            source: where they are, for messages.

        Raises:
            SampleError: the processor fails on the pictures, or a text cannot be told from a control token.
        """
        ordinary = self.is_ordinary(messages)
        processor = self.processor if ordinary else self.plain.processor
        text = self.render(messages if ordinary else self._marked(messages))
        with blamed_on(source, processor):
            shown = {"images": [pictures]} if pictures else {}
            whole = dict(processor(text=[text], **shown, return_tensors="pt"))
        if ordinary:
            return whole
        marked = whole["input_ids"][0].numpy().astype(np.int32)
        ids, counts = self._put_in(marked, _texts(messages), leads=False)
        for name in set(TEXT_KEYS) & set(whole):  # (1, M): one value a token
            whole[name] = whole[name].repeat_interleave(torch.from_numpy(counts), dim=1)
        return whole | {"input_ids": torch.from_numpy(ids)[None].long()}

    def answer(self, messages: list[Message], target: str, prompt: str = "") -> np.ndarray:
        """Tokenise an answer with what the template puts behind it, (A,) int32.

        Args:
            messages: the conversation before it.
            target: the answer.
            prompt: the rendered conversation, where that is known already.

        Raises:
            SampleError: the answer cannot be told from a control token.
        """
        ids = self._ids(self._behind(messages, target, prompt), add_special_tokens=False)
        key = ("answer", *_shape(messages))
        if key not in self._control:
            letters = self._behind(_with_texts(messages, _LETTER), _LETTER)
            self._control[key] = self.plain.control(self._ids(letters, add_special_tokens=False))
        if self._agrees(ids, self._control[key], [target]):
            return ids
        marked = self._marked_ids(self._behind(self._marked(messages), self.plain.mark), add_special_tokens=False)
        return self._put_in(marked, [target], leads=True)[0]

    def _behind(self, messages: list[Message], target: str, prompt: str = "") -> str:
        """The rendered answer with its end; the answer alone where the template renders the prompt otherwise then."""
        prompt = prompt or self.render(messages)
        whole = self.render([*messages, message("assistant", target)], add_generation_prompt=False)
        return whole[len(prompt) :] if whole.startswith(prompt) else target

    def _ids(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"], dtype=np.int32)

    def _is_ordinary(self, messages: list[Message], ids: np.ndarray) -> bool:
        key = _shape(messages)
        if key not in self._control:
            self._control[key] = self.plain.control(self._ids(self.render(_with_texts(messages, _LETTER))))
        return self._agrees(ids, self._control[key], _texts(messages))

    def _agrees(self, ids: np.ndarray, control: np.ndarray, texts: list[str]) -> bool:
        """Whether tokens of texts hold these control tokens and no others."""
        unknown = self.tokenizer.unk_token
        literal = unknown is not None and any(str(unknown) in text for text in texts)
        return not literal and np.array_equal(self.plain.control(ids), control)

    def _marked(self, messages: list[Message]) -> list[Message]:
        return _with_texts(messages, self.plain.mark)

    def _marked_ids(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        tokenizer = self.plain.processor.tokenizer
        return np.asarray(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"], dtype=np.int32)

    def _put_in(self, marked: np.ndarray, texts: list[str], leads: bool) -> tuple[np.ndarray, np.ndarray]:
        """Replace each mark by the tokens of its text.

        Args:
            marked: (M,) int32, with one mark a text.
            texts: the texts in order.
            leads: as in `PlainText.ids`.

        Returns:
            ids: (L,) int32.
            counts: (M,) int64, how many ids each token of `marked` became.

        Raises:
            SampleError: the template drops or repeats a text, or the tokenizer cannot do it.
        """
        places = np.nonzero(marked == self.plain.mark_id)[0]
        if len(places) != len(texts):
            raise self.plain.refusal(texts)
        parts = [self.plain.ids(text, leads) for text in texts]
        counts = np.ones(len(marked), dtype=np.int64)
        counts[places] = [len(part) for part in parts]
        ids = np.repeat(marked, counts)
        ids[np.repeat(marked == self.plain.mark_id, counts)] = np.concatenate(parts)
        return ids, counts


def _texts(messages: list[Message]) -> list[str]:
    """The texts of a conversation, in order; empty ones are not counted."""
    return [part["text"] for turn in messages for part in turn["content"] if part.get("text")]


def _with_texts(messages: list[Message], text: str) -> list[Message]:
    """The same conversation with another text for each of its own."""
    return [
        turn | {"content": [part | {"text": text} if part.get("text") else part for part in turn["content"]]}
        for turn in messages
    ]


def _shape(messages: list[Message]) -> tuple[Any, ...]:
    """Roles, images and texts of a conversation, without its words."""
    return tuple((turn["role"], *(bool(part.get("text")) for part in turn["content"])) for turn in messages)
