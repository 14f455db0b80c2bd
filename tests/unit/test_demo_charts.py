"""Questions about synthetic charts: right answers, in balance, without ties."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from random import Random

import pytest

from tests.pictures import chart_spec
from vlm_sft.data.demo.chart_questions import chart_questions
from vlm_sft.data.demo.chart_reader import ChartQuestion
from vlm_sft.data.demo.charts import random_chart
from vlm_sft.data.demo.spec import CHART_TYPES, ChartSpec

CHARTS = 1000


@pytest.fixture(scope="module")
def asked() -> list[tuple[ChartSpec, ChartQuestion]]:
    """About 6,000 questions about 1,000 charts."""
    pairs = []
    for index in range(CHARTS):
        rng = Random(f"test/{index}")
        spec = random_chart(rng)
        pairs += [(spec, question) for question in chart_questions(spec, rng, 6)]
    return pairs


class Solver:
    """Answers a question from its text and the data table alone, by other means than the generator."""

    def __init__(self, spec: ChartSpec) -> None:
        self.spec = spec
        self.rows = {
            one.name: {name: Decimal(str(value)) for name, value in zip(spec.categories, one.values, strict=True)}
            for one in spec.series
        }
        self.series_colours = {one.paint.name: one.name for one in spec.series if one.paint is not None}
        self.category_colours = {
            paint.name: name for name, paint in zip(spec.categories, spec.category_paints, strict=False)
        }

    def row_of(self, text: str) -> tuple[str, dict[str, Decimal], str]:
        """The question without its series, the row that it speaks of, and that row's name."""
        if len(self.rows) == 1:
            return text, next(iter(self.rows.values())), ""
        names = "|".join(map(re.escape, self.rows))
        match = re.fullmatch(rf"(.*?) for (?:the (?P<colour>\w+) (?:bars|line)|(?P<name>{names}))([?,].*)", text)
        if match is None:
            return text, {}, ""
        name = match["name"] or self.series_colours[match["colour"]]
        return match[1] + match[4], self.rows[name], name

    def answers(self, text: str) -> Iterator[str | Decimal | bool | int | None]:
        short, row, name = self.row_of(text)
        for rules, subject in ((ROW_RULES, short), (CHART_RULES, text)):
            for pattern, rule in rules:
                match = re.fullmatch(pattern, subject)
                if match is not None:
                    yield rule(self, row, name, *match.groups())

    def solve(self, text: str) -> str:
        found = {spoken(answer) for answer in self.answers(text) if answer is not None}
        assert len(found) == 1, f"{text!r} has the answers {found}"
        return found.pop()


def spoken(answer: str | Decimal | bool | int) -> str:
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    if isinstance(answer, str):
        return answer
    return f"{Decimal(answer).normalize():f}"


def number(text: str) -> Decimal:
    return Decimal(text.rstrip("%"))


def top(row, word):
    return row and sorted(row, key=row.get, reverse=word in ("highest", "largest"))


def beats(word, one, other):
    up = word in ("higher", "larger", "above", "more than", "greater than", "taller", "increase", "rise", "grow")
    assert up or word in ("lower", "smaller", "below", "less than", "under", "shorter", "decrease", "fall", "drop"), (
        word
    )
    assert one != other
    return one > other if up else one < other


def only(row, value):
    names = [name for name in row if row[name] == number(value)]
    assert len(names) < 2
    return names[0] if names else None


def colour(solver, name):
    return next(
        (shade for shade, owner in (solver.category_colours | solver.series_colours).items() if owner == name), None
    )


def cell(solver, series, category):
    series = solver.series_colours.get(series, series)
    return solver.rows[series].get(category) if series and series in solver.rows else None


def gap(solver, one, other, category):
    first, second = cell(solver, one, category), cell(solver, other, category)
    return None if first is None or second is None else abs(first - second)


def parts(solver, word):
    many = {"line": len(solver.rows), "slice": len(solver.spec.categories)}
    return many.get(word, len(solver.spec.categories) * len(solver.rows))


def both(row, one, other):
    return row and one in row and other in row


