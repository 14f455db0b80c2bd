"""The parts of the report that need no run folder: number formats, the Markdown table, the choice of predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.common import formats
from vlm_sft.common.errors import DataError
from vlm_sft.report.collect import parse_results
from vlm_sft.report.fields import Fields
from vlm_sft.report.markdown import results_table
from vlm_sft.report.pictures import thumbnail
from vlm_sft.report.predictions import OUTCOMES, Answer, Prediction, choose, tally

RESULTS = {
    "schema": 1,
    "benchmarks": {
        "chartqa": {
            "n": 2500,
            "metric": "relaxed accuracy",
            "synthetic": False,
            "base": {"accuracy": 0.5, "interval": [0.48, 0.52], "seconds": 100.0},
            "tuned": {"accuracy": 0.562, "interval": [0.54, 0.58], "seconds": 95.0},
            "difference": 0.062,
            "difference_interval": [0.04, 0.084],
            "p_value": 0.001,
            "verdict": "better",
            "splits": {"human": {"n": 1250, "base": 0.4, "tuned": 0.45}},
        },
        "demo_charts": {"n": 64, "synthetic": True, "base": {"accuracy": 0.25}, "tuned": None, "splits": {}},
        "a|b\nc": {"n": 1, "base": {"accuracy": 0.0, "seconds": 1}},
    },
}


def test_results_table_holds_every_number_in_aligned_columns() -> None:
    lines = results_table(RESULTS).split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    assert cells[0] == ["benchmark", "n", "base", "tuned", "difference", "time"]
    assert cells[1][0].strip("-") == "" and all(cell.endswith("-:") for cell in cells[1][1:])
    assert cells[2][:3] == ["chartqa", "2,500", "50.0 % [48.0, 52.0]"]
    assert cells[2][3:] == ["56.2 % [54.0, 58.0]", "+6.2 [+4.0, +8.4]", "3 min 15 s"]
    assert cells[3] == ["· human", "1,250", "40.0 %", "45.0 %", "+5.0", ""]
    assert cells[4] == ["demo_charts (synthetic)", "64", "25.0 %", "–", "–", "–"]
    assert cells[5] == ["a/b c", "1", "0.0 %", "–", "–", "1.0 s"]


def test_results_table_of_nothing_is_its_header() -> None:
    assert results_table({}).split("\n")[0].startswith("| benchmark | n |")
    assert len(results_table({}).split("\n")) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245.3, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (86_399, "1 d 00 h"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1.02 kB"),
        (24_536_678, "24.5 MB"),
        (999_700, "1.00 MB"),
        (9_994_000, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (150e9, "150 GB"),
        (1e12, "1.00 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert formats.size(count) == text


@given(st.floats(0, 1e12, allow_nan=False))
def test_durations_and_sizes_never_carry_over(value: float) -> None:
    assert "60 s" not in formats.duration(value) and "60 min" not in formats.duration(value)
    assert "24 h" not in formats.duration(value)
    assert "1024" not in formats.size(value)


def test_direction_is_that_of_the_interval_not_of_the_difference() -> None:
    def direction(interval: list[float] | None) -> str:
        return parse_results({"benchmarks": {"b": {"difference": 0.1, "difference_interval": interval}}})[0].direction

    assert [direction(i) for i in ([0.01, 0.2], [-0.1, 0.2], [-0.3, -0.1], [0.0, 0.2], None)] == [
        "better",
        "same",
        "worse",
        "same",
        "same",
    ]


@pytest.mark.parametrize("verdict", ["no significant difference", "too few to judge"])
def test_no_colour_against_the_verdict(verdict: str) -> None:
    """Four images of an older run: +40 points with an interval that leaves out 0, and a verdict that finds nothing."""
    row = {"difference": 0.4, "difference_interval": [0.125, 0.6], "p_value": 0.125, "verdict": verdict}
    assert parse_results({"benchmarks": {"b": row}})[0].direction == "same"


def test_too_few_are_told_below_the_table() -> None:
    row = {
        "n": 10,
        "clusters": 4,
        "difference": 0.4,
        "difference_interval": [-1, 1],
        "verdict": "too few to judge",
        "questions_needed": 20,
        "clusters_needed": 8,
    }
    text = results_table({"benchmarks": {"own": row, "other": {"n": 100, "verdict": "better", "difference": 0.4}}})
    assert text.splitlines()[-1] == (
        "own: 10 questions on 4 independent images are too few to judge; about 20 on 8 would show a difference of 40 "
        "points"
    )
    assert "other:" not in text


def test_wrong_types_are_all_noted_and_read_as_missing() -> None:
    problems: list[str] = []
    rows = parse_results(
        {
            "benchmarks": {
                "b": {
                    "n": "many",
                    "synthetic": 1,
                    "base": {"accuracy": float("nan")},
                    "difference_interval": [1],
                    "splits": [],
                }
            }
        },
        problems,
    )
    assert rows[0].n is None and rows[0].base is not None and rows[0].base.accuracy is None
    assert len(problems) == 5 and all("results.json 'benchmarks' 'b'" in problem for problem in problems)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["benchmarks", "n", "base", "tuned", "accuracy", "interval", "splits"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_json_value_breaks_the_table(value: object) -> None:
    assert results_table(value).startswith("| benchmark")  # type: ignore[arg-type]


def test_fields_tell_a_missing_value_from_a_wrong_one() -> None:
    problems: list[str] = []
    fields = Fields({"a": None, "b": True, "c": 10**400}, "file", problems)
    assert (fields.number("a"), fields.number("b"), fields.number("c"), fields.number("d")) == (None, None, None, None)
    assert [problem.split(" should")[0] for problem in problems] == ["file: 'b'", "file: 'c'"]


def _prediction(benchmark: str, number: int, base: float | None, tuned: float | None, image: str = "") -> Prediction:
    return Prediction(
        benchmark,
        f"{benchmark}/{number}",
        Path(image or f"{benchmark}{number}.png"),
        "?",
        ("a", "b", "a"),
        "",
        "",
        None if base is None else Answer("x", base),
        None if tuned is None else Answer("y", tuned),
    )


def test_choice_mixes_outcomes_and_benchmarks_whatever_their_counts() -> None:
    many = [_prediction("big", i, i % 2, 1) for i in range(1000)] + [_prediction("small", i, 0, 1) for i in range(5)]
    rare = [_prediction("big", 2000, 1, 0), _prediction("big", 2001, 0, 0)]
    chosen = choose(many + rare)
    assert len(chosen) == len({(one.benchmark, one.id) for one in chosen}) == 12
    assert set(rare) <= set(chosen)
    counts = {outcome: sum(one.outcome == outcome for one in chosen) for outcome in OUTCOMES[:4]}
    assert counts == {"wrong → right": 5, "right → wrong": 1, "both wrong": 1, "both right": 5}
    assert sum(one.benchmark == "small" for one in chosen) == 4
    assert chosen == choose(list(reversed(many + rare)))
    assert [OUTCOMES.index(one.outcome) for one in chosen] == sorted(OUTCOMES.index(one.outcome) for one in chosen)


def test_choice_prefers_pictures_not_shown_yet() -> None:
    shared = [_prediction("b", i, 0, 1, image="same.png") for i in range(50)]
    chosen = choose([*shared, _prediction("b", 99, 0, 1)], limit=2)
    assert {one.image for one in chosen} == {Path("same.png"), Path("b99.png")}


def test_choice_prefers_pictures_that_were_saved(tmp_path: Path) -> None:
    saved = tmp_path / "saved.png"
    saved.write_bytes(b"")
    without = [_prediction("b", i, 0, 1) for i in range(50)]
    chosen = choose([*without, _prediction("b", 99, 0, 1, image=str(saved))], limit=1)
    assert [one.image for one in chosen] == [saved]


scores = st.sampled_from([None, 0, 0.3, 0.6, 1])


@given(st.lists(st.tuples(st.sampled_from("ab"), scores, scores), max_size=30), st.integers(0, 15))
def test_choice_is_as_large_as_it_can_be(rows: list[tuple[str, float | None, float | None]], limit: int) -> None:
    predictions = [_prediction(name, i, base, tuned) for i, (name, base, tuned) in enumerate(rows)]
    assert len(choose(predictions, limit)) == min(limit, len(predictions))
    assert sum(n for counts in tally(predictions).values() for n in counts.values()) == len(predictions)


def test_partial_scores_and_references() -> None:
    one = _prediction("b", 0, 0.3, 0.6)
    assert one.outcome == "wrong → right" and one.references == (("a", 2), ("b", 1))
    assert _prediction("b", 0, None, 0.0).outcome == "tuned only: wrong"


def test_thumbnail_of_transparent_and_tiny_pictures(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (10, 5), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    address = thumbnail(tmp_path / "clear.png")
    assert address.startswith("data:image/webp;base64,")
    with pytest.raises(DataError, match="picture missing"):
        thumbnail(tmp_path / "none.png")
