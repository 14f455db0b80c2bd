"""Synthetic signs: ten answers a question, and text that stays on the picture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import numpy
import pytest

from tests.pictures import sign_spec
from vlm_sft.data.demo.fonts import fonts, load_font
from vlm_sft.data.demo.generate import demo_samples
from vlm_sft.data.demo.sign_drawing import draw_sign
from vlm_sft.data.demo.sign_questions import ROLE_QUESTIONS, annotate, sign_questions
from vlm_sft.data.demo.signs import SIGN_TYPES, SIZES, SMALLEST_TEXT_PX, random_sign


@pytest.mark.parametrize("sign_type", list(SIGN_TYPES))
def test_text_is_large_enough_and_stays_on_the_picture(sign_type):
    for index in range(60):
        spec = random_sign(Random(f"{sign_type}/{index}"), sign_type)
        assert min(line.size_px for line in spec.lines) >= SMALLEST_TEXT_PX
        bare = dataclasses.replace(spec, scene="#ffffff", board="#ffffff", ink="#000000", border=0, noise=0)
        pixels = numpy.asarray(draw_sign(bare))
        edge = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edge.min() > 200, f"{spec} is clipped"
        assert pixels.min() < 100, "no text was drawn"


def test_lines_do_not_overlap():
    for index in range(300):
        spec = sign_spec("train", index)
        edges = []
        for line in spec.lines:
            _, top, _, bottom = load_font(line.font, line.size_px).getbbox(line.text, anchor="mm")
            edges += [line.centre_y + top, line.centre_y + bottom]
        assert edges == sorted(edges), spec


def test_sizes_are_few_and_made_of_whole_visual_tokens():
    assert len(SIZES) <= 4
    for index in range(200):
        spec = sign_spec("test", index)
        assert (spec.width, spec.height) in SIZES
        assert spec.width % 16 == 0 and spec.height % 16 == 0
        assert draw_sign(spec).size == (spec.width, spec.height)
        assert {line.font for line in spec.lines} <= set(fonts())


def test_ink_stands_out_from_the_board():
    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for kind in SIGN_TYPES.values():
        for board, ink in kind.boards:
            dark, light = sorted((luminance(board), luminance(ink)))
            # The contrast ratio that the W3C guidelines ask of normal text.
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (board, ink)


def test_every_question_has_ten_answers_and_the_target_is_the_most_common():
    for sample in demo_samples("demo_text", "train", 1500):
        assert len(sample.answers) == 10
        (first, count), *others = Counter(sample.answers).most_common()
        assert sample.target == first and all(number < count for _, number in others)
        assert all(answer.strip() for answer in sample.answers)
        assert sample.target == sample.target.lower()


def test_annotators_agree_to_a_varying_degree():
    """Accuracies by the leave-one-out rule take every value that it knows, and most targets are worth 1."""
    worth = Counter()
    for sample in demo_samples("demo_text", "validation", 1500):
        for answer in set(sample.answers):
            matches = sample.answers.count(answer)
            score = sum(min(1, (matches - (other == answer)) / 3) for other in sample.answers) / 10
            worth[round(score, 1), answer == sample.target] += 1
    assert {score for score, _ in worth} == {0.3, 0.6, 0.9, 1.0}
    targets = {score: count for (score, target), count in worth.items() if target}
    assert 0.85 < targets[1.0] / 1500 < 0.99


def test_targets_stand_on_the_sign():
    for index in range(300):
        spec = sign_spec("train", index)
        text = " ".join(line.text for line in spec.lines).lower()
        lines = {line.role: line.text.lower() for line in spec.lines}
        for question in sign_questions(spec, Random(index), 4):
            assert question.target in text
            if question.question_type in lines:
                assert question.target == lines[question.question_type]
            elif question.question_type == "top":
                assert question.target == spec.lines[0].text.lower()
            elif question.question_type == "last word":
                assert text.endswith(question.target) and " " not in question.target


def test_questions_of_a_sign_ask_for_different_things():
    for index in range(300):
        questions = sign_questions(sign_spec("train", index), Random(index), 4)
        assert len({question.question_type for question in questions}) == 4


def test_every_role_can_be_asked_for():
    roles = {role for kind in SIGN_TYPES.values() for seed in range(40) for role, _, _ in kind.write(Random(seed))}
    assert roles == set(ROLE_QUESTIONS)


@pytest.mark.parametrize("text", ["9", "$4.50", "12:45", "STOP", "Miller's Ice Cream", "a"])
def test_annotating_any_text_ends(text):
    for seed in range(200):
        assert len(annotate(text, Random(seed))) == 10
