"""The breakdown of scores by category."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_sft.evaluate.analysis import EXAMPLES, WORST, analyse, answer_length, answer_type
from vlm_sft.evaluate.statistics import mean_interval


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Yes"], "yes/no"),
        (["no"], "yes/no"),
        (["1,234.5"], "number"),
        (["62%"], "number"),
        (["$5"], "number"),
        (["-3"], "number"),
        (["2015"], "number"),
        (["blue"], "one word"),
        (["New York"], "several words"),
        (["[2013, 2014]"], "several words"),
        (["red", "blue", "blue sky", "blue sky"], "several words"),
        ([], "one word"),
    ],
)
def test_answer_types(answers: list[str], expected: str) -> None:
    assert answer_type(answers) == expected


def test_answer_lengths() -> None:
    sizes = {answer_length(["x" * size]) for size in (1, 2)}, {answer_length(["x" * size]) for size in (3, 5)}
    assert sizes == ({"1-2 characters"}, {"3-5 characters"})
    assert [answer_length(["x" * size]) for size in (10, 11)] == ["6-10 characters", "11 or more characters"]


def rows() -> list[dict[str, Any]]:
    """90 questions on 30 images; numbers on large images are the weak spot."""
    made = []
    for number in range(90):
        image = number // 3
        answer = ("no", "7", "blue")[number % 3]
        wrong = answer == "7" and image >= 15
        made.append(
            {
                "id": f"q{number}",
                "image": f"i{image}",
                "image_pixels": 1000 + 100 * image,
                "question": f"?{number}",
                "prediction": "?",
                "answers": [answer],
                "split": "human" if image % 2 else "augmented",
                "question_type": "",
                "score": 0.0 if wrong else 1.0,
            }
        )
    return made


def test_categories_partition_the_questions_and_recompute() -> None:
    found = analyse(rows())
    assert set(found["categories"]) == {"answer_type", "split", "image_size", "answer_length"}  # no question types
    for parts in found["categories"].values():
        assert sum(part["n"] for part in parts.values()) == 90
    sizes = found["categories"]["image_size"]
    assert [part["n"] for part in sizes.values()] == [30, 30, 30]
    numbers = found["categories"]["answer_type"]["number"]
    scores = [row["score"] for row in rows() if row["answers"] == ["7"]]
    assert numbers["accuracy"] == 0.5
    assert numbers["interval"] == list(mean_interval(scores))


def test_the_weak_spot_comes_first_with_wrong_answers_on_different_images() -> None:
    worst = analyse(rows())["worst"]
    first = worst[0]
    assert (first["dimension"], first["category"]) == ("answer_type", "number")
    assert first["significant"]
    assert first["below"] == pytest.approx(75 / 90 - 0.5)
    assert len(worst) <= WORST
    assert len({example["image"] for example in first["examples"]}) == EXAMPLES
    assert all(example["answers"] == ["7"] for example in first["examples"])


def test_small_categories_are_not_called_worst() -> None:
    few = rows()[:9]
    few[1]["score"] = 0.0
    assert analyse(few)["worst"] == []


def test_images_of_one_size_have_no_size_classes() -> None:
    same = [row | {"image_pixels": 500} for row in rows()]
    assert "image_size" not in analyse(same)["categories"]
