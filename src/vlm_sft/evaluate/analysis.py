"""Where a model errs: scores by category, the worst categories, examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vlm_sft.evaluate import statistics

Row = dict[str, Any]
FEWEST = 10  # questions that a category needs to be called one of the worst
WORST = 5
EXAMPLES = 3  # wrong answers shown of each of the worst categories
_LENGTHS = ((2, "1-2 characters"), (5, "3-5 characters"), (10, "6-10 characters"))
_LONGEST = "11 or more characters"


def answer_type(answers: Sequence[str]) -> str:
    """Sort an answer by its form: "yes/no", "number", "one word" or "several words".

    Args:
        answers: the references; of several, the one that most people gave.
    """
    text = _usual(answers).strip()
    if text.lower() in ("yes", "no"):
        return "yes/no"
    if re.fullmatch(r"[-+$€£]?\d[\d.,\s]*%?", text):
        return "number"
    return "one word" if len(text.split()) <= 1 else "several words"


def answer_length(answers: Sequence[str]) -> str:
    """Sort an answer by the length of its usual reference, in characters."""
    size = len(_usual(answers).strip())
    return next((name for limit, name in _LENGTHS if size <= limit), _LONGEST)


def _usual(answers: Sequence[str]) -> str:
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _size_classes(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Sort images into thirds by their area; every image counts once."""
    areas = sorted({statistics.cluster_of(row): row.get("image_pixels") or 0 for row in rows}.values())
    low, high = areas[len(areas) // 3], areas[2 * len(areas) // 3]
    if not low or areas[0] == areas[-1]:
        return lambda _: ""

    def name(row: Row) -> str:
        area = row.get("image_pixels") or 0
        if area < low:
            return f"small (below {low:,} pixels)"
        return f"middle ({low:,} to {high:,} pixels)" if area < high else f"large (from {high:,} pixels)"

    return name


def analyse(rows: Sequence[Row]) -> dict[str, Any]:
    """Break the scores of a benchmark down.

    Args:
        rows: lines of predictions.jsonl: `id`, `image`, `image_pixels`, `question`, `prediction`, `answers`, `split`,
            `question_type`, `score`; at least one.

    Returns:
        `categories`: {dimension: {category: {n, accuracy, interval}}} for the dimensions question_type, answer_type,
        split, image_size (thirds of the images) and answer_length; a dimension with one category only is left out.
        `worst`: the categories of at least `FEWEST` questions farthest below the overall accuracy, each with
        `dimension`, `category`, `n`, `accuracy`, `interval`, `below` (overall minus its accuracy), `significant`
        (its 95 % interval lies below the overall accuracy), and `examples`: wrong answers with id, image, question,
        prediction and answers.
    """
    dimensions: dict[str, Callable[[Row], str]] = {
        "question_type": lambda row: str(row.get("question_type") or ""),
        "answer_type": lambda row: answer_type(row["answers"]),
        "split": lambda row: str(row.get("split") or ""),
        "image_size": _size_classes(rows),
        "answer_length": lambda row: answer_length(row["answers"]),
    }
    overall = sum(row["score"] for row in rows) / len(rows)
    categories: dict[str, dict[str, Any]] = {}
    worst: list[dict[str, Any]] = []
    for dimension, kind in dimensions.items():
        parts: dict[str, list[Row]] = {}
        for row in rows:
            if category := kind(row):
                parts.setdefault(category, []).append(row)
        if len(parts) < 2:
            continue
        categories[dimension] = {name: _scores(parts[name]) for name in sorted(parts)}
        for name, members in parts.items():
            found = categories[dimension][name]
            if found["n"] >= FEWEST and found["accuracy"] < overall:
                worst.append(
                    {
                        "dimension": dimension,
                        "category": name,
                        **found,
                        "below": overall - found["accuracy"],
                        "significant": found["interval"][1] < overall,
                        "examples": _examples(members),
                    }
                )
    worst.sort(key=lambda entry: (-entry["below"], entry["dimension"], entry["category"]))
    return {"categories": categories, "worst": worst[:WORST]}


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
    scores = [float(row["score"]) for row in rows]
    interval = statistics.mean_interval(scores, [statistics.cluster_of(row) for row in rows])
    return {"n": len(rows), "accuracy": sum(scores) / len(scores), "interval": list(interval)}


def _examples(rows: Sequence[Row]) -> list[Row]:
    """The first wrong answers, each on another image where there are enough."""
    wrong = [row for row in rows if row["score"] < 0.5]
    first = list({statistics.cluster_of(row): row for row in reversed(wrong)}.values())[::-1]
    chosen = (first + [row for row in wrong if row not in first])[:EXAMPLES]
    return [{key: row.get(key) for key in ("id", "image", "question", "prediction", "answers")} for row in chosen]
