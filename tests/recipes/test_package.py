"""The wheel and the sdist hold all that the package needs, and the wheel works away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlm_sft.cli.parser import VERBS
from vlm_sft.recipe.builtin import FILES, RECIPES, locate_recipe
from vlm_sft.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vlm_sft"
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
SKIPPED = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "outputs", "build", "dist", "*.egg-info", ".*_cache")


def built(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist with the declared backend, without network."""
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(target)], cwd=source, check=True, capture_output=True
    )
    (file,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is made from the sdist, as an installation from the index of packages makes it."""
    place = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, place / "source", ignore=SKIPPED)
    (place / "sdist").mkdir()
    (place / "wheel").mkdir()
    with tarfile.open(built("sdist", place / "source", place / "sdist")) as archive:
        archive.extractall(place, filter="data")
    (unpacked,) = place.glob("vlm_sft-*")
    assert (unpacked / "configs" / "sft_config_best.json").is_file() and (
        unpacked / "src" / "train_vlm_sft.py"
    ).is_file()
    assert (unpacked / "tools" / "pocket" / "weights" / "training_heads.safetensors").is_file()
    return built("wheel", unpacked, place / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, in front of everything else on the path."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "VLM_SFT_CACHE": str(cwd / "cache")}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {
        "vlm_sft/py.typed",
        "vlm_sft/model/pocket/weights/model.safetensors",
        "vlm_sft/report/templates/report.css",
        "vlm_sft/recipe/files/sft_config_best.json",
    } <= held


def test_the_installed_package_trains_and_reports(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed,
        tmp_path,
        "-m",
        "vlm_sft",
        "train",
        "--sft_config",
        "smoketest",
        "--base_model",
        "pocket",
        "--dataset",
        "demo_charts",
        "--max_train",
        "8",
        "--max_eval",
        "4",
        "--global_batch_size",
        "8",
        "--output_dir",
        "run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "adapter_model.safetensors").is_file()
    where = run(installed, tmp_path, "-c", "import vlm_sft; print(vlm_sft.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed)


def test_the_package_holds_the_recipes_of_the_repository() -> None:
    ours = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.json")}
    assert {path.name: path.read_bytes() for path in FILES.glob("*.json")} == ours
    assert set(RECIPES) == {Path(name).stem for name in ours}


def test_recipes_go_by_name_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(locate_recipe("best")) == load_recipe(ROOT / "configs" / "sft_config_best.json")
    assert locate_recipe("2epoch").name == "sft_config.json"
    assert locate_recipe("configs/mine.json") == Path("configs/mine.json")
    Path("best").write_text("{}")
    assert locate_recipe("best") == Path("best")


def test_python_m_is_the_command(tmp_path: Path) -> None:
    help_text = run(PACKAGE.parent, tmp_path, "-m", "vlm_sft", "--help").stdout
    assert all(f"\n    {verb}" in help_text for verb in VERBS)


def test_no_help_loads_a_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom vlm_sft.cli.parser import VERBS, build_parser\n"
        "[build_parser(verb).format_help() for verb in VERBS]\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'scipy', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(PACKAGE.parent, tmp_path, "-c", code).stderr == "\n"
