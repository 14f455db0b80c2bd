"""VQA accuracy and its normaliser, against a second implementation written from the rules."""

import itertools
import json
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.vqa_rule import vqa_accuracy, vqa_normalize

CONTRACTIONS = json.loads(files("vlm_sft.evaluate").joinpath("vqa_contractions.json").read_text(encoding="utf-8"))


def normalise_by_regex(text: str) -> str:
    """The same rules, written with regular expressions and a character loop instead of replacements."""
    text = re.sub("'s", " 's", re.sub("[,?]", "", text.lower())).strip()
    text = re.sub("[\n\t]", " ", text).strip()
    beside_space = {mark for pair in re.findall(r"(?=(..))", text, re.DOTALL) if " " in pair for mark in pair}
    characters = []
    for character in text:
        if character in ';/[]"{}()=+\\_-><@`,?!':
            characters.append("" if character in beside_space else " ")
        else:
            characters.append(character)
    text = "".join(characters)
    kept, removed = [], 0
    for index, character in enumerate(text):
        followed_by_digit = index + 1 < len(text) and re.match(r"\d", text[index + 1])
        if character == "." and not followed_by_digit and removed < 32:
            removed += 1
        else:
            kept.append(character)
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    words = []
    for word in "".join(kept).split():
        if word == "none":
            word = "0"
        elif word in numbers:
            word = str(numbers.index(word))
        if not re.fullmatch("a|an|the", word):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont", "don't"),
        ("Ive", "ive"),  # upper-case keys of the table never match
        ("don't", "don't"),
        ("1,000", "1000"),
        ("what?", "what"),
        ("john's", "john 's"),
        ("a-b", "b"),  # the hyphen becomes a space, then the article goes
        ("x-y", "x y"),
        ("x -y-z", "x yz"),  # next to a space anywhere: removed everywhere
        ("x- y", "x y"),
        ("-x", "x"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("e.g.", "eg"),
        ("u.s.a", "usa"),
        (".5", ".5"),
        ("10:30 am", "10:30 am"),
        ("$5 & 6%*", "$5 & 6%*"),
        ("Café", "café"),
        ("a\nb\tc", "b c"),
        ("x-\ny", "x y"),  # a newline is a space by then
        ("x-\ry", "x y"),  # other white space is none: the mark becomes a space
        ("  ", ""),
        ("the", ""),
        ("the the", ""),
        ("two's", "2 's"),
        ("it's, isn't?", "it 's isn't"),
        ("." * 40, "." * 8),
        ("." * 40 + "5", "." * 8 + "5"),
        ("nine-to_five", "9 to 5"),
    ],
)
def test_normalise_examples(text, expected):
    assert vqa_normalize(text) == expected
    assert normalise_by_regex(text) == expected


WORDS = ["a", "the", "An", "None", "two", "TEN", "dont", "youre", "Ive", "it's", "3.5", "1,000", "St.", "...", "é", "%"]
PIECES = st.one_of(st.sampled_from(WORDS), st.sampled_from(list(";/[]\"{}()=+\\_-><@`,?!.:'$ \n\t\r 9")))


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=20).map("".join))
def test_normalise_equals_second_implementation_on_answers(text):
    assert vqa_normalize(text) == normalise_by_regex(text)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_normalise_equals_second_implementation_on_any_text(text):
    assert vqa_normalize(text) == normalise_by_regex(text)


def test_contraction_table_is_the_published_one():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["couldnt've"] == "couldn't've"


@pytest.mark.parametrize(("matching", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_leave_one_out_by_number_of_matches(matching, score):
    assert vqa_accuracy("Stop!", ["stop"] * matching + ["go"] * (10 - matching)) == score


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "the red", "Red.", "blue", "2", "two"]), min_size=10, max_size=10))
def test_accuracy_equals_averaging_over_the_subsets_of_nine(answers):
    for prediction in ("red", "two", "green"):
        parts = []
        for nine in itertools.combinations(answers, 9):
            matches = sum(normalise_by_regex(answer) == normalise_by_regex(prediction) for answer in nine)
            parts.append(min(1, matches / 3))
        assert vqa_accuracy(prediction, answers) == pytest.approx(sum(parts) / 10)


@pytest.mark.parametrize("count", [0, 1, 9, 11])
def test_other_than_ten_answers_is_a_data_error(count):
    with pytest.raises(EvaluationError, match=f"exactly 10 answers, got {count}"):
        vqa_accuracy("x", ["x"] * count)


def test_an_empty_prediction_matches_only_empty_answers():
    assert vqa_accuracy("", ["stop"] * 10) == 0
    assert vqa_accuracy("the", ["a"] * 4 + ["stop"] * 6) == 1
