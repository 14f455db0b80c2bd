"""README's line on the notebooks and their first cell follow the address in pyproject.toml, or its absence."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

import addresses

GITHUB = "https://github.com/someone/vlm-sft"


def test_the_files_are_those_that_the_address_gives() -> None:
    for path, text in addresses.pages(addresses.repository()).items():
        assert path.read_text(encoding="utf-8") == text, f"run `python bench/addresses.py`: {path.name} is old"


def test_an_address_on_github_gives_badges_and_an_installation() -> None:
    told = addresses.line(GITHUB)
    for name in addresses.NOTEBOOKS:
        assert f"(https://colab.research.google.com/github/someone/vlm-sft/blob/main/notebooks/{name}.ipynb)" in told
        assert f"(https://kaggle.com/kernels/welcome?src={GITHUB}/blob/main/notebooks/{name}.ipynb)" in told
    assert f'"git+{GITHUB}"' in addresses.cell(GITHUB)


@pytest.mark.parametrize("address", ["", "https://git.example.org/vlm-sft"])
def test_elsewhere_the_line_says_how_to_upload(address: str) -> None:
    told = addresses.line(address)
    assert "http" not in told and "Upload notebook" in told and "Import Notebook" in told


def run_cell(monkeypatch: pytest.MonkeyPatch, address: str) -> list[str]:
    """Run the first cell where vlm_sft is missing; returns the arguments of pip."""
    calls: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    exec(compile(addresses.cell(address), "cell", "exec"), {})
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "install"]
    return command[4:]


def test_the_first_cell_finds_a_wheel_the_repository_or_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vlm_sft-\*\.whl.*pip wheel.*upload"):
        run_cell(monkeypatch, "")
    assert run_cell(monkeypatch, GITHUB)[-1] == f"git+{GITHUB}"
    monkeypatch.chdir(addresses.ROOT / "notebooks")
    assert run_cell(monkeypatch, GITHUB)[-1] == ".."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlm_sft-0.1.0-py3-none-any.whl").touch()
    assert run_cell(monkeypatch, "")[-1] == "vlm_sft-0.1.0-py3-none-any.whl"
    assert os.listdir(tmp_path) == ["vlm_sft-0.1.0-py3-none-any.whl"]
