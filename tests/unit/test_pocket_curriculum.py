"""The lessons of pocket: repeatable, answerable, in a layout the model accepts; and its tokenizer."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from PIL import Image

from tools.pocket import curriculum, table_lessons
from tools.pocket.canvas import CHARACTER_CLASSES, CHARACTERS, THING_CLASSES, Canvas, Record
from tools.pocket.chart_lessons import CHART_SIZES, chart
from tools.pocket.labels import FACT_CLASSES, FACTS, LOOKS, UNKNOWN
from tools.pocket.tokenizer import SPECIAL_TOKENS, build_tokenizer, vocabulary
from vlm_sft.data.demo.chart_questions import chart_questions
from vlm_sft.data.demo.charts import random_chart
from vlm_sft.data.demo.fonts import load_font

FINGERPRINT = """
import hashlib
from tools.pocket.curriculum import step_pictures
digest = hashlib.sha256()
for step in (0, 900, 2500, 4500, 7000, 7001, 7002, 7003):
    for picture in step_pictures(3, step):
        digest.update(picture.pixels.tobytes() + repr((picture.task, picture.questions)).encode())
print(digest.hexdigest())
"""


def _fingerprint(hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_the_same_seed_and_step_give_the_same_pictures_in_another_process() -> None:
    first = _fingerprint("1")
    assert len(first.strip()) == 64
    assert first == _fingerprint("2")


def test_seeds_and_steps_give_different_pictures() -> None:
    seen = [curriculum.step_pictures(seed, step)[0].pixels.tobytes() for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len(set(seen)) == 3


def test_training_refuses_the_seeds_of_the_test_pictures() -> None:
    with pytest.raises(AssertionError, match="test pictures"):
        curriculum.step_pictures(curriculum.HELD_OUT_SEED, 0)


@pytest.mark.parametrize("name", sorted(curriculum.LESSONS))
def test_pictures_of_a_step_have_one_size_and_questions_with_answers(name: str) -> None:
    for attempt in range(4):
        pictures = curriculum.lesson_pictures(name, Random(attempt))
        shapes = {picture.pixels.shape for picture in pictures}
        assert len(shapes) == 1
        height, width, channels = shapes.pop()
        assert height % 16 == 0 and width % 16 == 0 and channels == 3
        for picture in pictures:
            assert bool(picture.questions) == (name not in ("page", "view", "tiny view"))
            assert all(
                question.strip() == question and answer.strip() == answer != ""
                for question, answer in picture.questions
            )
            if picture.slots is not None:
                assert picture.slots.shape == (2, height // 8, width // 4)
                assert picture.slots[0].max() < CHARACTER_CLASSES
                assert picture.slots[1].max() < THING_CLASSES or (picture.slots[1] == UNKNOWN).all()
            if picture.facts is not None and picture.sought is not None:
                assert picture.facts.shape == (FACTS, height // 16, width // 16)
                assert (picture.facts[picture.facts != UNKNOWN] < FACT_CLASSES).all()
                assert picture.sought.shape == (LOOKS, len(picture.questions), height // 16, width // 16)


@pytest.mark.parametrize("anchor", ["ls", "ms", "rm", "lm", "mm"])
@pytest.mark.parametrize("degrees", [0.0, 5.0])
def test_a_record_knows_where_the_ink_of_every_character_is(anchor: str, degrees: float) -> None:
    image, record = Image.new("L", (160, 48), 255), Record(160, 48)
    draw = record.pen(image)
    draw.text((80, 24), "A8k", fill=0, font=load_font("sans", 20), anchor=anchor)
    ink = np.asarray(image.rotate(degrees, fillcolor=255)) < 128
    slots = record.slots(degrees)
    assert (slots[1] == UNKNOWN).all()
    covered = np.kron(slots[0] != 0, np.ones((8, 4), bool))
    assert ink[covered].sum() > 0.8 * ink.sum() > 0
    seen = [CHARACTERS[value - 1] for value in dict.fromkeys(slots[0].T.ravel()) if value]
    assert seen == ["A", "8", "k"]


def test_every_stage_names_known_lessons_and_stages_follow_each_other() -> None:
    starts = [start for start, _ in curriculum.STAGES]
    assert starts == sorted(set(starts)) and starts[0] == 0
    for _, weights in curriculum.STAGES:
        assert set(weights) <= set(curriculum.LESSONS)
    assert curriculum.lesson_weights(0) == curriculum.STAGES[0][1]
    assert curriculum.lesson_weights(10**6) == curriculum.STAGES[-1][1]


def test_easy_vqa_is_not_asked_in_its_own_words() -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    theirs = {question.lower() for question in easy_vqa.get_train_questions()[0]}
    ours = {
        question.lower() for picture in curriculum.held_out_pictures("shapes", 200) for question, _ in picture.questions
    }
    assert len(ours) > 50
    assert not ours & theirs


def test_no_question_on_a_chart_begins_as_those_of_the_demo_charts() -> None:
    rng = Random(1)
    ours = [question for _ in range(60) for size in CHART_SIZES[:2] for question, _ in chart(rng, size).questions]
    theirs = [one.text for _ in range(60) for one in chart_questions(random_chart(rng), rng, 8)]
    first_words = [{question.casefold().split()[0] for question in questions} for questions in (ours, theirs)]
    assert {"what", "which", "how", "is", "does"} <= first_words[1], "theirs are sentences"
    assert not first_words[0] & first_words[1]


def test_comparisons_are_right_and_of_every_kind() -> None:
    seen = set()
    for seed in range(60):
        _, labels, values = table_lessons.small_table(Random(seed), (96, 48))
        numbers = {label.lower(): int(value) for label, value in zip(labels, values, strict=True)}
        for question, answer in table_lessons.compare(Random(seed), (96, 48)).questions:
            sign = re.search(r"^(.+) ([<>]) (.+?)[?.]$", question)
            if not sign:
                names = re.search(r": (.+?)(?:,| or| /) (.+?)[?.]$", question)
                assert names, question
                choose = max if re.search("(?i)more|greater", question) else min
                assert answer == choose(names.groups(), key=lambda name: numbers[name.lower()])
                seen.add(choose.__name__)
                continue
            first, over, second = sign[1].lower(), sign[2] == ">", sign[3].lower()
            level = numbers.get(second, int(second) if second.isdigit() else None)
            assert level is not None, question
            if first == "count the labels":
                assert answer == str(sum(one > level if over else one < level for one in numbers.values()))
            else:
                assert answer == ("Yes" if (numbers[first] > level if over else numbers[first] < level) else "No")
            seen.add(first if " " in first else second.isdigit())
    assert seen == {"max", "min", "count the labels", True, False}


def test_sums_and_differences_are_right_and_differences_not_negative() -> None:
    seen = set()
    for seed in range(30):
        _, labels, values = table_lessons.small_table(Random(seed), (96, 48), 2)
        numbers = {label.lower(): int(value) for label, value in zip(labels, values, strict=True)}
        for question, answer in table_lessons.add(Random(seed), (96, 48)).questions:
            asked = re.fullmatch(r"(.+) ([+-]) (.+)\?", question.lower())
            assert asked, question
            one, sign, other = asked.groups()
            assert int(answer) == numbers[one] + (numbers[other] if sign == "+" else -numbers[other]) >= 0
            seen.add(sign)
    assert seen == {"+", "-"}


GRID = {"Oslo": {"tea": 40, "milk": 7, "jam": 93}, "Rome": {"tea": 12, "milk": 88, "jam": 5}}
COMPARE = {"<": operator.lt, ">": operator.gt, "+": operator.add, "-": operator.sub}


def _from_grid(question: str) -> str:
    """The answer to a question about GRID, found from its words alone."""
    named = re.findall(r"Oslo|Rome|tea|milk|jam", question)
    heads, sides = [name for name in named if name in GRID], [name for name in named if name not in GRID]
    if len(heads) == 2 and not sides:
        return str(sum(GRID[heads[0]][side] > GRID[heads[1]][side] for side in GRID["Oslo"]))
    values = [GRID[head][side] for head in heads for side in sides]
    if level := re.search(r"([<>]) (\d+)", question):
        if question.startswith("Count"):
            return str(sum(COMPARE[level[1]](value, int(level[2])) for value in GRID[heads[0]].values()))
        return "Yes" if COMPARE[level[1]](values[0], int(level[2])) else "No"
    if sign := re.search(r" ([<>+-]) ", question):
        found = COMPARE[sign[1]](*values)
        return {True: "Yes", False: "No"}.get(found, str(found)) if sign[1] in "<>" else str(found)
    if len(values) == 1:
        return str(values[0])
    chosen = (max if re.search("More|greater", question) else min)(values)
    return (heads if len(heads) == 2 else sides)[values.index(chosen)]


def test_questions_on_a_grid_have_the_answers_of_its_cells() -> None:
    columns = [list(column.values()) for column in GRID.values()]
    pairs = {
        pair
        for seed in range(60)
        for pair in table_lessons._grid_questions(Random(seed), list(GRID), list(GRID["Oslo"]), columns)
    }
    assert [(question, answer) for question, answer in sorted(pairs) if answer != _from_grid(question)] == []
    kinds = {re.sub(r"Oslo|Rome|tea|milk|jam|\d+", "", question) for question, _ in pairs}
    assert len(pairs) > 150 and len(kinds) >= 14


def test_the_map_of_characters_follows_the_text() -> None:
    canvas = Canvas(96, 32, (255, 255, 255))
    canvas.text(4, 24, "A7", "sans bold", 24, (0, 0, 0))
    slots = canvas.slots()[0]
    found = {CHARACTERS[number - 1] for number in set(slots.reshape(-1).tolist()) - {0}}
    assert found == {"A", "7"}
    columns = [np.flatnonzero((slots == CHARACTERS.index(character) + 1).any(axis=0)) for character in "A7"]
    assert columns[0].max() < columns[1].min()
    assert columns[0].min() == 1


def test_the_map_of_things_follows_shapes_and_coloured_text() -> None:
    canvas = Canvas(64, 64, (255, 255, 255))
    canvas.shape("circle", (0, 0, 15, 15), (200, 0, 0), "red")
    canvas.shape("rectangle", (32, 32, 63, 63), (200, 0, 0), "red")
    canvas.text(32, 12, "III", "sans bold", 16, (0, 0, 200), "blue")
    things = canvas.slots()[1]
    assert things[6, 10] != things[0, 2] > 0, "a rectangle is no circle"
    assert things[0, 9] not in (0, things[0, 2], things[6, 10])
    assert things[6, 2] == 0
    assert (things > 0).sum() == (things[:2, :4] > 0).sum() + (things[:2, 8:] > 0).sum() + 4 * 8


def test_colours_of_shapes_are_named_right() -> None:
    from vlm_sft.data.demo.vocabulary import COLOURS

    shades = {
        name: np.array([[int(shade[at : at + 2], 16) for at in (1, 3, 5)] for shade in options])
        for name, options in COLOURS.items()
    }
    checked = 0
    for picture in curriculum.held_out_pictures("shapes", 300):
        for question, answer in picture.questions:
            if question.lower() not in ("name the colour.", "which colour do you see?"):
                continue
            paper = picture.pixels[0, 0].astype(int)
            ink = picture.pixels[np.abs(picture.pixels.astype(int) - paper).sum(-1) > 30].mean(axis=0)
            nearest = min(shades, key=lambda name: np.abs(shades[name] - ink).sum(-1).min())
            checked += 1
            assert nearest == answer or np.abs(shades[answer] - ink).sum(-1).min() < 40
    assert checked > 20


def test_the_tokenizer_returns_what_it_was_given() -> None:
    tokenizer = build_tokenizer()
    for text in (
        "What is the value of the blue bar for March?",
        "café 12.5% \n «naïve» 日本 🙂",
        "  two  spaces\t",
        "assistant user",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_digits_are_single_tokens_and_answers_are_spelled() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("2024").input_ids) == list("2024")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Bakery").input_ids) == list("Bakery")
    assert len(tokenizer("What is the value of the blue bar").input_ids) == 8


def test_special_tokens_are_one_id_each_and_the_vocabulary_is_small() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer(token).input_ids for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(SPECIAL_TOKENS)
    assert len(tokenizer) < 1200
    tokens, merges = vocabulary()
    assert sorted(tokens.values()) == list(range(len(tokens)))
    assert all(left + right in tokens for left, right in merges)
