"""Which items can be scored: the keys of a line of predictions, and what a rule needs in them."""

from __future__ import annotations

from typing import Any

from vlm_sft.common.errors import EvaluationError, quoted
from vlm_sft.evaluate.answer_rules import multiple_choice, right_option
from vlm_sft.evaluate.metrics import Benchmark

LISTS = ("year", "options")  # what a rule may need besides the answers: lists of texts; the rest is text

_JSON_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _json_name(value: Any) -> str:
    return _JSON_NAMES[type(value)]


def why_unusable(item: Any, benchmark: Benchmark) -> str:
    """Say why an item cannot be scored.

    Args:
        item: one decoded JSON line: an object with `id`, `prediction`, `answers` and perhaps `split`.
        benchmark: whose rule will score it.

    Returns:
        The reason in a few words, or "" when the item is good.
    """
    if not isinstance(item, dict):
        return f"is {_json_name(item)}, not a JSON object"
    missing = [key for key in ("id", "prediction", "answers") if key not in item]
    if missing:
        return f"has no {' and no '.join(repr(key) for key in missing)}"
    if isinstance(item["id"], bool) or not isinstance(item["id"], int | str):
        return f"'id' is {_json_name(item['id'])}, not text or an integer"
    if not isinstance(item["prediction"], str):
        return f"'prediction' is {_json_name(item['prediction'])}, not text; put it in quotes"
    if benchmark.grading is not None and not isinstance(item.get("question"), str):
        return "has no 'question', which a judge reads"
    if not isinstance(item.get("split") or "", str):
        return f"'split' is {_json_name(item['split'])}, not text"
    for key in benchmark.needs:
        listed = isinstance(item.get(key), list) and all(isinstance(part, str) for part in item[key])
        if item.get(key) is not None and not (listed if key in LISTS else isinstance(item[key], str)):
            return f"{key!r} is {_json_name(item[key])}, not {'a list of texts' if key in LISTS else 'text'}"
    reason = _why_answers_unusable(item["answers"], benchmark)
    if (
        not reason
        and benchmark.metric is multiple_choice
        and not right_option(item["answers"][0], item.get("options") or ())
    ):
        reason = f"the right answer is {quoted(item['answers'][0])}: no letter of an option, and no option's text"
    return reason


def _why_answers_unusable(answers: Any, benchmark: Benchmark) -> str:
    if not isinstance(answers, list):
        return f"'answers' is {_json_name(answers)}, not a list of texts; put even a single answer in [ ]"
    for number, answer in enumerate(answers, start=1):
        if not isinstance(answer, str):
            return f"answer {number} of 'answers' is {_json_name(answer)}, not text; put it in quotes"
    if not answers:
        return "'answers' is empty"
    if benchmark.answers_needed not in (None, len(answers)):
        return f"'answers' holds {len(answers)}, but {benchmark.name} needs exactly {benchmark.answers_needed}"
    return ""


def require_usable(row: Any, benchmark: Benchmark) -> None:
    """Refuse an item that cannot be scored.

    Raises:
        EvaluationError: it cannot; the message names its id.
    """
    reason = why_unusable(row, benchmark)
    if reason:
        name = row.get("id") if isinstance(row, dict) else row
        raise EvaluationError(f"{benchmark.name}: item {quoted(name)} {reason}", "write the predictions again")
