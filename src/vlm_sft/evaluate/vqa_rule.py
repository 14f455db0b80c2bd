"""The rule of VQA and TextVQA: an answer against those of ten people."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

from vlm_sft.common.errors import EvaluationError

VQA_ANSWERS = 10  # people who answered each question of VQA and TextVQA

_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The limit of 32 is an accident of the reference evaluator (a flag passed as a count); published scores share it.
_VQA_PERIOD = re.compile(r"\.(?!\d)")
_VQA_PERIODS_REMOVED = 32
_VQA_NUMBER_WORDS = {"none": "0"} | {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_VQA_ARTICLES = frozenset(("a", "an", "the"))


@lru_cache(maxsize=1)
def _contractions() -> dict[str, str]:
    """Contractions written without their apostrophe -> with it: the VQA table as published (120 entries)."""
    text = files("vlm_sft.evaluate").joinpath("vqa_contractions.json").read_text(encoding="utf-8")
    return {str(bare): str(written) for bare, written in json.loads(text).items()}


# The ten answers of a question are mostly the same few words; the cache is small so that memory stays bounded.
@lru_cache(maxsize=4096)
def vqa_normalize(text: str) -> str:
    """Bring an answer into the form in which VQA and TextVQA answers are compared.

    Source: Antol et al. 2015 (VQA), Singh et al. 2019 (TextVQA, arXiv 1904.08920); in the form of MMF's
    `mmf/utils/m4c_evaluators.py: EvalAIAnswerProcessor`, which lmms-eval shares.

    Rule:
      1. lower case; `,` and `?` removed; `'s` becomes ` 's`; stripped; newline and tab become spaces; stripped.
      2. each of 21 punctuation marks is removed everywhere if, in the text of step 1, it stands next to a space
         anywhere; otherwise it becomes a space everywhere.
      3. the first 32 periods that no digit follows are removed.
      4. word by word: `none zero one ... ten` become digits, `a an the` go, contractions get their apostrophe.

    Args:
        text: an answer of the model or of a person.

    Returns:
        The normalised text, words separated by single spaces; it may be empty.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _VQA_MARKS:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if beside_space else " ")
    cleaned = _VQA_PERIOD.sub("", cleaned, count=_VQA_PERIODS_REMOVED)
    numbers = (_VQA_NUMBER_WORDS.get(word, word) for word in cleaned.split())
    contractions = _contractions()
    return " ".join(contractions.get(word, word) for word in numbers if word not in _VQA_ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score a prediction against the answers of ten people, leaving one out at a time.

    Source: Antol et al. 2015 (VQA, section 3), Singh et al. 2019 (TextVQA); in the form of MMF's m4c evaluator.

    Rule: on normalised texts (`vqa_normalize`), for each of the ten answers in turn leave it out and take
    min(1, matches among the other nine / 3); average the ten. With m matching answers this is 0, 0.3, 0.6, 0.9, 1 for
    m = 0, 1, 2, 3, >= 4. The shortcut min(m / 3, 1) is about a point too high on TextVQA.

    Args:
        prediction: the model's answer.
        answers: exactly ten answers.

    Returns:
        One of 0, 0.3, 0.6, 0.9, 1.

    Raises:
        EvaluationError: there are not exactly ten answers.
    """
    if len(answers) != VQA_ANSWERS:
        raise EvaluationError(
            f"VQA accuracy needs exactly {VQA_ANSWERS} answers, got {len(answers)}",
            "keep all ten human answers of each question, repeated ones too",
        )
    wanted = vqa_normalize(prediction)
    matching = sum(vqa_normalize(answer) == wanted for answer in answers)
    # In thirtieths, so that the ten parts add up without rounding.
    thirtieths = matching * min(3, matching - 1) + (VQA_ANSWERS - matching) * min(3, matching)
    return thirtieths / (3 * VQA_ANSWERS)
