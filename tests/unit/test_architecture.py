"""Imports go the way that docs/ARCHITECTURE.md says; files and functions are short, and names are used once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vlm_sft"
CODE = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
IGNORED = {"__main__", "__init__"}  # the entry point of `python -m`, and the version


LIGHT = (
    "recipe.load",
    "forecast.estimate",
    "forecast.limits",
    "forecast.recommend",
    "report.html",
    "evaluate.metrics",
    "evaluate.statistics",
    "evaluate.scoring",
    "cli.main",
)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def allowed() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"\w+", imports)) for room, imports in rows}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(path)):
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
        docstring = ast.get_docstring(parsed(path))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_light_modules_import_without_torch() -> None:
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'vlm_sft.{name}')\n"
        "    if {'torch', 'transformers'} & set(sys.modules):\n        sys.exit(name)"
    )
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is above a limit today, and by how much: no number grows, and what has come below its limit is taken off.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
# Public classes of one name in two rooms.
SHARED_NAMES = {"Answer", "Benchmark", "Place", "RunRecord", "About"}
FILE_LINES, FUNCTION_LINES, SAME_BASENAME = 400, 60, 3


def sources() -> list[tuple[str, str, ast.Module]]:
    """Name below the package, text and tree of each of its files."""
    paths = sorted(PACKAGE.rglob("*.py"))
    texts = [(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    return [(name, text, parsed(PACKAGE / name)) for name, text in texts]


def assert_within(found: dict[str, int], allowed: dict[str, int], limit: int) -> None:
    above = {name: lines for name, lines in found.items() if lines > limit}
    grown = {name: lines for name, lines in above.items() if lines > allowed.get(name, limit)}
    assert not grown, f"more than {limit} lines, or than before: {grown}"
    assert allowed.keys() <= above.keys(), f"no exceptions any more: {allowed.keys() - above.keys()}"


def test_files_are_short() -> None:
    assert_within({name: len(text.splitlines()) for name, text, _ in sources()}, LONG_FILES, FILE_LINES)


def test_functions_are_short() -> None:
    found = {
        f"{name}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert_within(found, LONG_FUNCTIONS, FUNCTION_LINES)


def test_names_say_which_thing_is_meant() -> None:
    """No basename stands for four modules, and no public class name for two things in different rooms."""
    basenames = Counter(Path(name).stem for name, _, _ in sources())
    del basenames["__init__"]
    assert {name: count for name, count in basenames.items() if count > SAME_BASENAME} == {}
    rooms = defaultdict(set)
    for name, _, tree in sources():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                rooms[node.name].add(room_of(PACKAGE / name))
    assert {name for name, found in rooms.items() if len(found) > 1} == SHARED_NAMES


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/ARCHITECTURE.md"])
def test_files_and_functions_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md))(?:: ([\w.]+))?`", text)
    assert len(named) > 10
    missing = []
    for path, name in named:
        found = [folder / path for folder in (ROOT, PACKAGE) if (folder / path).is_file()]
        words = set(name.split(".")) - {""}
        if not found or not words <= set(re.findall(r"\w+", found[0].read_text(encoding="utf-8"))):
            missing.append(f"{path}: {name}")
    assert not missing


def uses(path: Path, module: str) -> set[str]:
    """What a file takes of a module by its full name, e.g. "save" of `torch.save`."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if full_name(node.value) == module}


def full_name(node: ast.expr) -> str:
    """A name with its dots, e.g. "torch.distributed"; "" for anything else."""
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value)
        return owner and f"{owner}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(path: Path) -> set[str]:
    """The modules that a file imports, and what it imports from them."""
    found = set()
    for node in ast.walk(parsed(path)):
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
