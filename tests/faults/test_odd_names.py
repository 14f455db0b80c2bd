"""File names whose bytes are no UTF-8 go through every command, and the records name them as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import save_adapter, save_base
from tests.pictures import png
from tests.processes import Warm

Run = Callable[..., str]
ODD = os.fsdecode(b"k\xe9y\xff")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / ODD
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    save_base(folder.parent / "base")
    shutil.copytree(folder.parent / "base", folder / f"{ODD}-base")
    save_adapter(folder.parent / "base", folder.parent / "lora")
    shutil.copytree(folder.parent / "lora", folder / f"{ODD}-lora")
    for number in range(8):
        (folder / f"{ODD}{number}.png").write_bytes(png((number * 20, 9, 9), (40, 30)))
    rows = [
        {
            "image": f"{ODD}{n}.png",
            "question": f"Q{n}?",
            "answer": str(n),
            "split": ("train", "train", "validation", "test")[n % 4],
        }
        for n in range(8)
    ]
    rows.append({"image": f"{ODD}-gone.png", "question": "Q?", "answer": "1", "split": "train"})
    (folder / f"{ODD}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(place: Path, warm: Warm) -> Run:
    """Runs a command in the place; returns what it printed."""

    def run(*words: str, code: int = 0) -> str:
        done = warm.run(*words, folder=place, more={"PYTHONIOENCODING": "utf-8:backslashreplace"})
        text = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in text, text[-3000:]
        return text

    return run


def test_a_training_and_what_follows(place: Path, run: Run) -> None:
    data, base = f"{ODD}.jsonl", "../base"
    left = ["--max_left_out", "0.5"]
    run("data", "check", data, "--output_dir", f"{ODD}-check", *left)
    train = [
        "train",
        "--base_model",
        base,
        "--dataset",
        data,
        "--output_dir",
        "run",
        "--bf16",
        "false",
        "--max_steps",
        "2",
        "--global_batch_size",
        "2",
        "--save_steps",
        "2",
        "--report_to",
        "none",
        *left,
    ]
    run(*train)
    facts = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished" and (place / facts["dataset"]).is_file()
    rows = (place / "run" / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert "gone.png" in json.loads(rows[0])["detail"]
    run(*train, "--resume", "auto")
    run("report", "run", "--output", f"{ODD}.html")
    run("report", "run", "--export", f"{ODD}-figures")
    run("compare", "run", "--output_dir", f"{ODD}-compared")
    assert json.loads((place / f"{ODD}-compared" / "compare.json").read_text())["comparisons"][0]["run"] == "run"


@pytest.mark.parametrize(
    "words",
    [
        ["ask", f"{ODD}1.png", "How many?", "--base_model", f"{ODD}-base"],
        ["ask", f"{ODD}1.png", "How many?", "--base_model", "../base", "--adapter", f"{ODD}-lora"],
        ["export", "--adapter", "../lora", "--output_dir", f"{ODD}-out"],
        ["train", "--base_model", "../base", "--dataset", f"{ODD}.jsonl", "--output_dir", f"{ODD}-out"],
    ],
    ids=["base", "adapter", "export", "train"],
)
def test_what_the_libraries_cannot_open_is_told_first(place: Path, run: Run, words: list[str]) -> None:
    text = run(*words, code=2)
    assert "not valid UTF-8" in text and "fix:" in text
    assert not (place / f"{ODD}-out").exists()


def test_adapters_and_exchange(place: Path, run: Run) -> None:
    adapter = ["--adapter", "../lora", "--base_model", "../base"]
    left = ["--max_left_out", "0.5"]
    run("ask", f"{ODD}1.png", "How many?", *adapter)
    run("eval", *adapter, "--benchmark", f"{ODD}.jsonl", "--output_dir", f"{ODD}-eval", *left)
    run("export", *adapter, "--merge", "--questions", "1", "--output_dir", "merged")
    run("data", "import", f"{ODD}.jsonl", "--format", "jsonl", "--output", f"{ODD}-in", *left)
    facts = json.loads((place / f"{ODD}-in" / "import.json").read_text(encoding="utf-8"))
    assert (place / facts["source"]).is_file()
    for layout in ("csv", "llamafactory", "trl"):
        run("data", "export", f"{ODD}.jsonl", "--format", layout, "--output", f"{ODD}-{layout}", *left)
