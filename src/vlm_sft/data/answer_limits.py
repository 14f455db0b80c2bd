"""What the answers of own data ask of the prompt: room for the longest, no call for short ones.

Two rules, the same in training and evaluation, so that what a training did can be done again:

- An answer may take a quarter more tokens than the longest answer of the data, and `SPARE` more; `SMALLEST_LIMIT` at
  least.
- Where more than one answer in a hundred has more than `PHRASE_WORDS` words, questions are put as they are, without the
  sentence that asks for a word or phrase. Published benchmarks are always asked with it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from vlm_sft.common.formats import plural
from vlm_sft.data.plain_text import PlainText
from vlm_sft.data.prompt import SHORT_ANSWER_TEMPLATE, PromptSettings
from vlm_sft.data.sources.jsonl import answer_texts
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.token_estimate import CAREFUL

SMALLEST_LIMIT = 32  # tokens
ROOM, SPARE = 1.25, 8
PHRASE_WORDS = 6
LONG_SHARE = 0.01  # of the answers; so a stray sentence in a large set changes nothing
PLAIN_TEMPLATE = "{question}"
_AT_ONCE = 1000  # texts that are tokenised together


def room_for(tokens: int) -> int:
    """The limit of an answer, in tokens, for data whose longest answer has so many."""
    return max(SMALLEST_LIMIT, math.ceil(ROOM * tokens) + SPARE)


def longest_answer(texts: Collection[str], plain: PlainText | None) -> int:
    """Tokens of the longest text, without an end token.

    Args:
        texts: answers; none give 0.
        plain: of the model; None estimates by the number of characters.
    """
    if plain is None:
        return max((CAREFUL.text(text) + CAREFUL.answer for text in texts), default=0)
    listed = list(texts)
    parts = (listed[start : start + _AT_ONCE] for start in range(0, len(listed), _AT_ONCE))
    return max((tokens for part in parts for tokens in plain.lengths(part)), default=0)


def are_long(answers: Sequence[str]) -> bool:
    """Whether so many of the answers are longer than a phrase that asking for one would be wrong."""
    long = sum(_words(answer) > PHRASE_WORDS for answer in answers)
    return long > LONG_SHARE * len(answers)


def _words(text: str) -> int:
    """Words of a text; two characters of a script that writes none apart (Chinese, Japanese) count as one."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(re.findall(r"\w+", text)) + wide // 2


def limit_for(prompt: PromptSettings, longest: int) -> int:
    """The limit of an answer to own data.

    Args:
        prompt: it knows the answers that a model was trained on; for others no longer than those its limit holds.
        longest: tokens of the longest answer of the data.
    """
    if prompt.answer_tokens is not None and longest <= prompt.answer_tokens:
        return prompt.max_new_tokens
    return max(prompt.max_new_tokens, room_for(longest))


def fitted(
    prompt: PromptSettings,
    specs: Sequence[DatasetSpec],
    plain: PlainText | None,
    *,
    keep_template: bool = False,
    limits: Mapping[str, int] | None = None,
) -> tuple[PromptSettings, list[str]]:
    """Fit prompt settings to the answers of the data, over all splits of own data.

    Args:
        prompt: those of the base, with what the user asked for.
        specs: the data sets.
        plain: of the base; None estimates.
        keep_template: the user gave a template: it stays for all data.
        limits: what the user asked for, by data set.

    Returns:
        The settings, and what the user should know.

    Raises:
        DataError: own data cannot be read.
    """
    own = [spec for spec in specs if spec.own]
    wanted = limits or {}
    requested = [wanted[spec.name] for spec in own if spec.name in wanted] if own else list(wanted.values())
    if not own:
        return (replace(prompt, max_new_tokens=max(requested)) if requested else prompt), []
    targets: list[str] = []
    accepted: set[str] = set()
    for spec in own:
        learned, every = answer_texts(spec)
        targets += learned
        accepted |= every
    longest = longest_answer(accepted, plain)
    limit = max(requested) if requested else max(prompt.max_new_tokens, room_for(longest))
    settings = replace(prompt, max_new_tokens=limit, answer_tokens=longest)
    names = ", ".join(spec.name for spec in own)
    tokens = plural(longest, "token")
    notes = [f"{names}: the longest answer has {tokens}; generated answers may have {limit} (--max_new_tokens)"]
    if prompt.own_template is None and prompt.template == SHORT_ANSWER_TEMPLATE and not keep_template:
        if are_long(targets):
            settings = replace(settings, own_template=PLAIN_TEMPLATE)
            notes.append(f"{names}: answers are longer than a phrase, so the prompt does not ask for a word or phrase")
    return settings, notes
