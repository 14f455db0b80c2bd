"""ChartQA's relaxed correctness, exact match, ANLS and the registry, from their rules."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.metrics import (
    BENCHMARKS,
    anls,
    exact_match,
    get_benchmark,
    relaxed_correctness,
    relaxed_correctness_strict_years,
)


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("21", "20", True),
        ("0.315", "0.3", False),  # 0.0500000000000000444 relative: no epsilon
        ("19", "20", True),
        ("62%", "62", False),
        ("62%", "0.62", True),
        ("0.62", "62%", True),
        ("62 %", "62%", True),  # float() accepts the space that is left
        ("62%%", "62%", True),  # every trailing % goes, the division is one
        ("%", "%", True),
        ("%", "0", False),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("$5", "5", False),
        ("1_000", "1000", True),
        ("1e3", "1000", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0%", "0", False),
        ("0", "0.0", False),
        ("-5", "-5.2", True),
        ("5", "-5", False),
        ("-5", "5", False),
        ("", "5", False),
        ("", "", True),
        ("  Yes \n", "yes", True),
        ("Yes.", "Yes", False),
        ("yes", " yes", False),  # the gold is taken as it stands
        ("5", " 5 ", True),
        ("[2013, 2014]", "[2013, 2014]", True),
        ("[2014, 2013]", "[2013, 2014]", False),
        ("nan", "5", False),
        ("nan", "nan", False),
        ("inf", "5", False),
        ("-inf", "inf", False),
        ("inf", "inf", False),
        ("5", "inf", False),
        ("nan", "0", False),
        ("1990", "2015", True),
        ("Deutschland", "DEUTSCHLAND", True),
        ("٢١", "20", True),  # other digits are digits to float()
        ("1" * 400, "5", False),  # overflows to infinity
    ],
)
def test_relaxed_correctness_examples(prediction, gold, right):
    assert relaxed_correctness(prediction, gold) is right


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(deadline=None)
@given(gold=finite.filter(lambda value: value != 0), prediction=finite)
def test_two_numbers_are_compared_by_relative_distance(gold, prediction):
    expected = math.fabs(prediction - gold) / math.fabs(gold) <= 0.05
    assert relaxed_correctness(repr(prediction), repr(gold)) is expected


@settings(deadline=None)
@given(text=st.text(), gold=st.sampled_from(["0", "0.0", "-0", "0%", "0e5"]))
def test_a_gold_of_zero_needs_the_same_text(text, gold):
    assert relaxed_correctness(text, gold) is (text.strip().lower() == gold)


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(categories=["L"]), min_size=1), gold=st.text(min_size=1))
def test_texts_are_compared_ignoring_case_only(text, gold):
    def is_number(value):
        try:
            float(value.rstrip("%"))
        except ValueError:
            return False
        return True

    if is_number(text):
        return
    assert relaxed_correctness(text, text)
    assert relaxed_correctness(f" {text}\t", text)
    assert relaxed_correctness(text, gold) is (text.lower() == gold.lower())


@settings(deadline=None)
@given(st.sampled_from(["nan", "inf", "-inf", "NaN", "Infinity", "nan%", "1e999"]), finite)
def test_nan_and_infinity_match_no_finite_gold(prediction, gold):
    assert not relaxed_correctness(prediction, repr(gold))


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("2014", "2015", False),
        (" 2015 ", "2015", True),
        ("2015.0", "2015", False),
        ("1990", "2015", False),
        ("1799", "1790", True),  # not taken for a year
        ("2101", "2110", True),
        ("2101", "2100", False),
        ("21", "20", True),
        ("20150", "20155", True),
        ("yes", "Yes", True),
    ],
)
def test_strict_years(prediction, gold, right):
    assert relaxed_correctness_strict_years(prediction, gold) is right


@settings(deadline=None)
@given(st.text(alphabet="0123456789.%yes ", max_size=6), st.text(alphabet="0123456789.%yes ", max_size=6))
def test_strict_years_never_accepts_more(prediction, gold):
    assert relaxed_correctness_strict_years(prediction, gold) <= relaxed_correctness(prediction, gold)


def test_exact_match_ignores_case_and_outer_space_only():
    assert exact_match(" YES\n", ["no", "yes "]) == 1.0
    assert exact_match("yes.", ["yes"]) == 0.0
    assert exact_match("", ["yes"]) == 0.0
    assert exact_match("a  b", ["a b"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello World", ["hello world"], 1.0),
        ("hello wrld", ["hello world"], 1 - 1 / 11),
        ("abcd", ["abxx"], 0.5),  # exactly at the threshold counts, as on the server
        ("abcd", ["axxx"], 0.0),
        ("ab", ["cd", "abc", "ab d"], 1 - 1 / 3),
        ("", ["a"], 0.0),
        ("", [" "], 1.0),
        ("a  b", ["A B"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("the answer is 5 of course", ["5"], 0.0),
        ("abcx ", ["abcd"], 1 - 1 / 5),  # the length is that of the texts as they stand: a space behind counts
        ("abcx", ["  abcd"], 1 - 1 / 6),
        ("a  b  x", ["a b c"], 1 - 1 / 7),
        ("cat\n\n", ["CAT"], 1.0),  # the distance is that of the tidied texts
        ("", ["   "], 1.0),
        ("straxe", ["straße"], 1 - 1 / 7),  # in upper case: STRASSE
        ("ß", [""], 0.5),  # one letter apart, two long
        ("ab xy", ["ab cd  "], 1 - 2 / 7),
        ("ab c", ["abc", "abd"], 1 - 1 / 4),
        ("1.5", ["1,5"], 1 - 1 / 3),
        ("abc", ["abc", ""], 1.0),
        ("ABC.", ["abc"], 0.75),
    ],
)
def test_anls_examples(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


def recursive_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        recursive_distance(first[1:], second) + 1,
        recursive_distance(first, second[1:]) + 1,
        recursive_distance(first[1:], second[1:]) + (first[0] != second[0]),
    )


@settings(deadline=None)
@given(st.text(alphabet="abc", max_size=5), st.lists(st.text(alphabet="abc", max_size=5), min_size=1, max_size=3))
def test_anls_equals_its_definition(prediction, answers):
    similarities = [
        1 - recursive_distance(prediction, answer) / max(len(prediction), len(answer), 1) for answer in answers
    ]
    best = max(similarities)
    assert anls(prediction, answers) == pytest.approx(best if best >= 0.5 else 0.0)
    assert anls(prediction, answers, threshold=0.0) == pytest.approx(best)


def test_anls_without_answers_is_an_error():
    with pytest.raises(EvaluationError, match="at least one answer"):
        anls("a", [])


def test_registry_knows_each_benchmark_and_its_rule():
    assert {name: benchmark.metric_name for name, benchmark in BENCHMARKS.items()} == {
        "chartqa": "chartqa_relaxed_accuracy",
        "textvqa": "textvqa_accuracy",
        "docvqa": "docvqa_anls",
        "infographicvqa": "infographicvqa_anls",
        "ocrvqa": "ocrvqa_accuracy",
        "chartqapro": "chartqapro_relaxed_accuracy",
        "ai2d": "ai2d_accuracy",
        "charxiv": "charxiv_judged",
        "chartmuseum": "chartmuseum_judged",
        "realworldqa": "realworldqa_accuracy",
        "ocrbench": "ocrbench_accuracy",
        "mmmu": "mmmu_accuracy",
        "easy_vqa": "easy_vqa_accuracy",
        "demo_charts": "demo_charts_relaxed_accuracy",
        "demo_text": "demo_text_accuracy",
        "multiple_choice": "multiple_choice",
        "squad": "squad_f1",
        "exact_match": "exact_match",
    }
    chartqa = BENCHMARKS["chartqa"]
    assert [chartqa.metric(text, ["2015", "yes"]) for text in ("1990", "YES", "no")] == [1.0, 1.0, 0.0]  # any answer
    assert chartqa.secondary["strict_year_accuracy"]("2014", ["2015", "2014"]) == 1.0
    assert {name: metric("1990", ["2015"]) for name, metric in chartqa.secondary.items()} == {
        "strict_year_accuracy": 0.0,
        "exact_match": 0.0,
    }
    assert BENCHMARKS["easy_vqa"].metric("Circle", ["circle"]) == 1.0
    assert BENCHMARKS["docvqa"].metric("abcde", ["abcdx"]) == pytest.approx(0.8)
    assert [name for name, benchmark in BENCHMARKS.items() if benchmark.answers_needed] == ["textvqa", "demo_text"]


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(EvaluationError, match="did you mean 'chartqa'"):
        get_benchmark("chart_qa")


@pytest.mark.parametrize("module", ["metrics", "statistics", "scoring", "compare"])
def test_imports_without_torch(module):
    program = (
        f"import sys, vlm_sft.evaluate.{module} as module\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_metrics_import_without_numpy():
    program = "import sys, vlm_sft.evaluate.metrics; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
