"""The HTML report, rendered from run folders with real pictures and read back with an HTML parser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.report_runs import Page, chart, make_run, record, runs_only_its_own_scripts, scores
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.report.html import write_report

HOSTILE = "<script>alert('x')</script>\" onerror=\"alert(1)"
SECTIONS = ("results", "training", "data", "cost", "parameters", "environment")


def render(*folders: Path, output: Path) -> tuple[str, Page]:
    text = write_report(list(folders), output).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = make_run(tmp_path_factory.mktemp("runs") / "best_model")
    text, page = render(folder, output=folder / "report.html")
    return folder, text, page


def test_page_loads_nothing_and_runs_only_its_own_script(finished: tuple[Path, str, Page]) -> None:
    _, text, page = finished
    assert "http:" not in text and "https:" not in text and "://" not in text
    assert runs_only_its_own_scripts(page) and len(page.scripts) == 2
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert word not in page.scripts[1], "texts of a run are only set as text, and nothing is asked for"
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:")
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_anchors_lead_somewhere(finished: tuple[Path, str, Page]) -> None:
    folder, _, single = finished
    other = make_run(folder.parent / "second")
    _, both = render(folder, other, output=folder.parent / "both.html")
    for page in (single, both):
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = {a[key][1:] for _, a in page.elements for key in ("href", "xlink:href") if key in a}
        clips = {clip for _, a in page.elements for clip in re.findall(r"url\(#(.*?)\)", a.get("clip-path", ""))}
        assert targets and clips and targets | clips <= set(ids)


def test_every_section_and_its_facts(finished: tuple[Path, str, Page]) -> None:
    _, _, page = finished
    assert {f"run1-{section}" for section in SECTIONS} <= {a.get("id") for a in page.all("section")}
    for fact in (
        "best_model",
        "finished",
        "pocket",
        "sft_config_best.json",
        "61.0 %",
        "[58.0, 64.0]",
        "76.4 %",
        "+15.4",
        "[+13.4, +17.4]",
        "p < 0.001",
        "better",
        "2 min 04 s",
        "synthetic",
        "augmented",
        "37.0 %",
        "+13.0",
        "90 (eval_loss 0.62)",
        "empty answer : 3",
        "easy_vqa/train/2",
        "mean 1.92 (1 on 2,000, 2 on 1,000, 4 on 920)",
        "demo_charts (synthetic) 2,560",
        "4 min 05 s",
        "1.50 GB",
        "492 kB",
        "65.64 questions/s",
        "4e-05",
        "120,000 of 11,200,000 (1.1 %)",
        "vlm-sft train --sft_config configs/sft_config_best.json --output_dir 'outputs/a b'",
        "0123abcd" * 5 + " with uncommitted changes",
        "2.15.0",
        "SHA-256: recipe.json",
        "SDPA ran",
    ):
        assert fact in page.text, fact


def test_pictures_are_small_described_and_mixed(finished: tuple[Path, str, Page]) -> None:
    _, _, page = finished
    pictures = page.all("img")
    assert len(pictures) == 6 + 12 and len({picture["src"] for picture in pictures[6:]}) == 12, "six at the head"
    for picture in pictures:
        assert picture["alt"].startswith("Picture to the question: What is the value of bar")
        data = base64.b64decode(picture["src"].partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as decoded:
            assert decoded.size == (480, 320)
    for outcome, at_the_head in {"wrong → right": 3, "right → wrong": 2, "both wrong": 1, "both right": 0}.items():
        assert page.words.count(outcome) == 4 + at_the_head, "three cards and the head of the table of outcomes"
    assert page.text.count("base: right") == 6 + 2 and page.text.count("tuned: wrong") == 6 + 3


def test_curves_are_described_and_take_the_colours_of_the_page(finished: tuple[Path, str, Page]) -> None:
    _, text, page = finished
    labels = [a["aria-label"] for a in page.all("svg")]
    told = "Evaluation loss from 1.2 at step 30 to 0.9 at step 120, lowest 0.6 at step 90."
    assert any(told in one for one in labels)
    assert any("Best step: 90 by eval_loss at 0.62." in one for one in labels)
    assert any(one.startswith("Learning rate from 3.967e-05 at step 1 to 0 at step 120") for one in labels)
    assert any("demo_charts: base 22.0 %, tuned 31.5 %." in one for one in labels)
    assert "best: step 90" in page.text and "var(--series-1)" in text and "#0102" not in text


def test_same_artifacts_give_the_same_bytes(finished: tuple[Path, str, Page], tmp_path: Path) -> None:
    folder, text, _ = finished
    assert write_report([folder], tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "hostile")
    row = {
        "id": HOSTILE,
        "image": "images/easy_vqa0.png",
        "question": HOSTILE,
        "prediction": "\u202e\x00\ud800" + HOSTILE,
        "answers": [HOSTILE],
        "split": HOSTILE,
        "score": 0.3,
        "question_type": "W" * 5000,
    }
    for side in ("base", "tuned"):
        path = folder / "evaluation" / side / "$\\frac{<b>$" / artifacts.PREDICTIONS
        path.parent.mkdir()
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    results = artifacts.read_json(folder / artifacts.RESULTS)
    results["benchmarks"]["$\\frac{<b>$"] = {**results["benchmarks"]["easy_vqa"], "verdict": HOSTILE}
    artifacts.write_json(folder / artifacts.RESULTS, results)
    changed = record()
    changed.update(base_model=HOSTILE, notes=[HOSTILE], command=["--sft_config=" + HOSTILE], status=HOSTILE)
    artifacts.write_json(folder / artifacts.RUN, changed)
    artifacts.write_json(folder / artifacts.RECIPE, {HOSTILE: HOSTILE})
    text, page = render(folder, output=tmp_path / "r.html")
    assert runs_only_its_own_scripts(page) and page.all("b") == []
    assert HOSTILE in {question[3] for question in page.held["questions"]}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 8
    assert "vlm-sft does not know the status that run.json gives." in page.text
    assert "\x00" not in text and "(score 0.3)" in page.text
    assert any("$\\frac{<b>$: base 61.0 %" in a["aria-label"] for a in page.all("svg"))


@pytest.mark.parametrize(
    "missing",
    [
        artifacts.RUN,
        artifacts.RECIPE,
        artifacts.DATA,
        artifacts.LEFT_OUT,
        artifacts.METRICS,
        artifacts.RESULTS,
        "evaluation",
    ],
)
def test_any_artifact_may_be_missing(finished: tuple[Path, str, Page], tmp_path: Path, missing: str) -> None:
    source, _, _ = finished
    folder = tmp_path / "partial"
    folder.mkdir()
    for entry in source.iterdir():
        if entry.name not in (missing, artifacts.REPORT):
            (folder / entry.name).symlink_to(entry)
    _, page = render(folder, output=tmp_path / "r.html")
    told = {
        artifacts.RUN: "There is no record of how this run ended",
        artifacts.RECIPE: "there is no recipe.json",
        artifacts.DATA: "there is no data.json",
        artifacts.LEFT_OUT: "empty answer : 3",
        artifacts.METRICS: "nothing has been logged",
        artifacts.RESULTS: "there is no results.json",
        "evaluation": "there is no predictions.jsonl",
    }
    assert told[missing] in page.text
    assert {f"run1-{section}" for section in SECTIONS} <= {a.get("id") for a in page.all("section")}


def test_running_and_damaged_runs_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    artifacts.write_json(folder / artifacts.RUN, {**record("running"), "wall_seconds": "long", "schema": 2})
    (folder / artifacts.RESULTS).write_text("{not json", encoding="utf-8")
    artifacts.write_json(folder / artifacts.RECIPE, [1, 2])
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"st'
    (folder / artifacts.METRICS).write_text(lines, encoding="utf-8")
    _, page = render(folder, output=tmp_path / "r.html")
    assert "had not finished when the report was written" in page.text
    assert "'wall_seconds' should be a finite number, found \"long\"" in page.text
    assert "run.json has schema 2" in page.text and "results.json: Expecting property name" in page.text
    assert "recipe.json: it holds a list, not an object" in page.text
    assert any("Training loss from 2 at step 1 to 2 at step 1" in a.get("aria-label", "") for a in page.all("svg"))


@pytest.mark.parametrize("value", ["text", -1, 0, 1e308, 10**400, True, [], {}, [None], {"a": {"b": None}}])
def test_no_value_of_a_wrong_type_breaks_the_page(tmp_path: Path, value: object) -> None:
    folder = tmp_path / "wrong"
    for name, keys in (
        (artifacts.RUN, [*record()]),
        (artifacts.RECIPE, ["seed"]),
        (artifacts.DATA, ["train", "eval", "left_out"]),
    ):
        artifacts.write_json(folder / name, dict.fromkeys(keys, value))
    artifacts.write_json(
        folder / artifacts.RESULTS,
        {
            "benchmarks": {
                "all": value,
                "each": {key: value for key in scores(1, 0.5, 0.5, False, {})},
                "deep": {"base": {"accuracy": value, "interval": [value, value]}, "tuned": {"seconds": value}},
            }
        },
    )
    row = dict.fromkeys(["image", "question", "prediction", "answers", "split", "score", "question_type"], value)
    for side in ("base", "tuned"):
        artifacts.write_jsonl(folder / "evaluation" / side / "b" / artifacts.PREDICTIONS, [{**row, "id": "x"}, row])
    artifacts.write_jsonl(folder / artifacts.LEFT_OUT, [{"id": value, "reason": value}])
    artifacts.write_jsonl(
        folder / artifacts.METRICS,
        [{"step": 1, "loss": value, "eval_loss": 2.0}, {"step": value, "loss": 1.0, "learning_rate": value}],
    )
    _, page = render(folder, output=tmp_path / "r.html")
    assert {f"run1-{section}" for section in SECTIONS} <= {a.get("id") for a in page.all("section")}
    assert "could not be read in full" in page.text


def test_missing_foreign_and_undecodable_pictures_have_a_placeholder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    artifacts.write_json(folder / artifacts.RUN, record())
    chart(tmp_path / "secret.png", 1)
    (folder / "evaluation" / "images").mkdir(parents=True)
    (folder / "evaluation" / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    names = ["images/gone.png", "../../secret.png", str(tmp_path / "secret.png"), "images/broken.png", None]
    artifacts.write_jsonl(
        folder / "evaluation" / "base" / "chartqa" / artifacts.PREDICTIONS,
        [
            {"id": str(i), "image": name, "question": "Why?", "prediction": "", "answers": ["a"], "score": 0}
            for i, name in enumerate(names)
        ],
    )
    _, page = render(folder, output=tmp_path / "r.html")
    assert page.all("img") == []
    assert "picture missing: it is not in the run's evaluation/images" in page.text
    assert "picture unreadable: broken.png: not an image in a known format" in page.text
    assert page.text.count("no picture given") == 4, "three cards, and the count below them"
    assert "3 questions: no picture given" in page.text and "1 question: picture missing" in page.text
    assert "chartqa: names of pictures that lead out of evaluation/ are not followed" in page.text
    assert page.text.count("tuned: not evaluated") == 5 and page.text.count("(empty answer)") == 5


def test_several_runs_are_compared(finished: tuple[Path, str, Page], tmp_path: Path) -> None:
    folder, _, _ = finished
    other = tmp_path / "elsewhere" / "best_model"
    artifacts.write_json(other / artifacts.RUN, record("failed"))
    _, page = render(folder, other, folder, output=tmp_path / "r.html")
    assert "2 runs" in page.text and "elsewhere/best_model" in page.text
    assert [a["id"] for a in page.all("details") if a.get("class") == "run"] == ["run1", "run2"]
    assert "Accuracy on easy_vqa" in page.text and "not evaluated" in page.text
    assert {f"run{i}-{section}" for i in (1, 2) for section in SECTIONS} <= {a.get("id") for a in page.all("section")}


def test_large_curves_become_pictures_with_the_same_words(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    rows = [{"step": i, "loss": 1 + i % 2, "eval_loss": 2 - i % 2} for i in range(4000)]
    artifacts.write_jsonl(folder / artifacts.METRICS, rows)
    text, page = render(folder, output=tmp_path / "r.html")
    (picture,) = page.all("img")
    assert picture["src"].startswith("data:image/png") and picture["alt"].startswith("Training loss from 1 at step 0")
    assert len(text) < 600_000


def test_folders_that_are_no_runs_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError) as caught:
        write_report([tmp_path / "empty", tmp_path / "gone"], tmp_path / "r.html")
    assert "empty holds no run" in str(caught.value) and "gone does not exist" in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_output_must_be_a_page(finished: tuple[Path, str, Page]) -> None:
    folder, _, _ = finished
    before = (folder / artifacts.RESULTS).read_bytes()
    with pytest.raises(RunError, match=r"ends in \.html"):
        write_report([folder], folder / artifacts.RESULTS)
    assert (folder / artifacts.RESULTS).read_bytes() == before


def test_command_writes_into_the_run_or_where_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.write_json(tmp_path / "run" / artifacts.RUN, record())
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "deep" / "here.html")]) == 0
    assert (tmp_path / "deep" / "here.html").is_file() and "kB" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_report_is_written_without_torch(finished: tuple[Path, str, Page], tmp_path: Path) -> None:
    folder, _, _ = finished
    code = (
        "import sys, pathlib; from vlm_sft.report import html, markdown; "
        f"html.write_report([pathlib.Path({str(folder)!r})], pathlib.Path({str(tmp_path / 'r.html')!r})); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size > 50_000
