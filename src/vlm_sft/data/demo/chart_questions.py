"""Questions about synthetic charts, answered from the data table.

In the spirit of ChartQA (Masry et al. 2022, arXiv 2203.10244, section 3): its "augmented" questions read one value off
the chart, its "human" questions compare, count, add, look for extremes, or speak of colours and positions. As in
ChartQA an answer is one word or one number, and a number carries no percent sign.
"""

from __future__ import annotations

from random import Random

from vlm_sft.data.demo.appearance_questions import APPEARANCE
from vlm_sft.data.demo.chart_reader import ChartQuestion, ChartReader, Maker, make_question
from vlm_sft.data.demo.spec import ChartSpec

HIGH_WORDS, LOW_WORDS = ("highest", "largest"), ("lowest", "smallest")
# How often a retrieval is tried; some are asked already, which leaves both splits of ChartQA about equally large.
RETRIEVAL_FRACTION = 0.6


def chart_questions(spec: ChartSpec, rng: Random, count: int) -> list[ChartQuestion]:
    """Ask `count` different questions about a chart.

    Args:
        spec: the chart.
        rng: the only source of randomness; the first questions do not depend on `count`.
        count: how many questions, at most about ten: small charts do not offer more.
    """
    asked: dict[tuple[Maker, str], ChartQuestion] = {}
    for _ in range(40 * count):
        if len(asked) == count:
            break
        retrieval = rng.random() < RETRIEVAL_FRACTION
        makers, weights = zip(*(RETRIEVALS if retrieval else REASONINGS), strict=True)
        maker = rng.choices(makers, weights=weights)[0]
        question = maker(ChartReader(spec, rng))
        if question is not None:
            # One phrasing of a question is enough for one chart.
            asked.setdefault((maker, question.answer), question)
    assert len(asked) == count, f"only {len(asked)} of {count} questions about {spec}"
    return list(asked.values())


def _value_of(ask: ChartReader) -> ChartQuestion | None:
    """Read one value of a chart with one series."""
    if not ask.single:
        return None
    index = ask.rng.randrange(len(ask.spec.categories))
    category, value = ask.spec.categories[index], ask.spec.series[0].values[index]
    phrases = ["What is the value {where}?", "What value is shown {where}?", "What value does {category} have?"]
    if ask.spec.title.startswith(ask.spec.measure):
        verb = "are" if ask.spec.measure.endswith("s") and ask.spec.measure != "Success" else "is"
        phrases += [f"What {verb} the {ask.spec.measure.lower()} {{where}}?"] * 2
    if ask.spec.unit:
        phrases += ["What is the percentage {where}?", "What percentage does {category} have?"]
    return make_question("retrieval", ask.text(*phrases, where=ask.where(category), category=category), value)


def _cell(ask: ChartReader) -> ChartQuestion | None:
    """Read one value of a chart with several series."""
    if ask.single:
        return None
    one = ask.rng.choice(ask.spec.series)
    index = ask.rng.randrange(len(ask.spec.categories))
    words = {"where": ask.where(ask.spec.categories[index]), "category": ask.spec.categories[index], "name": one.name}
    phrases = [
        "What is the value of {name} {where}?",
        "What is the {name} value {where}?",
        "How much is {name} {where}?",
    ]
    if one.paint is not None:
        words["colour"] = one.paint.name
        phrases += ["What is the value of the {colour} {part} {where}?"]
    return make_question("retrieval", ask.text(*phrases, **words), one.values[index])


