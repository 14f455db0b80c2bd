"""Rules of further benchmarks: ChartQAPro, multiple choice, OCRBench, SQuAD.

A rule takes the prediction, the accepted answers, and by name what else it needs of a question.
"""

from __future__ import annotations

import ast
import re
import string
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_sft.common.errors import EvaluationError, quoted

TOLERANCE = 0.05  # relative, of a number in ChartQAPro
SIMILAR = 0.5  # normalised edit distance from which on a text of ChartQAPro is another one
HANDWRITTEN_FORMULAS = "HME100k"  # the part of OCRBench in which case counts and spaces do not
FORMULA_QUESTION = "Handwritten Mathematical Expression Recognition"  # its type of question
FEWEST_OPTIONS = 5  # A to E, where a question does not say which options it has
_LAST_WORDS = 4  # an option's letter has to be one of so many last words
_NO_CHOICE = "Z"  # an answer that refuses, or says so, chooses nothing
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_STATED = re.compile(r"(?i)answer\s+is\s+\**([ABCD])")
# The pattern by which the reference puts bare words of a list into quotes; what it does to several words is part of
# published scores.
_BARE = re.compile(r"(?<!['\w])(\w[^,]*?)(?!['\w])")


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character, each costing 1."""
    if len(first) < len(second):
        first, second = second, first
    previous = list(range(len(second) + 1))
    for row, character in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (character != other)))
        previous = current
    return previous[-1]


def chartqapro(prediction: str, answers: Sequence[str], year: Sequence[str] = (), question_type: str = "") -> float:
    """Score ChartQAPro's relaxed accuracy: numbers within 5 %, years exactly, other texts by ANLS, lists part by part.

    Source: Masry et al. 2025 (ChartQAPro, arXiv 2504.05506), as in `evaluate_predictions.py` of its repository, which
    VLMEvalKit shares. lmms-eval compares fact checks and choices exactly, and strips spaces first.

    Rule: the last answer counts. Of both texts, full stops and then line ends are taken off the ends. A text that reads
    as a Python list is one (in the expected answer also with bare words), anything else a list of one. Parts are
    compared in order; a part that only one side has scores 0; the score is the mean. A part whose flag is `YES` must be
    equal but for case and spaces around it. Otherwise `%` and spaces are taken off; two numbers may differ by 5 % of
    the expected one (0 must be 0); other texts score 1 - normalised edit distance, and 0 from a distance of 0.5 on. The
    reference means to compare fact checks and choices exactly, computes that, and does not use it; neither does this.

    Args:
        prediction: the model's answer.
        answers: the answers of all turns; the last one is asked for.
        year: a flag `YES` or `NO` an answer, as in the data set; none are all `NO`.
        question_type: of a `Conversational` question only the last flag counts.

    Returns:
        A number from 0 to 1.
    """
    flags = [flag.upper() == "YES" for flag in (year[-1:] if question_type == "Conversational" else year)] or [False]
    gold = answers[-1].strip(".").strip("\n")
    expected = _parts(_quoted(gold), gold)
    text = prediction.strip(".").strip("\n")
    given = _parts(text, text)
    if len(flags) < len(expected):
        flags = flags * len(expected)
    pairs = list(zip(expected, given, flags, strict=False))
    scores = [_same_year(right, part) if flag else _chart_part(right, part) for right, part, flag in pairs]
    return sum(scores) / max(len(expected), len(given))


def _quoted(text: str) -> str:
    """A list of bare words as a list of Python's texts; the text itself where that is none."""
    found = re.match(r"^\[(.*)\]$", text.strip())
    value = _literal(f"[{_BARE.sub(_in_quotes, found[1])}]") if found else None
    return text if value is None else str(value)


def _in_quotes(found: re.Match[str]) -> str:
    return f"'{found[1]}'"


def _literal(text: str) -> Any:
    """What Python reads in a text; None where that is nothing, or nothing with a list in it."""
    if "[" not in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd backslashes and numbers, which a model may write
            value = ast.literal_eval(text)
        str(value)  # a number may be too long to be written
    except Exception:  # whatever Python makes of a model's answer
        return None
    return value


def _parts(text: str, alone: str) -> list[str]:
    """The parts of a text that reads as a Python list with something in it, else `alone`."""
    value = _literal(text)
    return [str(part).strip(" '") for part in value] or [alone] if isinstance(value, list) else [alone]


def _same_year(gold: str, text: str) -> float:
    return float(gold.strip().lower() == text.strip().lower())


def _chart_part(gold: str, text: str) -> float:
    gold, text = (part.strip().strip("%").strip() for part in (gold, text))
    numbers = _number(gold), _number(text)
    if numbers[0] is not None and numbers[1] is not None:
        if numbers[0] == 0:
            return float(numbers[1] == 0)
        return float(abs(numbers[1] - numbers[0]) / abs(numbers[0]) <= TOLERANCE)
    left, right = (" ".join(part.lower().split()) for part in (text, gold))
    length = max(len(left.upper()), len(right.upper()))  # `ß` counts twice, as in the reference's package `anls`
    distance = edit_distance(left, right) / length if length else 0.0
    return 1 - distance if distance < SIMILAR else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.strip().strip("%"))
    except ValueError:
        return None


