"""The guides and the notebook are carried out, block by block, in a folder of their own, as a reader would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, Block, arguments_of, blocks, lines_of, pages
from vlm_sft.cli.main import main

YOUR_DATA = ROOT / "docs" / "YOUR_DATA.md"
GUIDES = [page for page in pages() if page != YOUR_DATA and any(block.mark == "run" for block in blocks(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run_shell(text: str) -> None:
    """Run the lines of a block: ours in this process, which has loaded torch already, others in a shell."""
    for line in lines_of(text):
        words = arguments_of(line)
        if words is not None:
            assert main(words) == 0, line
        else:
            subprocess.run(["bash", "-c", line], check=True)


def carry_out(block: Block) -> None:
    if block.mark.startswith("file "):
        Path(block.mark.removeprefix("file ")).write_text(block.text, encoding="utf-8")
    elif block.mark == "run" and block.language == "python":
        exec(compile(block.text, "block", "exec"), {"__name__": "block"})
    elif block.mark == "run":
        run_shell(block.text)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_guide(page: Path, folder: Path) -> None:
    for block in blocks(page):
        carry_out(block)
    if page.name == "FIRST_RUN.md":
        learned(folder / "outputs" / "first", "lamps")


def learned(run: Path, name: str) -> None:
    """The table of a run shows that it learned, from its first step on."""
    row = json.loads((run / "results.json").read_text())["benchmarks"][name]
    assert row["difference_interval"][0] > 0.5 and row["tuned"]["accuracy"] > 0.8, row
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [step["learning_rate"] for step in steps if "learning_rate" in step]
    assert rates and min(rates) > 0
    assert json.loads((run / "run.json").read_text())["notes"] == []


def test_your_own_data_ends_with_a_model_that_plain_transformers_opens(folder: Path) -> None:
    for block in blocks(YOUR_DATA):
        carry_out(block)
    results = json.loads((folder / "outputs" / "mine" / "results.json").read_text())
    (row,) = results["benchmarks"].values()
    assert 0 < row["n"] < 48 and row["synthetic"] is False
    assert (folder / "report.html").stat().st_size > 20_000
    code = (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "AutoProcessor.from_pretrained('outputs/mine-merged')\n"
        "print(sum(p.numel() for p in AutoModelForImageTextToText.from_pretrained('outputs/mine-merged').parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1_000_000


def carry_out_notebook(name: str) -> dict[str, Any]:
    """Run the cells of a notebook; returns its names."""
    notebook: dict[str, Any] = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    return names


def test_the_notebook_runs_from_data_to_report(folder: Path) -> None:
    names = carry_out_notebook("first_run.ipynb")
    learned(folder / "outputs" / "notebook", "rows")
    assert (folder / "outputs" / "notebook" / "report.html").is_file()
    assert [row["tuned"] for row in names["answers"]] == ["stop", "go"]
    assert names["forecast"].to_dict()["schedule"]["steps"] == 60


def test_the_notebook_of_own_data_ends_with_a_model(folder: Path) -> None:
    names = carry_out_notebook("own_data.ipynb")
    learned(folder / "outputs" / "parts", "rows")
    assert names["answers"][0]["tuned"] == "valve"
    assert names["run"].results["rows"]["tuned"]["secondary"]["first_letter"] > 0.8
    assert (names["merged"] / "model.safetensors").is_file()
