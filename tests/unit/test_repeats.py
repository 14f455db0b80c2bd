"""`vlm-sft data check` finds rows that come twice and answers that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import png
from vlm_sft.cli.main import main
from vlm_sft.data.sources.registry import load_split, parse_datasets


def ask(image: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"image": f"{image}.png", "question": question, "answer": answer} | more


def test_rows_twice_and_contradictions_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "blue", "green"):
        Path(f"{colour}.png").write_bytes(png(colour))
    Path("copy.png").write_bytes(png("red"))  # the same picture under another name
    history = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]
    rows = [
        ask("red", "Colour?", "red"),
        ask("red", "colour?  ", "Red"),  # 2: again
        ask("copy", "Colour?", "blue"),  # 3: against 1
        ask("red", "Colour?", "red"),  # 4: again, and no second contradiction
        ask("blue", "Colour?", "blue"),
        ask("blue", "How many?", "2", answers=["2", "two"]),
        ask("blue", "How many?", "two", answers=["two"]),  # one of the right answers
        ask("blue", "Colour?", "dark", system="Name its brightness."),  # another prompt
        ask("blue", "Colour?", "dark", history=history),  # another conversation
        ask("green", "Colour?", "green"),
    ]
    Path("set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", "set.jsonl", "--split", "all", "--output_dir", "check"]) == 0
    told = capsys.readouterr()
    assert "with another answer: 1; the first:\n  set.jsonl line 3 asks what set.jsonl line 1 asks" in told.err
    assert 'answers: "red" and "blue"' in told.err and "with the same answer: 2" in told.err
    assert json.loads(Path("check", "data.json").read_text())["repeats"] == {"duplicate": 2, "contradiction": 1}
    found = [json.loads(line) for line in Path("check", "repeats.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["id"][-1], row["earlier"][-1]) for row in found] == [
        ("duplicate", "2", "1"),
        ("contradiction", "3", "1"),
        ("duplicate", "4", "1"),
    ]
    assert "asked again, another answer" in Path("check", "preview.html").read_text()


def test_a_row_of_validation_that_is_one_of_train_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("red.png").write_bytes(png("red"))
    for split in ("train", "val"):
        Path(f"{split}.jsonl").write_text(json.dumps(ask("red", "Colour?", "red")) + "\n")
    assert main(["data", "check", "train.jsonl", "--split", "all", "--output_dir", "check"]) == 0
    assert "with the same answer: 1" in capsys.readouterr().err


def test_sound_data_has_no_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "demo_charts", "--limit", "30", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "repeats.jsonl").read_text() == "" and "asked again" not in "".join(capsys.readouterr())


def test_the_two_sources_of_yes_and_no_call_them_alike() -> None:
    samples = load_split(parse_datasets("demo_charts")[0], "train", 400).samples
    assert {sample.metadata["question_type"] for sample in samples if sample.target in ("Yes", "No")} >= {"yes/no"}
    assert not any("yes_no" in sample.metadata.values() for sample in samples)
