"""What a final table is measured on: apart from training and choice where the data allow it, and said where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts

COLORS = ("red", "green", "blue", "black")


def picture(path: Path, number: int) -> None:
    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).rectangle((5 + number, 10, 40 + number, 50), fill=COLORS[number % 4])
    image.save(path)


def data(folder: Path, name: str, numbers: list[int], reference: bool = False) -> None:
    """Two questions about each picture, perhaps beside a reference that all rows share."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "yellow").save(folder / "reference.png")
    for number in numbers:
        picture(folder / f"{number}.png", number)
    rows = [
        {
            "images": [*(["reference.png"] if reference else []), f"{number}.png"],
            "question": question,
            "answer": COLORS[number % 4],
        }
        for number in numbers
        for question in ("Which color is the box?", "What color has the box?")
    ]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))


def planned(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> list[str]:
    """The lines of `vlm-sft plan` about the parts of the data, with a choice at the end."""
    choice = ["--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "epoch", *more]
    assert main(["plan", "--base_model", "pocket", "--dataset", str(folder), "--sft_config", "1epoch", *choice]) == 0
    told = capsys.readouterr()
    return [line for line in (told.out + told.err).splitlines() if " images" in line and not line.startswith("  ")]


@pytest.mark.parametrize("reference", [False, True])
def test_one_file_gives_three_parts_that_share_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: bool
) -> None:
    data(tmp_path / "own", "data.jsonl", list(range(20)), reference)
    lines = planned(capsys, tmp_path / "own")
    extra = int(reference)  # the shared picture stands in every part
    text, few = "\n".join(lines), f"4 questions on {2 + extra} images"
    assert line_with(text, f"training 32 questions on {16 + extra} images", f"validation {few}").count(few) == 2
    assert line_with(text, f"32 questions on {16 + extra} images", f"{32 / (16 + extra):.2f}").startswith("data: ")
    assert not [line for line in lines if "too high" in line or "trained on" in line]


def test_files_that_overlap_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path / "own", "train.jsonl", list(range(20)))
    data(tmp_path / "own", "val.jsonl", [18, 19, 30, 31, 32])
    text = "\n".join(planned(capsys, tmp_path / "own"))
    assert line_with(text, "own: 10 of 10 questions", "chose the checkpoint")
    assert line_with(text, "own: 4 of 10 questions", "trained on")
    assert line_with(text, "4 of 10 validation questions", "trained on")
    without = "\n".join(planned(capsys, tmp_path / "own", "--load_best_model_at_end", "false"))
    assert "chose the checkpoint" not in without and "were trained on" in without
    data(tmp_path / "own", "test.jsonl", [40, 41, 31])
    apart = "\n".join(planned(capsys, tmp_path / "own"))
    assert line_with(apart, "own: 2 of 6 questions", "chose the checkpoint")


def test_the_table_of_few_pictures_says_what_it_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole training: the printed table, results.json, run.json, the report and compare tell the same."""
    monkeypatch.setenv("VLM_SFT_CACHE", str(tmp_path / "cache"))
    data(tmp_path / "own", "train.jsonl", list(range(8)))
    data(tmp_path / "own", "val.jsonl", [20, 21, 22, 23])
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--base_model",
                "pocket",
                "--dataset",
                str(tmp_path / "own"),
                "--sft_config",
                "1epoch",
                "--global_batch_size",
                "8",
                "--load_best_model_at_end",
                "true",
                "--eval_strategy",
                "epoch",
                "--save_strategy",
                "epoch",
                "--output_dir",
                str(run),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    few, used = "own: 8 questions on 4 independent images", "own: 8 of 8 questions"
    row = artifacts.read_json(run / artifacts.RESULTS)["benchmarks"]["own"]
    assert row["verdict"] == "too few to judge" and row["difference_interval"] == [-1.0, 1.0]
    assert (row["clusters"], row["also_chose"], row["also_trained"]) == (4, 8, 0)
    assert artifacts.read_json(run / artifacts.DATA)["train"]["images"] == 8
    record = artifacts.read_json(run / artifacts.RUN)
    assert record["overlap"] == {"own": {"also_chose": 8, "also_trained": 0}}
    assert any(note.startswith(used) for note in record["notes"])
    page = (run / artifacts.REPORT).read_text()
    for text in (printed, page):
        assert few in text and used in text
    assert "ecommended on" not in page and 'class="main good"' not in page
    assert main(["compare", str(run)]) == 0
    compared = capsys.readouterr().out
    assert "| too few to judge " in compared
    assert few in compared
    assert "| none " in compared, "four images show no difference, however large"
