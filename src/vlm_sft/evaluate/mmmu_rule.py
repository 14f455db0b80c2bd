"""The rule of MMMU: an option named by its letter or text, or an open answer that holds an expected text or number."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

MULTIPLE_CHOICE = "multiple-choice"  # a type of question; all others are open
_LETTERS_UNKNOWN = 5  # A to E, where a multiple choice does not come with its options
_TRIVIAL_ENDS = ",.!?;:'"
_FEWEST_WORDS = 6  # an answer that may name an option by its text
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu(prediction: str, answers: Sequence[str], options: Sequence[str] = (), question_type: str = "") -> float:
    """Score whether an answer is right by the rule of MMMU.

    Source: Yue et al. 2024 (MMMU, arXiv 2311.16502), as in `mmmu/utils/eval_utils.py` of its repository. There, a
    multiple choice whose answer names no option is answered by a random one; here it is wrong, so that a score is the
    same each time. That lowers a score by the chance that would have been right.

    Rule of a multiple choice: the marks `,.!?;:'` go from the ends, one kind after the other. Options whose letter
    stands in brackets, `(A)`, are named; if there is none, those whose letter stands between spaces; if there is none
    and the answer has more than five words, those whose text it holds (case ignored). Of several the last one counts.

    Rule of an open question: from each line the shortest text behind `is`, `so`, `thus`, `answer` and the like is
    taken (in the last line behind `=` too), from an answer without such words all of it. The answer is right if one of
    these texts holds an expected text (case ignored), or a number in them, rounded to two decimals, is an expected one.

    Args:
        prediction: the model's answer.
        answers: the letter of the right option first, or every accepted answer.
        options: their texts, A first; none for an open question.
        question_type: "multiple-choice", or anything else where there are no options.

    Returns:
        1.0 or 0.0.
    """
    if not options and question_type != MULTIPLE_CHOICE:
        return float(_open_matches(prediction, answers))
    letters = string.ascii_uppercase[: len(options) or _LETTERS_UNKNOWN]
    texts = dict(zip(letters, options or [""] * len(letters), strict=False))
    return float(named_option(prediction, texts) == answers[0].strip())


def named_option(prediction: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None where it names none, for which the reference draws one.

    Args:
        prediction: the model's answer.
        options: letter -> text; an empty text is not looked for.
    """
    for mark in _TRIVIAL_ENDS:
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    for form in ("({})", " {} "):
        if named := [letter for letter in options if form.format(letter) in text]:
            return _last(named, lambda letter, form=form: text.rfind(form.format(letter)))  # type: ignore[misc]
    if len(text.split()) < _FEWEST_WORDS:
        return None
    lower = text.lower()
    named = [letter for letter, option in options.items() if option and option.lower() in lower]
    return _last(named, lambda letter: lower.rfind(options[letter].lower())) if named else None


def _last(letters: Sequence[str], place: Callable[[str], int]) -> str:
    """Of several letters the one that stands last; of two at one place the first."""
    return max(letters, key=place)


def _open_matches(prediction: str, answers: Sequence[str]) -> bool:
    expected = {form for answer in answers for form in _forms(answer)}
    given = _key_texts(prediction)
    given += [number for text in given for pattern in _NUMBERS for number in pattern.findall(text)]
    for form in (form for text in given for form in _forms(text)):
        if isinstance(form, float):
            if form in expected:
                return True
        elif any(isinstance(wanted, str) and wanted in form for wanted in expected):
            return True
    return False


def _key_texts(prediction: str) -> list[str]:
    """The ends of lines that may hold the answer; all of it where no line has a key word.

    The reference means to look at sentences, but seeks their capitals in a text that it has put into lower case.
    """
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        words = (*_KEY_WORDS, "=") if number == len(lines) else _KEY_WORDS
        # An empty end gives way to the next one, whatever its length, as in the reference.
        shortest = ""
        for end in (line.split(word)[-1].strip() for word in words if word in line):
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in tuple(_TRIVIAL_ENDS):
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[str | float]:
    """The number that a text is, rounded to two decimals, or the text in lower case; a letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
