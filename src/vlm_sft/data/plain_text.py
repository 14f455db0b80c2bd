"""Texts that can never become control tokens: a tokenizer's twin that does not know them.

A control token is one that does something: it ends an answer, opens a turn, stands for an image. The strings of these
tokens may also stand in a question or an answer, and there they are text. A tokenizer finds them wherever they stand,
so texts that hold one are tokenised by a twin in which every control token has another, secret name; in the
conversation a mark takes their place until then.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from vlm_sft.common.errors import SampleError
from vlm_sft.data.sample import CONTROL_TEXT, Sample

# Strings of control tokens in the families of docs/FAMILIES.md, for a check that knows no model.
_USUAL = re.compile(
    r"<\|[\w/]+\|>|</?s>|<(bos|eos|pad|unk|image|video|im_patch|im_start|im_end|image_soft_token|end_of_utterance"
    r"|fake_token_around_image|global-img|IMG_CONTEXT)>|</?img>|<(start|end)_of_\w+>|<row_\d+_col_\d+>"
    r"|\[/?(INST|IMG|IMG_BREAK|IMG_END)\]"
)


def reads_like_control(sample: Sample) -> bool:
    """Whether a text of a sample holds a control token of some family."""
    return any(_USUAL.search(text) for text in sample.texts)


class PlainText:
    """The control tokens of a processor, and texts that hold their strings as plain tokens.

    Args:
        processor: a Hugging Face processor.
        stop_ids: ids that end an answer.
        turn_ids: ids of a conversation that its chat template renders around texts of single letters.

    Attributes:
        mark: stands in a conversation for one text; no text can hold it.
    """

    def __init__(self, processor: Any, stop_ids: Iterable[int], turn_ids: Iterable[int]) -> None:
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.mark = _secret("mark")
        added = {number: str(token.content) for number, token in self.tokenizer.added_tokens_decoder.items()}
        # Special tokens, by what they do: they vanish from a decoded answer.
        special = {number for number in added if not self.tokenizer.decode([number], skip_special_tokens=True)}
        acting = special | {*stop_ids, *turn_ids, *_named_ids(processor)}
        # An added token that is a plain word or blank ("user", a run of spaces) does nothing, unless it vanishes from
        # answers as Aya's "TILE" does: it is vocabulary.
        self._strings = {
            number: text
            for number, text in added.items()
            if number in special or (number in acting and not text.isalnum() and not text.isspace())
        }
        # What a tokenizer makes of characters that it does not know is no sign of a control token.
        known = {*stop_ids, *self._strings} - {self.tokenizer.unk_token_id}
        self._control = np.zeros(1 + max([*known, 0]), dtype=bool)
        self._control[[*known]] = True
        longest_first = sorted(map(re.escape, self._strings.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or r"(?!)")

    def found_in(self, texts: Sequence[str]) -> list[str]:
        """The strings of control tokens that texts hold, each once."""
        return list(dict.fromkeys(found for text in texts for found in self._pattern.findall(text)))

    def control(self, ids: np.ndarray) -> np.ndarray:
        """The control tokens among ids, in order; the token for unknown characters is none of them."""
        inside = ids[ids < len(self._control)]
        return inside[self._control[inside]]

    @cached_property
    def processor(self) -> Any:
        """The processor with a tokenizer that also knows the mark, as one token."""
        from tokenizers import AddedToken

        twin = copy.copy(self._processor)
        twin.tokenizer = copy.deepcopy(self.tokenizer)
        twin.tokenizer.add_tokens([AddedToken(self.mark, normalized=False, special=True)], special_tokens=True)
        return twin

    @cached_property
    def mark_id(self) -> int:
        """The id of the mark in `processor.tokenizer`."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.mark))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as it is learned: without control tokens, whatever strings it holds."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [self._plain_length(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _plain_length(self, text: str, ids: Sequence[int]) -> int:
        """The length of a text whose usual tokens are `ids`; theirs where this tokenizer cannot tell them apart."""
        if len(self.control(np.asarray(ids, dtype=np.int64))):
            with suppress(SampleError):
                return len(self.ids(text, leads=True))
        return len(ids)

    def ids(self, text: str, leads: bool) -> np.ndarray:
        """Tokens of a text in which no control token can be, (T,) int32.

        Args:
            text: any text.
            leads: the text begins what is tokenised; otherwise it stands behind something, which matters to
                tokenizers that put a blank in front of the first word.

        Raises:
            SampleError: this tokenizer cannot do that.
        """
        twin = self._twin
        if twin is None:
            raise self.refusal([text])
        found = twin.encode(text if leads else self.mark + text, add_special_tokens=False).ids
        ids = np.asarray(found if leads else found[1:], dtype=np.int32)
        if len(self.control(ids)):
            raise self.refusal([text])
        return ids

    def refusal(self, texts: Sequence[str]) -> SampleError:
        """The error for texts that cannot be told apart from control tokens."""
        held = ", ".join(self.found_in(texts)[:3]) or "a control token"
        return SampleError(
            CONTROL_TEXT,
            f"its text holds {held}, which {type(self.tokenizer).__name__} or the chat template cannot tell from a "
            "control token",
            "write it otherwise, or leave the question out",
        )

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer with the mark, in which every control token has a secret name; None where none can be made."""
        from tokenizers import Tokenizer

        backend = getattr(self.processor.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        renamed = {text: _secret(str(number)) for number, text in self._strings.items()}
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        for token in state["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        _rename_vocabulary(state["model"], renamed)
        twin = Tokenizer.from_str(json.dumps(state))
        wanted = {number: renamed.get(token.content, token.content) for number, token in _added(backend).items()}
        return twin if wanted == {number: token.content for number, token in _added(twin).items()} else None


def _added(tokenizer: Any) -> dict[int, Any]:
    return dict(tokenizer.get_added_tokens_decoder())


def _secret(name: str) -> str:
    """A name that no text can hold; the characters around it are of no script."""
    return f"\ue000{secrets.token_hex(8)}.{name}\ue001"


def _named_ids(processor: Any) -> set[int]:
    """Ids that a processor knows by name: image_token_id, video_token_id and the like."""
    found: set[int] = set()
    for owner in (processor, processor.tokenizer):
        for name, value in vars(owner).items():
            if name.endswith(("token_id", "token_ids")):
                values = value if isinstance(value, list | tuple) else [value]
                found |= {number for number in values if isinstance(number, int)}
    return found


def _rename_vocabulary(model: dict[str, Any], renamed: dict[str, str]) -> None:
    """Give entries of a serialised tokenizer model other names, in place; their ids stay."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(text, text): number for text, number in vocabulary.items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[renamed.get(text, text), score] for text, score in vocabulary]
    unknown = model.get("unk_token")
    if unknown is not None:
        model["unk_token"] = renamed.get(unknown, unknown)
