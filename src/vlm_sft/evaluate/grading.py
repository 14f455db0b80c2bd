"""What a judge is asked: how an answer is graded, in words of ours after the rules of the benchmarks' papers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FORM = (
    'Reply with one line of JSON and nothing else: {"score": 1} if the answer is right by these rules, {"score": 0} if '
    'it is wrong; you may add "reason": a few words.'
)
_SAME_MEANING = "The answer is right if it says the same as an expected answer; wording, case and form do not matter."
_EQUAL_NUMBERS = (
    "The answer is right only if its number has exactly the value of the expected one; the notation may differ, as in "
    "1000 and 1e3."
)
CHARXIV_RULES = {
    "text in chart": "The answer is right only if it names the same terms as the expected one. How a symbol is written "
    "does not matter (alpha or the Greek letter, with or without dollar signs), nor does the order of several terms. "
    "One term that is different makes it wrong.",
    "text in general": "If the question offers options, the answer is right only if it is exactly the expected option. "
    "Else it is right if it means the same as the expected answer.",
    "number in chart": _EQUAL_NUMBERS,
    "number in general": _EQUAL_NUMBERS,
}
CHARTMUSEUM_RULES = (
    "Numbers are the same if they differ by a small part of their size: tenths of a percent, not several percent; "
    "years and dates have to be exact. A unit, currency or percent sign that only one side has is ignored, and so is a "
    "percentage written as a fraction. Texts are compared without case; different forms of one mathematical expression "
    "are the same."
)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def general_grading(row: Mapping[str, Any]) -> str:
    """The prompt for own data: an answer of the same meaning is right."""
    return _prompt(_SAME_MEANING, row, row["prediction"])


def charxiv_grading(row: Mapping[str, Any]) -> str:
    """The prompt for CharXiv's reasoning questions.

    Source: Wang et al. 2024 (CharXiv, arXiv 2406.18521), whose rules depend on the kind of answer; the words are ours.
    """
    return _prompt(CHARXIV_RULES.get(str(row.get("question_type")), _SAME_MEANING), row, row["prediction"])


def chartmuseum_grading(row: Mapping[str, Any]) -> str:
    """The prompt for ChartMuseum.

    Source: Tang et al. 2025 (ChartMuseum, arXiv 2505.13444); the words are ours. As there (`evaluate.py`), only what
    stands within `<answer>` counts where an answer has that tag. One without it counts whole, where it is empty there:
    the models here are not asked for the tag.
    """
    tagged = _ANSWER.search(row["prediction"])
    return _prompt(CHARTMUSEUM_RULES, row, tagged[1].strip() if tagged else row["prediction"])


def _prompt(rules: str, row: Mapping[str, Any], answer: str) -> str:
    expected = "\n".join(f"Expected answer: {text}" for text in dict.fromkeys(row["answers"]))
    task = "Grade an answer to a question about an image that you do not see. Look for the final answer in the text."
    return (
        f"{task}\n{rules}\nAn empty answer is wrong.\n\nQuestion: {row['question']}\n{expected}\n"
        f"Answer to grade: {answer}\n\n{_FORM}"
    )
