"""The direction of imports is what docs/ARCHITECTURE.md says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vlm_sft"
IGNORED = {"__main__", "__init__"}  # the entry point of `python -m`, and the version


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"\w+", imports)) for room, imports in rows}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "vlm_sft":
                names = [f"vlm_sft.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vlm_sft.")}
    return {name for name in found if not name.startswith("__")}


def test_imports_follow_the_table() -> None:
    table = allowed()
    assert {"recipe", "data", "model", "train", "evaluate", "report"} <= set(table)
    broken = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room in IGNORED:
            continue
        assert room in table, f"{room} is missing in docs/ARCHITECTURE.md"
        extra = imported_rooms(path) - table[room] - {room}
        broken += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(extra)]
    assert not broken, "\n".join(broken)


def test_every_room_has_a_row_and_a_docstring() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - IGNORED
    assert rooms <= set(allowed())
    for path in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize(
    "module",
    [
        "recipe.load",
        "forecast.estimate",
        "forecast.limits",
        "forecast.recommend",
        "report.html",
        "evaluate.metrics",
        "evaluate.statistics",
        "evaluate.scoring",
        "cli.main",
    ],
)
def test_light_modules_import_without_torch(module: str) -> None:
    heavy = "any(name.split('.')[0] in ('torch', 'transformers') for name in sys.modules)"
    code = f"import sys, vlm_sft.{module}; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
