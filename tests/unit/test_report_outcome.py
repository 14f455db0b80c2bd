"""The head of a page about one run: its gains, what improved, what comes next; and answers right by a tolerance."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report_runs import Page, make_run
from vlm_sft.common import artifacts
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.html import write_report
from vlm_sft.report.outcome import CLAIMS, claims_of, gain, summarize
from vlm_sft.report.predictions import NEAR, read_predictions


def answered(folder: Path, rows: list[tuple[str, str, str, list[str], float, float]]) -> None:
    """Write predictions: (question type, base answer, tuned answer, references, base score, tuned score)."""
    for side in ("base", "tuned"):
        artifacts.write_jsonl(
            folder / "evaluation" / side / "charts" / artifacts.PREDICTIONS,
            [
                {
                    "id": f"charts/{number}",
                    "image": f"images/{number}.png",
                    "question": f"What is bar {number}?",
                    "question_type": kind,
                    "prediction": base if side == "base" else tuned,
                    "answers": references,
                    "score": before if side == "base" else after,
                }
                for number, (kind, base, tuned, references, before, after) in enumerate(rows)
            ],
        )


@pytest.mark.parametrize(
    "answer, references, score, near",
    [
        ("1995", ["1994"], 1.0, True),  # right by ChartQA's 5 % rule
        ("1994", ["1994"], 1.0, False),
        ("3.0", ["3"], 1.0, False),  # the same number
        (" 62% ", ["0.62"], 1.0, False),
        ("Blue", ["blue"], 1.0, False),
        ("1995", ["1994"], 0.0, False),
        ("1995", ["1994"], 0.75, False),  # a part of a score is no tolerance
        ("2", ["two", "2", "3"], 1.0, False),
    ],
)
def test_right_by_a_tolerance_is_not_right(
    tmp_path: Path, answer: str, references: list[str], score: float, near: bool
) -> None:
    answered(tmp_path, [("value", "nothing", answer, references, 0.0, score)])
    (one,) = read_predictions(tmp_path, [])
    assert one.tuned is not None and one.base is not None
    assert one.tuned.near is near and not one.base.near
    assert one.tuned.label == (NEAR if near else "right" if score >= 0.5 else "wrong")


def test_clear_cases_come_first_and_near_ones_have_a_count_and_a_filter(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [("value", "x", "95", ["94"], 0.0, 1.0) for _ in range(9)] + [("value", "x", "94", ["94"], 0.0, 1.0)]
    answered(folder, rows)
    page = page_of(folder, tmp_path)
    cards = [one for one in page.held["runs"][0]["rows"] if page.held["questions"][one[0]][0] == "charts"]
    assert cards[0][2] == ["94", 1.0] and cards[1][2] == ["95", 1.0, 0, 1]
    assert page.held["near"] == NEAR and f"tuned {NEAR}" in page.words
    assert "9" in page.words[page.words.index(f"tuned {NEAR}") :]


def test_the_page_begins_with_its_headline(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"), tmp_path)
    told = page.text.index("easy_vqa 61.0 to 76.4 % (+15.4 ± 2.0)")
    assert page.text.index("Fine-tuning helped") < told
    assert (
        told < page.text.index("1 min 57 s of training, 120 thousand parameters trained") < page.text.index("Results")
    )
    moment = next(one for one in page.all("time"))
    assert moment["datetime"] == "2026-01-02T10:00:00+00:00" and "2 Jan 2026, 10:00 UTC" in page.text
    assert "2026-01-02T10" not in page.text, "people do not read such dates"
    assert page.text.index("Outcome") < page.text.index("What to do next")
    assert len([one for one in page.all("ul") if "highlights" in one.get("class", "")]) == 1


def page_of(folder: Path, tmp_path: Path) -> Page:
    return Page(write_report([folder], tmp_path / "r.html").read_text())


def test_question_types_show_what_improved_and_what_did_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows: list[tuple[str, str, str, list[str], float, float]] = []
    rows += [("colour", "red", "blue", ["blue"], 0.0, 1.0)] * 30
    rows += [("shape", "x", "y", ["z"], float(i < 15), float(i < 15)) for i in range(30)]
    answered(folder, rows)
    (run,) = collect_runs([folder])
    summed = summarize(run)
    colour, shape = summed.types["charts"]
    assert (colour.name, colour.n, colour.base, colour.tuned, colour.direction) == ("colour", 30, 0, 1, "better")
    assert (shape.name, shape.base, shape.tuned, shape.direction) == ("shape", 0.5, 0.5, "same")
    assert "easy_vqa" not in summed.types, "its only type says what the table of results says"
    weakest = next(line for line in summed.advice if "charts" in line)
    assert "shape" in weakest and "50.0 %" in weakest
    text = page_of(folder, tmp_path).text
    assert "Accuracy on charts by question type" in text and "+100.0" in text
    lost = [(kind, before, after, truth, after_score, score) for kind, before, after, truth, score, after_score in rows]
    answered(folder, lost)
    (run,) = collect_runs([folder])
    assert any("got worse in colour 100.0 to 0.0 %" in line for line in summarize(run).advice)


@pytest.mark.parametrize(
    ("verdict", "interval", "claim", "direction"),
    [
        ("better", (0.1, 0.2), "Fine-tuning helped", "better"),
        ("worse", (-0.2, -0.1), "Fine-tuning made it worse", "worse"),
        ("no significant difference", (-0.1, 0.1), "Fine-tuning made no clear difference", "same"),
        ("too few to judge", (0.1, 0.2), "Too few questions to judge", "same"),
    ],
)
def test_the_headline_says_whether_fine_tuning_helped(
    tmp_path: Path, verdict: str, interval: tuple[float, float], claim: str, direction: str
) -> None:
    (run,) = collect_runs([make_run(tmp_path / "run")])
    one = replace(run.benchmarks[0], verdict=verdict, difference_interval=interval)
    ((told, way, gains),) = claims_of([one, replace(one, base=None)], "mine")
    assert (told, way) == (f"{claim} (mine)", direction) and gains.startswith("easy_vqa 61.0 to 76.4 %")
    several = claims_of([one, replace(one, verdict="better", difference_interval=(0.1, 0.2), name="other")])
    assert several[0][0] == CLAIMS["better"], "good news first"


@pytest.mark.parametrize(
    "losses, steps, words",
    [
        ([(10, 3.0), (20, 2.0), (80, 1.0)], 80, "still falling"),
        ([(10, 1.0), (20, 0.5), (80, 0.9)], 80, "lowest at step 20 of 80"),
        ([(10, 1.0), (20, 0.5), (80, 0.505)], 80, "flat from step 20"),
        ([], 12, "12 optimizer steps"),
    ],
)
def test_the_advice_follows_the_curves(tmp_path: Path, losses: list[tuple[int, float]], steps: int, words: str) -> None:
    (run,) = collect_runs([make_run(tmp_path / "run")])
    assert run.record is not None
    run.record, run.series = replace(run.record, steps=steps), {"eval_loss": losses}
    assert words in " ".join(summarize(run).advice)


def test_commands_name_the_folder_of_the_run_and_wait_for_its_end(tmp_path: Path) -> None:
    (run,) = collect_runs([make_run(tmp_path / "run")])
    commands = dict(summarize(run).commands)
    assert all("'outputs/a b" in line for line in commands.values())
    assert run.record is not None
    run.record = replace(run.record, status="running")
    assert summarize(run).commands == () and summarize(run).advice == ()


def test_a_benchmark_without_a_base_has_no_gain(tmp_path: Path) -> None:
    (run,) = collect_runs([make_run(tmp_path / "run")])
    changes: dict[str, Any] = {"base": None}
    assert gain(replace(run.benchmarks[0], **changes)) == ""
    assert gain(replace(run.benchmarks[0], difference_interval=None)).endswith("(+15.4)")


@pytest.mark.parametrize("adapter", ["outputs/mine", None])
def test_the_folder_of_an_evaluation_shows_its_results(tmp_path: Path, adapter: str | None) -> None:
    folder = tmp_path / "judged"
    answered(folder, [("value", "1", "2", ["2"], 0.0, 1.0)] * 3)
    side = "tuned" if adapter else "base"
    (folder / "evaluation" / side / "charts").rename(folder / "charts")
    shutil.rmtree(folder / "evaluation")
    artifacts.write_json(
        folder / "charts" / artifacts.RESULTS,
        {"n": 3, "metric": "exact", "accuracy": 0.625, "interval": [0.5, 0.75], "seconds": 4.0},
    )
    facts = {"status": "finished", "command": ["vlm-sft", "eval"], "base_model": "pocket", "wall_seconds": 9.0}
    artifacts.write_json(folder / artifacts.RUN, {"schema": 1, **facts, "adapter": adapter})
    page = page_of(folder, tmp_path)
    assert "62.5 % [50.0, 75.0] of 3 questions" in page.text and "9.0 s of evaluation" in page.text
    assert f"vlm-sft compare OTHER {folder.name} --baseline OTHER" in page.text
    assert ("with adapter outputs/mine" in page.text) == bool(adapter)
    assert len(page.held["questions"]) == 3 and "not been evaluated" not in page.text
    assert not {"run1-training", "run1-data", "run1-parameters"} & {one.get("id") for one in page.all("section")}


@pytest.mark.parametrize(
    ("seconds", "wall", "told"),
    [
        ({"data": 1.0, "train": 32.0}, 34.0, "32 s of training, 120 thousand"),
        ({"data": 1.0}, 34.0, "34 s in all, 120 thousand"),
        ({}, 0.0, "120 thousand"),
    ],
)
def test_an_interrupted_run_tells_its_time_and_how_it_goes_on(
    tmp_path: Path, seconds: dict[str, float], wall: float, told: str
) -> None:
    folder = make_run(tmp_path / "run")
    record = artifacts.read_json(folder / artifacts.RUN)
    ended = {"status": "interrupted", "wall_seconds": wall, "seconds": seconds}
    artifacts.write_json(folder / artifacts.RUN, record | ended)
    text = page_of(folder, tmp_path).text
    assert told in text and ("of training" in text) == ("train" in seconds) and "--resume auto" in text