# Rules that see a question without its series: (solver, row, name of the row, groups...).
ROW_RULES = [
    (r"What (?!colou?r).+ (?:in|on|for) (\S+)\?", lambda s, r, n, c: r.get(c) if len(s.rows) == 1 else None),
    (r"What (?:value|percentage) does (.+) have\?", lambda s, r, n, c: r.get(c)),
    (r"Which \w+ has (?:a value of|the value) (\S+)\?", lambda s, r, n, v: only(r, v)),
    (
        r"Wh\w+ \w+ (?:has|shows) the (highest|lowest|largest|smallest) (?:value|bar|slice)\?",
        lambda s, r, n, w: r and top(r, w)[0] or None,
    ),
    (
        r"(?:What|How much) is the (highest|lowest|largest|smallest) value\?",
        lambda s, r, n, w: r and r[top(r, w)[0]] or None,
    ),
    (
        r"Which \w+ has the second (highest|lowest|largest|smallest) value\?",
        lambda s, r, n, w: r and top(r, w)[1] or None,
    ),
    (
        r"What is the difference between the highest and the lowest value\?|How much larger is .+ than the smallest\?",
        lambda s, r, n: max(r.values()) - min(r.values()),
    ),
    (
        r"What is the difference between (.+) and (\S+)\?",
        lambda s, r, n, a, b: abs(r[a] - r[b]) if both(r, a, b) else None,
    ),
    (r"By how much do (.+) and (.+) differ\?", lambda s, r, n, a, b: abs(r[a] - r[b])),
    (r"What is the (?:sum|total) of (.+) and (.+)\?", lambda s, r, n, a, b: r[a] + r[b]),
    (r"What do (.+) and (.+) add up to\?", lambda s, r, n, a, b: r[a] + r[b]),
    (r"What is the (?:average value|mean of all \w+)\?", lambda s, r, n: sum(r.values()) / len(r)),
    (
        r"(?:How many \w+ have a value|For how many \w+ is the value|How many bars are) (.+?)(?: than)? (\d\S*)\?",
        lambda s, r, n, w, v: sum(
            beats(w if w not in ("more", "less", "greater") else w + " than", x, number(v)) for x in r.values()
        ),
    ),
    (
        r"Is (?:the value of )?(\S+) (\w+) than (?:that of )?([A-Z1-9]\S*)\?",
        lambda s, r, n, a, w, b: beats(w, r[a], r[b]) if b in r else None,
    ),
    (r"Does (\S+) have a (\w+) value than (\S+)\?", lambda s, r, n, a, w, b: beats(w, r[a], r[b])),
    (
        r"Is the value of (\S+) (above|below|more than|less than) (\d\S*)\?",
        lambda s, r, n, a, w, v: beats(w, r[a], number(v)),
    ),
    (
        r"Is the sum of (\S+) and (\S+) greater than (\S+)\?",
        lambda s, r, n, a, b, c: beats("higher", r[a] + r[b], r[c]),
    ),
    (r"Did the value (\w+) from (\S+) to (\S+)\?", lambda s, r, n, w, a, b: beats(w, r[b], r[a])),
    (
        r"Which (?:is|\w+ has a) (\w+)(?: value)?, (\S+) or (\S+)\?",
        lambda s, r, n, w, a, b: (a if beats(w, r[a], r[b]) else b) if both(r, a, b) else None,
    ),
    (r"What colou?r (?:are the bars|is the \w+|stands)\?", lambda s, r, n: colour(s, n)),
]
# Rules that see the whole question.
CHART_RULES = [
    (r"What is the value of (?:the )?(.+?)(?: bar| line)? (?:in|on|for) (\S+)\?", lambda s, r, n, a, c: cell(s, a, c)),
    (r"What is the (.+) value (?:in|on|for) (\S+)\?", lambda s, r, n, a, c: cell(s, a, c)),
    (r"How much is (.+) (?:in|on|for) (\S+)\?", lambda s, r, n, a, c: cell(s, a, c)),
    (
        r"(?:What|How much) is the (highest|lowest|largest|smallest) value in the whole chart\?",
        lambda s, r, n, w: (max if w in ("highest", "largest") else min)(
            v for row in s.rows.values() for v in row.values()
        ),
    ),
    (
        r"(?:What is the difference between|How far apart are) (.+) and (.+) (?:in|on|for) (\S+)\?",
        lambda s, r, n, a, b, c: gap(s, a, b, c),
    ),
    (
        r"(?:For how many \w+ is (.+) higher than|How many \w+ have more (.+) than) (.+)\?",
        lambda s, r, n, a, b, c: (
            sum(s.rows[a or b][x] > s.rows[c][x] for x in s.spec.categories) if c in s.rows else None
        ),
    ),
    (
        r"Which is (higher|lower) (?:in|on|for) (\S+), (.+) or (.+)\?",
        lambda s, r, n, w, c, a, b: (
            (a if beats(w, cell(s, a, c), cell(s, b, c)) else b) if a in s.rows and b in s.rows else None
        ),
    ),
    (
        r"Which \w+ has the largest gap between (.+) and (.+)\?",
        lambda s, r, n, a, b: max(s.spec.categories, key=lambda c: gap(s, a, b, c)),
    ),
    (r"What colou?r (?:is the \w+ for|stands for) (.+)\?", lambda s, r, n, a: colour(s, a)),
    (r"Which \w+ (?:does the|is shown in) (\w+)(?: \w+ represent)?\?", lambda s, r, n, a: s.category_colours[a]),
    (r"What (?:is shown in|does) (\w+)(?: stand for)?\?", lambda s, r, n, a: s.series_colours.get(a)),
    (
        r"(?:What is the value of|How much does) the (\w+) (?:bar|slice)(?: show)?\?",
        lambda s, r, n, a: next(iter(s.rows.values()))[s.category_colours[a]],
    ),
    (
        r"How many (\w+) are (?:shown|there)\?",
        lambda s, r, n, a: len(s.spec.categories) if a == s.spec.plural else None,
    ),
    (r"How many (bar|line|slice)s (?:are there in total|does the chart have)\?", lambda s, r, n, a: parts(s, a)),
    (r"How many rows of \w+ does the table have\?", lambda s, r, n: len(s.spec.categories)),
    (r"What is the title(?: of the chart)?\?", lambda s, r, n: s.spec.title),
    (r"Which \w+ is at the (?:far left|top)\?", lambda s, r, n: s.spec.categories[0]),
    (r"Which \w+ is at the (?:far right|bottom)\?", lambda s, r, n: s.spec.categories[-1]),
]


