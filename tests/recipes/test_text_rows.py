"""Rows without an image through the public commands: check, a mixture's training, a text-only benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pictures import png
from vlm_sft.cli.main import main

FLAGS = [
    *("--max_steps", "2", "--global_batch_size", "4", "--report_to", "none", "--save_strategy", "no"),
    *("--eval_strategy", "no", "--max_new_tokens", "4"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text rows")
    pictured = []
    for number, colour in enumerate(("red", "navy", "gold", "white")):
        (folder / f"{number}.png").write_bytes(png(colour))
        pictured += [{"image": f"{number}.png", "question": text, "answer": colour} for text in ("Colour?", "What?")]
    chat = [{"image": None, "question": f"{number} plus 1?", "answer": str(number + 1)} for number in range(20)]
    for name, rows in (("mine", pictured), ("chat", chat)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_mixture_with_text_rows_trains_and_counts_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = f"{data / 'mine.jsonl'},{data / 'chat.jsonl'}:0.5"
    out = tmp_path / "run"
    assert main(["train", "--base_model", "pocket", "--dataset", sets, "--output_dir", str(out), *FLAGS]) == 0
    facts = json.loads((out / "data.json").read_text())["train"]
    # 4 questions on 2 images, the others are held out; 16 openings of which half the weight: 20 * 8 / 12 text rows.
    assert (facts["samples"], facts["images"], facts["text_rows"]) == (20, 2, 13)
    assert facts["by_dataset"] == {"mine": 7, "chat": 13}
    said = capsys.readouterr()
    assert "7 questions on 2 images, 13 text rows" in said.out + said.err
    table = json.loads((out / "results.json").read_text())
    assert {name: one["n"] for name, one in table["benchmarks"].items()} == {"mine": 2, "chat": 2}


def test_a_set_of_text_rows_alone_is_checked_planned_and_answered(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = str(data / "chat.jsonl")
    assert main(["data", "check", chat, "--split", "all", "--output_dir", str(tmp_path / "check")]) == 0
    assert "text rows" in capsys.readouterr().out
    assert main(["plan", "--base_model", "pocket", "--dataset", chat, "--sft_config", "1epoch"]) == 0
    assert "data: 16 text rows" in capsys.readouterr().out
    asked = ["eval", "--base_model", "pocket", "--benchmark", chat, "--split", "train", "--max_new_tokens", "4"]
    assert main([*asked, "--output_dir", str(tmp_path / "eval")]) == 0
    (path,) = (tmp_path / "eval").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16 and all(row["image"] is None for row in rows)
    assert len({row["cluster"] for row in rows}) == 16


def test_weights_of_sets_and_rows_and_a_loss_for_each_set(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heavy = [{"question": f"Word {number}?", "answer": "yes", "weight": 3} for number in range(20)]
    heavy += [
        {"question": f"Nothing {number}?", "answer": "no", "weight": 0} for number in range(9)
    ]  # some in each part
    (data / "heavy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heavy))
    sets = f"{data / 'mine.jsonl'},{data / 'heavy.jsonl'}"
    out = tmp_path / "run"
    flags = [*FLAGS, "--eval_strategy", "steps", "--eval_steps", "1", "--eval_benchmarks", "none"]
    train = [
        "train",
        "--base_model",
        "pocket",
        "--dataset",
        sets,
        "--output_dir",
        str(out),
        *flags,
        "--max_left_out",
        "1",
    ]
    assert main([*train, "--loss_weights", "mine=0.5,chat=2"]) == 2
    assert "chat" in capsys.readouterr().err
    assert main([*train, "--loss_weights", "mine=0.5"]) == 0
    assert "weight of 0" in (out / "left_out.jsonl").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "eval_loss" in row]
    assert len(measured) == 2
    shares = json.loads((out / "run.json").read_text())["loss_shares"]
    assert sum(shares.values()) == pytest.approx(1) and shares["heavy"] > shares["mine"]
    for row in measured:
        mixed = sum(share * row[f"eval_loss_{name}"] for name, share in shares.items())
        assert row["eval_loss"] == pytest.approx(mixed, rel=1e-9)
    report = (out / "report.html").read_text()
    assert f"as in the training loss: heavy {100 * shares['heavy']:.1f}" in report
    assert json.loads((out / "manifest.json").read_text())["identity"]["eval_loss_is_mixed"] is True
