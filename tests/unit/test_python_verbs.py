"""Verbs of the command line as functions: recommend, verify, import, export, demo; options without effect."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlm_sft as vs
from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.common.errors import DataError, RunError

HYPOTHETICAL: dict[str, Any] = {"questions": 400, "base_model": "pocket"}
IDLE: list[tuple[Callable[[], object], str]] = [
    (lambda: vs.finetune("demo", adapter_mode="merge"), "--adapter_mode has no effect without --adapter"),
    (lambda: vs.finetune("demo", allow_changes=True), "--allow_changes has no effect without --resume"),
    (lambda: vs.finetune("demo", resume="auto", overwrite=True), "--overwrite has no effect together with --resume"),
    (lambda: vs.plan(questions=9, max_eval=5), "--max_eval has no effect with --questions"),
    (lambda: vs.plan("demo", images=5), "--images has no effect without --questions"),
    (lambda: vs.recommend(**HYPOTHETICAL, hours=1, system="Be brief."), "--system has no effect with --questions"),
    (
        lambda: vs.evaluate_model("pocket", benchmark="demo", allow_prompt_mismatch=True),
        "--allow_prompt_mismatch has no effect without --adapter",
    ),
    (lambda: vs.evaluate_model("pocket", benchmark="demo", tensor_parallel_size=2), "without --backend vllm"),
    (lambda: vs.Run("r").export("e", dtype="bfloat16"), "--dtype has no effect without --merge"),
    (lambda: vs.verify("r", steps=8, checkpoints_only=True), "--steps has no effect with --checkpoints_only"),
    (lambda: vs.export_data("demo", "o", "csv", style="alpaca"), "--style has no effect on --format csv"),
]


@pytest.mark.parametrize("call, told", IDLE, ids=[told for _, told in IDLE])
def test_an_option_without_effect_is_refused_in_python_too(
    call: Callable[[], object], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as refusal:
        call()
    assert told in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keywords, told", [({"limit": "many"}, "--limit 'many'"), ({"split": "all"}, "--split 'all'")])
def test_options_of_an_evaluation_are_checked_in_python_too(
    keywords: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as refusal:
        vs.evaluate_model("pocket", benchmark="demo", **keywords)
    assert told in str(refusal.value) and not list(tmp_path.iterdir())


def test_data_is_checked_as_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Path(f"{number}.png").write_bytes(png((40 * number, 90, 9), (32, 32)))
    rows = [{"image": f"{number}.png", "question": "What?", "answer": f"thing {number}"} for number in range(4)]
    rows.append(rows[0] | {"answer": "something else"})
    found = vs.check_data(rows, split="all", output_dir="from_rows")
    assert found.report.samples == 5 and not found.left_out and len(found.repeats) == 1
    assert found.preview.is_file() and "5" in found._repr_html_()
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", "rows.jsonl", "--split", "all", "--output_dir", "from_file"]) == 0
    ours, theirs = (json.loads(Path(name, "data.json").read_text()) for name in ("from_rows", "from_file"))
    same = ("split", "samples", "images", "questions_per_image", "left_out_fraction")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    rows[1]["image"] = "none.png"
    with pytest.raises(DataError, match="none.png"):
        vs.check_data(rows, split="all", output_dir="again")


def test_data_goes_out_and_in_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(6):
        Path(f"{number}.png").write_bytes(png((40 * number, 90, 9), (32, 32)))
        rows.append(f"{number}.png,What is it?,thing {number}")
    Path("own.csv").write_text("\n".join(["picture,question,answer", *rows]) + "\n")
    report = vs.import_data("own.csv", "ours", columns={"image": "picture"}, limit=5)
    assert report.questions == {"train": 5} and not report.left_out
    assert main(["data", "import", "own.csv", "--output", "same", "--columns", "image=picture", "--limit", "5"]) == 0
    assert Path("ours/train.jsonl").read_bytes() == Path("same/train.jsonl").read_bytes()
    out = vs.export_data("ours", "theirs", "msswift", split="train")
    assert main(["data", "export", "ours", "--output", "again", "--format", "msswift", "--split", "train"]) == 0
    assert [path.name for path in out.files] == ["train.jsonl"]
    assert Path("theirs/train.jsonl").read_bytes() == Path("again/train.jsonl").read_bytes()
    with pytest.raises(DataError, match="--limit 0 is below 1"):
        vs.import_data("own.csv", "none", limit=0)
    with pytest.raises(DataError, match="did you mean csv"):
        vs.export_data("ours", "none", "cvs")
    assert not Path("none").exists()


def test_a_recommendation_is_that_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    advice = vs.recommend(**HYPOTHETICAL, hours=2)
    told = capsys.readouterr().out
    assert advice.chosen in {row["recipe"] for row in advice if row["chosen"]}
    assert f"recommended: {advice.chosen}" in repr(advice) and advice.command in told
    assert main(["recommend", "--questions", "400", "--base_model", "pocket", "--hours", "2"]) == 0
    assert f"recommended: {advice.chosen}" in capsys.readouterr().out
    for wrong, why in (({"hours": 0}, "--hours"), ({"hours": 1, "priority": "best"}, "--priority best")):
        with pytest.raises(RunError, match=why):
            vs.recommend(**HYPOTHETICAL, **wrong)


def test_a_damaged_checkpoint_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"schema": 1, "status": "finished"}))
    found = vs.verify(run, checkpoints_only=True)
    assert not found and found.exact is None and any("checkpoint-2" in one for one in found.damaged)
    shutil.rmtree(run / "checkpoint-2")
    assert vs.verify(run, checkpoints_only=True)


def test_a_demo_without_gradio_is_refused_before_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_sft.evaluate.demo_page.find_spec", lambda name: None)
    with pytest.raises(RunError, match="gradio"):
        vs.demo("pocket")
    assert "GRADIO_ANALYTICS_ENABLED" not in os.environ


def test_few_questions_get_flags_that_make_steps_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    told = repr(vs.plan(questions=30, base_model="pocket", recipe="2epoch"))
    assert "will hardly learn" in told
    match = re.search(r"--global_batch_size (\d+) --num_train_epochs (\d+) gives (\d+) steps", told)
    assert match is not None and int(match[3]) >= 50
    better = vs.plan(
        questions=30,
        base_model="pocket",
        recipe="2epoch",
        global_batch_size=int(match[1]),
        num_train_epochs=int(match[2]),
    )
    assert f"schedule: {match[3]} steps" in repr(better) and "will hardly learn" not in repr(better)