def _category_with(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    category, value = ask.rng.choice(list(row.items()))
    text = ask.text(
        "Which {noun} has a value of {value}{suffix}?",
        "Which {noun} has the value {value}{suffix}?",
        value=ask.spec.printed(value),
        suffix=suffix,
    )
    return make_question("retrieval", text, category)


def _extreme_category(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    high = ask.rng.random() < 0.5
    word = ask.rng.choice(HIGH_WORDS if high else LOW_WORDS)
    phrases = ["Which {noun} has the {word} value{suffix}?", "What {noun} shows the {word} value{suffix}?"]
    if ask.single and ask.part in ("bar", "slice"):
        phrases.append("Which {noun} has the {word} {part}?")
    text = ask.text(*phrases, word=word, suffix=suffix)
    return make_question("extreme", text, (max if high else min)(row, key=row.__getitem__))


def _extreme_value(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    high = ask.rng.random() < 0.5
    word = ask.rng.choice(HIGH_WORDS if high else LOW_WORDS)
    values = list(row.values())
    if not ask.single and ask.rng.random() < 0.3:
        suffix, values = " in the whole chart", [value for one in ask.spec.series for value in one.values]
    text = ask.text(
        "What is the {word} value{suffix}?", "How much is the {word} value{suffix}?", word=word, suffix=suffix
    )
    return make_question("extreme", text, max(values) if high else min(values))


def _ranked_category(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    ranked = sorted(row, key=row.__getitem__, reverse=True)
    if len(ranked) < 4:
        return None
    high = ask.rng.random() < 0.5
    word = ask.rng.choice(HIGH_WORDS if high else LOW_WORDS)
    text = ask.text("Which {noun} has the second {word} value{suffix}?", word=word, suffix=suffix)
    return make_question("extreme", text, ranked[1 if high else -2])


def _range(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    text = ask.text(
        "What is the difference between the highest and the lowest value{suffix}?",
        "How much larger is the largest value than the smallest{suffix}?",
        suffix=suffix,
    )
    return make_question("arithmetic", text, max(row.values()) - min(row.values()))


def _difference(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    one, other = ask.pair()
    text = ask.text(
        "What is the difference between {one} and {other}{suffix}?",
        "By how much do {one} and {other} differ{suffix}?",
        one=one,
        other=other,
        suffix=suffix,
    )
    return make_question("arithmetic", text, abs(row[one] - row[other]))


def _sum(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    one, other = ask.pair()
    text = ask.text(
        "What is the sum of {one} and {other}{suffix}?",
        "What do {one} and {other} add up to{suffix}?",
        "What is the total of {one} and {other}{suffix}?",
        one=one,
        other=other,
        suffix=suffix,
    )
    return make_question("arithmetic", text, row[one] + row[other])


def _mean(ask: ChartReader) -> ChartQuestion | None:
    """The average, where it needs no rounding."""
    row, suffix = ask.row()
    mean = sum(row.values()) / len(row)
    if len(row) > 5 or abs(mean - round(mean, 1)) > 1e-9 or ask.spec.chart_type == "pie":
        return None
    text = ask.text("What is the average value{suffix}?", "What is the mean of all {plural}{suffix}?", suffix=suffix)
    return make_question("arithmetic", text, mean)


def _series_gap(ask: ChartReader) -> ChartQuestion | None:
    if ask.single:
        return None
    one, other = ask.rng.sample(ask.spec.series, 2)
    index = ask.rng.randrange(len(ask.spec.categories))
    text = ask.text(
        "What is the difference between {one} and {other} {where}?",
        "How far apart are {one} and {other} {where}?",
        one=one.name,
        other=other.name,
        where=ask.where(ask.spec.categories[index]),
    )
    return make_question("arithmetic", text, abs(one.values[index] - other.values[index]))


def _count_beyond(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    values = list(row.values())
    level = ask.threshold(values)
    if level is None:
        return None
    above = ask.rng.random() < 0.5
    word = ask.rng.choice(("above", "more than", "greater than") if above else ("below", "less than", "under"))
    phrases = [
        "How many {plural} have a value {word} {level}{suffix}?",
        "For how many {plural} is the value {word} {level}{suffix}?",
    ]
    if ask.single and ask.spec.chart_type == "bar":
        phrases.append("How many bars are {taller} than {level}?")
    text = ask.text(*phrases, word=word, level=ask.level(level), suffix=suffix, taller="taller" if above else "shorter")
    return make_question("counting", text, sum((value > level) == above for value in values))


def _count_wins(ask: ChartReader) -> ChartQuestion | None:
    if ask.single:
        return None
    one, other = ask.rng.sample(ask.spec.series, 2)
    text = ask.text(
        "For how many {plural} is {one} higher than {other}?",
        "How many {plural} have more {one} than {other}?",
        one=one.name,
        other=other.name,
    )
    wins = sum(first > second for first, second in zip(one.values, other.values, strict=True))
    return make_question("counting", text, wins)


def _more_than_other(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    one, other = ask.pair()
    more = ask.rng.random() < 0.5
    text = ask.text(
        "Is the value of {one} {word} than that of {other}{suffix}?",
        "Does {one} have a {word} value than {other}{suffix}?",
        "Is {one} {word} than {other}{suffix}?",
        one=one,
        other=other,
        suffix=suffix,
        word=ask.rng.choice(("higher", "larger") if more else ("lower", "smaller")),
    )
    return make_question("yes/no", text, (row[one] > row[other]) == more)


def _beyond_level(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    level = ask.threshold(list(row.values()))
    if level is None:
        return None
    wanted, above = ask.rng.random() < 0.5, ask.rng.random() < 0.5
    category = ask.rng.choice([name for name, value in row.items() if ((value > level) == above) == wanted])
    text = ask.text(
        "Is the value of {category} {word} {level}{suffix}?",
        category=category,
        level=ask.level(level),
        suffix=suffix,
        word=ask.rng.choice(("above", "more than") if above else ("below", "less than")),
    )
    return make_question("yes/no", text, wanted)


def _sum_beyond(ask: ChartReader) -> ChartQuestion | None:
    """Whether two values together exceed a third; both answers are equally likely where both occur."""
    row, suffix = ask.row()
    wanted = ask.rng.random() < 0.5
    if len(row) < 3:
        return None
    for _ in range(12):
        one, other, third = ask.rng.sample(ask.spec.categories, 3)
        excess = round(row[one] + row[other] - row[third], 2)
        if excess != 0 and (excess > 0) == wanted:
            words = {"one": one, "other": other, "third": third, "suffix": suffix}
            text = ask.text("Is the sum of {one} and {other} greater than {third}{suffix}?", **words)
            return make_question("yes/no", text, wanted)
    return None


def _trend(ask: ChartReader) -> ChartQuestion | None:
    if ask.spec.noun not in ("year", "month", "quarter", "day"):
        return None
    row, suffix = ask.row()
    index = ask.rng.randrange(len(ask.spec.categories) - 1)
    one, other = ask.spec.categories[index : index + 2]
    up = ask.rng.random() < 0.5
    text = ask.text(
        "Did the value {word} from {one} to {other}{suffix}?",
        one=one,
        other=other,
        suffix=suffix,
        word=ask.rng.choice(("increase", "rise", "grow") if up else ("decrease", "fall", "drop")),
    )
    return make_question("yes/no", text, (row[other] > row[one]) == up)


def _larger_category(ask: ChartReader) -> ChartQuestion | None:
    row, suffix = ask.row()
    one, other = ask.pair()
    more = ask.rng.random() < 0.5
    word = ask.rng.choice(("higher", "larger") if more else ("lower", "smaller"))
    text = ask.text(
        "Which {noun} has a {word} value{suffix}, {one} or {other}?",
        "Which is {word}{suffix}, {one} or {other}?",
        one=one,
        other=other,
        suffix=suffix,
        word=word,
    )
    return make_question("comparison", text, one if (row[one] > row[other]) == more else other)


def _larger_series(ask: ChartReader) -> ChartQuestion | None:
    if ask.single:
        return None
    one, other = ask.rng.sample(ask.spec.series, 2)
    index = ask.rng.randrange(len(ask.spec.categories))
    more = ask.rng.random() < 0.5
    text = ask.text(
        "Which is {word} {where}, {one} or {other}?",
        one=one.name,
        other=other.name,
        where=ask.where(ask.spec.categories[index]),
        word="higher" if more else "lower",
    )
    return make_question(
        "comparison", text, one.name if (one.values[index] > other.values[index]) == more else other.name
    )


def _widest_gap(ask: ChartReader) -> ChartQuestion | None:
    if ask.single:
        return None
    one, other = ask.rng.sample(ask.spec.series, 2)
    cells = zip(one.values, other.values, ask.spec.categories, strict=True)
    gaps = sorted((round(abs(first - second), 2), name) for first, second, name in cells)
    # A gap must stand out by a fifth: lengths between two lines or bars are harder to compare than heights.
    if gaps[-1][0] < 1.2 * gaps[-2][0]:
        return None
    text = ask.text("Which {noun} has the largest gap between {one} and {other}?", one=one.name, other=other.name)
    return make_question("comparison", text, gaps[-1][1])


RETRIEVALS: tuple[tuple[Maker, float], ...] = ((_value_of, 4), (_cell, 4), (_category_with, 1))
REASONINGS: tuple[tuple[Maker, float], ...] = (
    (_extreme_category, 3),
    (_extreme_value, 2),
    (_ranked_category, 1),
    (_range, 1.5),
    (_difference, 1.5),
    (_sum, 1.5),
    (_mean, 1),
    (_series_gap, 1.5),
    (_count_beyond, 2),
    (_count_wins, 1.5),
    (_more_than_other, 2),
    (_beyond_level, 1.5),
    (_sum_beyond, 1),
    (_trend, 1.5),
    (_larger_category, 1.5),
    (_larger_series, 1.5),
    (_widest_gap, 0.7),
    *APPEARANCE,
)