def multiple_choice(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Score whether an answer names the right option, by its letter or by its text.

    Source: the exact matching of VLMEvalKit (`vlmeval/utils/matching_util.py`: `can_infer_option`, then
    `can_infer_text`), without a model that judges what neither finds: such an answer is wrong. Options keep their
    order; none are shuffled. The branch for answers that report a failed call of an interface is left out.

    Rule: an answer that holds one of four refusals is wrong. The marks `.()[],:;!*#{}` become spaces. If exactly one
    letter of the options is a word of the answer, and one of its last four words where it first stands, it is chosen;
    if none is, and `Z` is, the answer is wrong. Next, the letter A to D behind the first `answer is` that one follows
    is chosen; case is ignored there and the letter may begin a word, so `the answer is a bus` chooses A, as in the
    reference. If nothing is chosen so, and the answer is at most twice as long as all options together, the option
    whose text it holds (case ignored) is chosen, where that is exactly one.

    Args:
        prediction: the model's answer.
        answers: the letter of the right option first, or its text.
        options: their texts, A first; without them the letters A to E are known, and no texts.

    Returns:
        1.0 or 0.0.

    Raises:
        EvaluationError: the right option is none of them.
    """
    gold = right_option(answers[0], options)
    if not gold:
        raise EvaluationError(f"the right option is {quoted(answers[0])}, which is none", "give its letter or its text")
    letters = string.ascii_uppercase[: len(options) or max(FEWEST_OPTIONS, string.ascii_uppercase.find(gold) + 1)]
    return float(chosen_option(prediction, dict(zip(letters, options or [""] * len(letters), strict=False))) == gold)


def right_option(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an expected answer is: by its letter, else by its text, ignoring case; "" for none.

    Args:
        answer: the expected one.
        options: their texts, A first; any letter is one where there are none.
    """
    answer = answer.strip()
    if len(answer) == 1 and answer.upper() in string.ascii_uppercase[: len(options) or None]:
        return answer.upper()
    same = [option.strip().lower() == answer.lower() for option in options[: len(string.ascii_uppercase)]]
    return string.ascii_uppercase[same.index(True)] if same.count(True) == 1 else ""


def chosen_option(prediction: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; None where it names none, or several.

    Args:
        prediction: the model's answer.
        options: letter -> text; an empty text is not looked for.
    """
    if any(refusal in prediction for refusal in _REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and _NO_CHOICE in words:
        return None
    stated = _STATED.search(prediction)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    text = prediction.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    held = [letter for letter, option in options.items() if option and option.lower() in text]
    return held[0] if len(held) == 1 else None


def choice_or_word(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Score RealWorldQA: the option where a letter is expected, else the word, ignoring case and a full stop behind it.

    Source: xAI 2024 (RealWorldQA), which comes without a rule. A multiple choice, of which the letter is expected, is
    scored as VLMEvalKit does (`multiple_choice`), another question as lmms-eval does (`tasks/realworldqa/utils.py`).
    lmms-eval looks for letters by a list of phrases of its own instead; short answers score alike.
    """
    gold = answers[0].strip()
    if len(gold) == 1 and gold in string.ascii_uppercase:
        return multiple_choice(prediction, [gold], options)
    return float(prediction.lower().strip().rstrip(".") == gold.lower())


def ocrbench(prediction: str, answers: Sequence[str], dataset: str = "", question_type: str = "") -> float:
    """Score whether an answer contains one of the expected texts, as OCRBench does.

    Source: Liu et al. 2024 (OCRBench, arXiv 2305.07895), as in the scripts of its repository (`OCRBench/example.py`);
    VLMEvalKit tells formulas by the type of question, which is the same set of questions.

    Rule: case is ignored, spaces at the ends go, line ends become spaces. In handwritten formulas (HME100k) case counts
    and all spaces go.

    Args:
        prediction: the model's answer.
        answers: the expected texts.
        dataset: the data set that a question comes from, as OCRBench names it.
        question_type: its type, as OCRBench names it.

    Returns:
        1.0 or 0.0.
    """
    formula = dataset == HANDWRITTEN_FORMULAS or question_type == FORMULA_QUESTION

    def form(text: str) -> str:
        text = text if formula else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text

    return float(any(form(answer) in form(prediction) for answer in answers))


def squad_normalize(text: str) -> str:
    """Bring an answer into the form in which SQuAD compares answers: no case, punctuation, articles, double spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_exact(prediction: str, answers: Sequence[str]) -> float:
    """Score SQuAD's exact match: equal to one of the answers in `squad_normalize`'s form.

    Source: as of `squad_f1`.
    """
    return float(squad_normalize(prediction) in _squad_expected(answers))


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """Score SQuAD's F1: overlap of words in `squad_normalize`'s form, the best over the answers.

    Source: Rajpurkar et al. 2016 and 2018 (SQuAD, SQuAD 2.0), as in the official script of 2.0: answers without words
    in that form are left aside; where none has any, the question has no answer: a prediction without words is right.
    """
    return max(_overlap(squad_normalize(prediction).split(), answer.split()) for answer in _squad_expected(answers))


def _squad_expected(answers: Sequence[str]) -> list[str]:
    """The answers in `squad_normalize`'s form; one empty text where a question has no answer."""
    return [form for form in map(squad_normalize, answers) if form] or [""]


def _overlap(given: list[str], expected: list[str]) -> float:
    if not given or not expected:
        return float(given == expected)
    same = sum((Counter(given) & Counter(expected)).values())
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(expected)
    return 2 * precision * recall / (precision + recall)