def test_answers_agree_with_an_independent_reader(asked):
    wrong = [
        f"{spec.chart_type}: {question.text} -> {question.answer}, not {solved}"
        for spec, question in asked
        if (solved := Solver(spec).solve(question.text)) != question.answer
    ]
    assert wrong == []
    assert len(asked) == 6 * CHARTS


def test_all_types_of_questions_occur_in_balance(asked):
    types = Counter(question.question_type for _, question in asked)
    assert set(types) == {
        "retrieval",
        "comparison",
        "arithmetic",
        "counting",
        "extreme",
        "yes/no",
        "colour",
        "structure",
    }
    assert min(types.values()) > 0.02 * len(asked)
    splits = Counter(question.split for _, question in asked)
    assert 0.35 < splits["augmented"] / len(asked) < 0.65
    replies = Counter(question.answer for _, question in asked if question.answer_type == "yes/no")
    assert set(replies) == {"Yes", "No"}
    assert 0.42 < replies["Yes"] / replies.total() < 0.58


def test_answer_types_fit_the_answers(asked):
    for _, question in asked:
        if question.answer_type == "number":
            assert re.fullmatch(r"\d+(\.\d{1,2})?", question.answer), question
            assert not question.answer.endswith(".0")
        elif question.answer_type == "text":
            assert question.answer and question.answer not in ("Yes", "No")


def test_questions_of_a_chart_differ_and_do_not_depend_on_their_number():
    for index in range(100):
        spec = chart_spec("train", index)
        six = chart_questions(spec, Random(index), 6)
        assert len({question.text for question in six}) == 6
        assert chart_questions(spec, Random(index), 3) == six[:3]


def test_values_have_no_ties_and_can_be_read(asked):
    types = Counter()
    for spec in dict.fromkeys(spec for spec, _ in asked):
        types[spec.chart_type] += 1
        values = [value for one in spec.series for value in one.values]
        assert values.count(max(values)) == values.count(min(values)) == 1
        for line in (*(one.values for one in spec.series), *zip(*(one.values for one in spec.series), strict=True)):
            assert len(set(line)) == len(line)
        if spec.chart_type == "pie":
            assert sum(values) == 100
        if not spec.value_labels:
            assert spec.axis
            assert all(value >= spec.tick_step and value * 2 % spec.tick_step == 0 for value in values)
            assert max(values) <= spec.axis_top
        if spec.unit == "%":
            assert max(values) <= 100
        names = [name for name, _ in spec.legend_entries()]
        assert len(set(names)) == len(names)
    assert set(types) == set(CHART_TYPES) and min(types.values()) > 50
