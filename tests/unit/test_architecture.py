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
CODE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
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


def uses(path: Path, module: str) -> set[str]:
    """What a file takes of a module by its full name, e.g. "save" of `torch.save`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) == module}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, and what it imports from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_is_pickled() -> None:
    """Reading a pickle runs whatever its writer wanted.

    DeepSpeed's engine writes its own state as one (train/checkpoint/saver.py): it has no other format, and a checkpoint
    is read only when its manifest has the checksums that this program wrote.
    """
    for path in CODE:
        assert not uses(path, "torch") & {"save", "load"}, path
        names = imported(path)
        assert not names & {"torch.save", "torch.load"}, path
        assert not {name.split(".")[0] for name in names} & UNPICKLERS, path
        assert "allow_pickle" not in path.read_text(), path


def test_ranks_meet_in_one_room() -> None:
    for path in CODE:
        if path.parent == PACKAGE / "distributed":
            continue
        assert uses(path, "torch.distributed") <= {"get_rank", "get_world_size", "is_initialized"}, path
        assert not {name for name in imported(path) if name.startswith("torch.distributed")}, path
