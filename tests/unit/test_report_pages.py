"""Parts of a report: forecasts, guards, histograms, many runs, quality against time, files for papers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.report_runs import Page, chart, make_run, record, scores
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.data.audit import histogram
from vlm_sft.evaluate.compare import compare_rows
from vlm_sft.report.browser import as_data
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.export import as_csv, export
from vlm_sft.report.html import write_report
from vlm_sft.report.pictures import MISSING, NONE_GIVEN, Album
from vlm_sft.report.quality import choices

FORECAST = {
    "time_seconds": {"value": 250.0, "low": 200.0, "high": 300.0},
    "peak_bytes": {"value": 2e9, "low": 1e9, "high": 3e9},
    "disk_bytes": {"value": 5e6, "low": 4.9e6, "high": 5.1e6},
    "basis": "probe",
    "items": {"peak_bytes": {"logits": 256e6}},
    "assumptions": ["nothing else runs"],
    "actual": {"time_seconds": 200.0, "peak_bytes": 1.6e9, "disk_bytes": 2.5e6},
}


def guard_step(step: int, score: float, qualifies: bool) -> dict[str, Any]:
    entry = {
        "benchmark": "textvqa",
        "n": 60,
        "base": 0.5,
        "score": score,
        "lost_points": 100 * (0.5 - score),
        "allowed_points": 10.0,
        "p_value": 0.01,
        "qualifies": qualifies,
    }
    return {"step": step, "value": 0.6, "guards": [entry], "qualifies": qualifies}


def trained(folder: Path, seconds: float, right: int, questions: int = 100, **recipe: Any) -> Path:
    """A run whose tuned model answers the first `right` questions and whose base answers the first ten."""
    facts = record()
    facts["seconds"]["train"] = seconds
    artifacts.write_json(folder / artifacts.RUN, facts)
    artifacts.write_json(folder / artifacts.RECIPE, {"learning_rate": 1e-4, "seed": 42, **recipe})
    row = scores(questions, 10 / questions, right / questions, False, {})
    artifacts.write_json(folder / artifacts.RESULTS, {"schema": 1, "benchmarks": {"own": row}})
    artifacts.write_jsonl(
        folder / artifacts.METRICS,
        [
            {"step": step, "loss": 2.0 / step, "eval_loss": 1.0 / step, "eval_own_accuracy": right / questions}
            for step in (1, 2, 3)
        ],
    )
    for side, correct in (("base", 10), ("tuned", right)):
        artifacts.write_jsonl(
            folder / "evaluation" / side / "own" / artifacts.PREDICTIONS,
            [
                {
                    "id": str(i),
                    "image": f"images/{i}.png",
                    "question": f"q{i}?",
                    "prediction": "a",
                    "answers": ["a"],
                    "score": float(i < correct),
                }
                for i in range(questions)
            ],
        )
    return folder


def page_of(*folders: Path, output: Path) -> Page:
    return Page(write_report(list(folders), output).read_text(encoding="utf-8"))


def test_forecast_guard_and_histograms_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=30)
    artifacts.write_json(folder / artifacts.RUN, {**record(), "forecast": FORECAST})
    artifacts.write_json(
        folder / artifacts.GUARD,
        {
            "schema": 1,
            "metric": "easy_vqa_accuracy",
            "best_step": 20,
            "qualified": True,
            "evaluations": [guard_step(10, 0.45, True), guard_step(20, 0.41, True), guard_step(30, 0.35, False)],
        },
    )
    data = artifacts.read_json(folder / artifacts.DATA)
    data["train"]["token_histograms"] = {"answer_tokens": histogram([2] * 5 + [3] * 9 + [4])}
    artifacts.write_json(folder / artifacts.DATA, data)
    page = page_of(folder, output=tmp_path / "r.html")
    for fact in (
        "Time 4 min 10 s 3 min 20 s to 5 min 00 s 3 min 20 s +25.0 % within",
        "Peak memory 2.00 GB 1.00 GB to 3.00 GB 1.60 GB +25.0 % within",
        "5.00 MB 4.90 MB to 5.10 MB 2.50 MB +100.0 % outside",
        "Based on: probe",
        "Peak memory: logits 256 MB",
        "nothing else runs",
    ):
        assert fact in page.text, fact
    labels = " ".join(svg["aria-label"] for svg in page.all("svg"))
    assert "textvqa: base 50.0 %, limit 40.0 %, lowest 35.0 %; lost too much at step 30." in labels
    assert "Tokens per answer: 15 questions, supervised tokens from 2 to 4, most often 3." in labels
    assert "Questions per image: 3,920 images, questions from 1 to 4, most often 1." in labels
    assert "Gradient norm from 0.2 at step 1 to 0.2 at step 30" in labels
    assert "Disk: forecast 5.00 MB, actual 2.50 MB." in labels


def test_damaged_forecast_and_histograms_are_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    forecast = {"time_seconds": {"value": "long", "low": 1}, "peak_bytes": 3, "actual": []}
    artifacts.write_json(folder / artifacts.RUN, {**record(), "forecast": forecast})
    part = {"token_histograms": {"answer_tokens": {"edges": [1, 1, 2], "counts": [1, 2]}, "image_tokens": {"edges": 1}}}
    artifacts.write_json(folder / artifacts.DATA, {"train": part})
    artifacts.write_json(folder / artifacts.GUARD, {"evaluations": [3, {"step": 1, "guards": [{"base": None}]}]})
    page = page_of(folder, output=tmp_path / "r.html")
    assert "'value' should be a finite number, found \"long\"" in page.text
    assert "'edges' should be a list of finite numbers" in page.text
    assert "guard.json 'evaluations' 1: expected an object, found 3" in page.text
    assert not [svg for svg in page.all("svg") if "Tokens" in svg["aria-label"]]


def test_the_cheapest_run_that_is_not_worse_is_recommended(tmp_path: Path) -> None:
    runs = collect_runs(
        [
            trained(tmp_path / "weak", 10, 40),
            trained(tmp_path / "enough", 60, 78),
            trained(tmp_path / "best", 600, 80),
            trained(tmp_path / "wasteful", 500, 60),
        ]
    )
    (choice,) = choices(runs, ["own"])
    assert [(one.name, one.on_front) for one in choice.candidates] == [
        ("base model pocket", True),
        ("weak", True),
        ("enough", True),
        ("wasteful", False),
        ("best", True),
    ]
    assert choice.recommended is not None and choice.recommended.name == "enough"
    assert choice.best is not None and choice.best.name == "best"
    # Two of the hundred questions changed: McNemar's exact p-value is 2 * 0.5**2.
    assert line_with(
        choice.reasons[0], "enough ", "−2.0 points", "p = 0.500", "not significantly worse", "100 questions"
    )
    assert line_with(choice.reasons[0], "1 min 00 s", "10 min 00 s")
    assert line_with("\n".join(choice.reasons), "weak ", "−40.0 points", "p < 0.001")


def small(folder: Path, seconds: float, base: int, tuned: int, images: int, questions: int = 10) -> Path:
    """A run measured on a few questions that share a few images."""
    trained(folder, seconds, tuned, questions)
    for side, correct in (("base", base), ("tuned", tuned)):
        artifacts.write_jsonl(
            folder / "evaluation" / side / "own" / artifacts.PREDICTIONS,
            [
                {
                    "id": str(i),
                    "image": f"images/{i % images}.png",
                    "question": f"q{i}?",
                    "prediction": "a",
                    "answers": ["a"],
                    "score": float(i < correct),
                }
                for i in range(questions)
            ],
        )
    rows = [
        list(artifacts.read_jsonl(folder / "evaluation" / side / "own" / artifacts.PREDICTIONS))
        for side in ("base", "tuned")
    ]
    compared = compare_rows(*rows)
    row = scores(questions, base / questions, tuned / questions, False, {}) | compared
    artifacts.write_json(
        folder / artifacts.RESULTS,
        {"schema": 1, "benchmarks": {"own": row | {"difference_interval": compared["interval"]}}},
    )
    return folder


@pytest.mark.parametrize(("base", "tuned", "images"), [(0, 4, 4), (0, 4, 10), (4, 0, 4), (0, 10, 5), (0, 0, 3)])
def test_nothing_is_recommended_on_too_few_questions(tmp_path: Path, base: int, tuned: int, images: int) -> None:
    """Ten questions, base 0 %, tuned 40 %: the base was recommended, in green."""
    run = small(tmp_path / "run", 10, base, tuned, images)
    (choice,) = choices(collect_runs([run]), ["own"])
    assert choice.recommended is None
    assert "too few to judge" in choice.reasons[0]
    page = page_of(run, output=tmp_path / "r.html")
    assert "too few to judge" in page.text and "ecommended on" not in page.text
    assert f"10 questions on {images} independent images" in page.text
    classes = [one.get("class", "") for one in page.all("span")]
    assert not [one for one in classes if "main good" in one or "main bad" in one]


def test_a_large_loss_that_is_not_excluded_is_not_recommended(tmp_path: Path) -> None:
    """Eight of twelve questions changed, six for the better: no significant difference, and no proof of equality."""
    run = small(tmp_path / "run", 10, 0, 0, 12, 12)
    for side, right in (("base", {0, 1}), ("tuned", set(range(2, 8)))):
        path = run / "evaluation" / side / "own" / artifacts.PREDICTIONS
        rows = list(artifacts.read_jsonl(path))
        artifacts.write_jsonl(path, [row | {"score": float(int(row["id"]) in right)} for row in rows])
    row = scores(12, 2 / 12, 6 / 12, False, {}) | {"verdict": "no significant difference"}
    artifacts.write_json(run / artifacts.RESULTS, {"schema": 1, "benchmarks": {"own": row}})
    (choice,) = choices(collect_runs([run]), ["own"])
    assert choice.recommended is None
    assert "may be worse by up to" in choice.reasons[0] and "cannot tell them apart" in choice.reasons[0]


def test_runs_with_other_questions_are_not_compared(tmp_path: Path) -> None:
    few = trained(tmp_path / "few", 10, 11, questions=12)
    path = few / "evaluation" / "tuned" / "own" / artifacts.PREDICTIONS
    artifacts.write_jsonl(path, [{**row, "id": f"other{row['id']}"} for row in artifacts.read_jsonl(path)])
    (choice,) = choices(collect_runs([few, trained(tmp_path / "all", 20, 95)]), ["own"])
    assert choice.recommended is not None and choice.recommended.name == "all"
    assert "few did not answer the same questions and could not be compared with it." in choice.reasons
    assert choice.reasons[0].endswith("and no cheaper one is known to be as good.")


def test_page_of_many_runs(tmp_path: Path) -> None:
    rates = {"first": 1e-4, "second": 3e-4, "third": 3e-4}
    folders = [
        trained(tmp_path / name, 10 * place, 30 * place, learning_rate=rate)
        for place, (name, rate) in enumerate(rates.items(), start=1)
    ]
    page = page_of(*folders, output=tmp_path / "r.html")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    parts = {"comparison", "quality", "curves", "parameters", "predictions", "runs"}
    assert parts | {"run1", "run3-environment"} <= set(ids)
    assert "Parameters that differ between the runs; 7 others are the same in all" in page.text
    assert "first 0.0001 second 0.0003 third 0.0003" in page.text
    assert "Recommended on own : third" in page.text
    labels = " ".join(svg["aria-label"] for svg in page.all("svg"))
    assert "third: 90.0 % after 30 s of training, on the front. Recommended: third." in labels
    assert "second: 2 at step 1 to 0.6667 at step 3." in labels
    held = page.held
    assert len(held["questions"]) == 100, "questions that runs share are held once"
    assert [(run["name"], len(run["rows"])) for run in held["runs"]] == [(name, 100) for name in rates]
    right = [sum(row[2][1] for row in run["rows"]) for run in held["runs"]]
    assert right == [30, 60, 90] and {sum(row[1][1] for row in run["rows"]) for run in held["runs"]} == {10}


def test_pictures_of_runs_are_embedded_once_and_within_the_budget(tmp_path: Path) -> None:
    paths = [tmp_path / side / f"{number}.png" for side in ("a", "b") for number in range(5)]
    for path in paths:
        chart(path, int(path.stem))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    others = [tmp_path / "broken.png", tmp_path / "gone.png", None]
    whole = Album([*paths, *others])
    assert [whole.number(path) for path in paths] == [0, 1, 2, 3, 4] * 2 and len(whole.addresses) == 5
    broken, gone, none = (whole.reason(whole.number(path)) for path in others)
    assert broken.startswith("picture unreadable") and (gone, none) == (MISSING, NONE_GIVEN)
    small = Album(paths, budget=len(whole.addresses[0]) + len(whole.addresses[1]))
    assert [small.number(path) for path in paths[:2]] == [0, 1]
    assert "not embedded" in small.reason(small.number(paths[2]))


@given(st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_no_text_leaves_the_script_element(value: Any) -> None:
    text = as_data(value)
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == value


@given(st.lists(st.integers(0, 3000), min_size=1), st.integers(1, 30))
def test_histogram_counts_every_value_once(values: list[int], bins: int) -> None:
    found = histogram(values, bins)
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= bins + 1
    assert len({high - low for low, high in zip(edges, edges[1:], strict=False)}) == 1
    assert counts == [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:], strict=False)]
    assert sum(counts) == len(values) and edges[0] == min(values)


def test_export_writes_figures_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        trained(tmp_path / name, 10 * place, 30 * place, lora_r=8 * place)
        for place, name in enumerate(("one", "=two"), start=1)
    ]
    artifacts.write_json(folders[0] / artifacts.RUN, {**record(), "forecast": FORECAST, "base_model": "pocket"})
    target = tmp_path / "paper"
    assert main(["report", *map(str, folders), "--export", str(target)]) == 0
    names = {path.name for path in target.iterdir()}
    figures = {
        "quality_time_own",
        "runs_training_loss",
        "runs_evaluation_loss",
        "runs_own_accuracy",
        "001_one_loss",
        "001_one_accuracy",
        "001_one_benchmarks_during_training",
        "001_one_forecast_against_actual",
        "002_two_loss",
        "002_two_accuracy",
        "002_two_benchmarks_during_training",
    }
    tables = {
        f"{name}.{end}" for name in ("results", "quality_time", "forecast", "parameters") for end in ("csv", "md")
    }
    assert names == {f"{name}.{end}" for name in figures for end in ("svg", "png")} | tables | {"training.csv"}
    assert f"wrote {len(names)} figures and tables" in capsys.readouterr().out
    with (target / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], float(row["tuned"]), float(row["difference"])) for row in rows] == [
        ("one", 0.3, pytest.approx(0.2)),
        ("'=two", 0.6, 0.5),
    ]
    with (target / "forecast.csv").open(newline="") as stream:
        assert [float(row["relative_error"]) for row in csv.DictReader(stream)] == pytest.approx([0.25, 0.25, 1.0])
    with Image.open(target / "quality_time_own.png") as picture:
        assert picture.size == (1260, 900), "4.2 by 3 inches with 300 dots each"
    svg = (target / "quality_time_own.svg").read_text()
    assert svg.startswith("<?xml") and "<text" not in svg, "letters are outlines"
    assert len({len(line) for line in (target / "quality_time.md").read_text().splitlines()}) == 1
    with pytest.raises(RunError, match="is not a folder"):
        export(folders, target / "results.csv")


def test_csv_keeps_numbers_and_disarms_formulas() -> None:
    rows = list(csv.reader(io.StringIO(as_csv([["a", "b"], [-0.5, "-0.5"], ["=1+1", "@x"], [None, 'x"y,z']]))))
    assert rows == [["a", "b"], ["-0.5", "-0.5"], ["'=1+1", "'@x"], ["", 'x"y,z']]
