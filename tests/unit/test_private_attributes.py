"""Private attributes of libraries: each one stands in one place, with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "vlm_sft"
# By file and name. What a library keeps private may be gone in its next version, so each reason says what guards it.
ALLOWED = {
    (
        "model/attention.py",
        "_attn_implementation",
    ): "read: no public name; set for windows: the public setter takes names "
    "with 'flash' for packages; tests/parity/test_trim.py holds both",
    (
        "model/cpu/matmul.py",
        "_linear_pointwise",
    ): "oneDNN's operator has no public name; compared with PyTorch's product",
    ("distributed/zero.py", "__compatible_ops__"): "DeepSpeed has no switch for its shared-memory collectives",
    ("cli/completion.py", "_actions"): "argparse does not list its options otherwise; tests/unit/test_completion.py",
    ("cli/completion.py", "_SubParsersAction"): "as above",
    ("cli/completion.py", "_choices_actions"): "as above",
    ("cli/completion.py", "_get_formatter"): "as above",
    ("cli/completion.py", "_expand_help"): "as above",
    ("common/options.py", "_ActionsContainer"): "a type of argparse that has no public name, for annotations",
    ("cli/parser.py", "_SubParsersAction"): "as above",
    ("cli/parser.py", "_get_value"): "argparse: its message of a wrong value is replaced",
    ("data/workers.py", "_exit"): "os._exit is documented: a forked worker must not run its parent's exit handlers",
    ("distributed/heartbeat.py", "_exit"): "os._exit is documented",
    ("distributed/signals.py", "_exit"): "os._exit is documented",
}
PYTHON = {
    "__name__",
    "__doc__",
    "__file__",
    "__version__",
    "__class__",
    "__cause__",
    "__context__",
    "__new__",
    "__dataclass_fields__",
}


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Private names that the package itself defines: functions, fields, attributes of `self`."""
    found = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of other packages that a file uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr not in PYTHON:
            owner = ast.unparse(node.value)
            if owner == "super()" and not node.attr.startswith("__"):
                yield node.attr
            elif owner not in ("self", "cls", "super()") and node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vlm_sft"):
            private = [part for part in (node.module or "").split(".") if part.startswith("_") and part != "__future__"]
            yield from [*private, *(alias.name for alias in node.names if alias.name.startswith("_"))]


def test_private_attributes_of_libraries_stand_in_one_place_with_a_reason() -> None:
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(trees)
    found = {(path, name) for path, tree in trees.items() for name in private_names(tree, own)}
    new = sorted(found - ALLOWED.keys())
    assert not new, f"find a public way, or give the reason in ALLOWED: {new}"
    assert not any(path.startswith(("evaluate/", "train/")) for path, _ in ALLOWED)
    gone = {one for one in ALLOWED.keys() - found if one[0].split("/")[0] in ("model", "distributed")}
    assert not gone, f"no longer used: {sorted(gone)}"


def test_a_private_name_is_seen() -> None:
    lines = ("from torch import _dynamo", "model._internal = 1", "self._own", "super()._load()", "text.__class__")
    code = "\n".join([*lines, "ops.__table__", "found._field"])
    assert sorted(private_names(ast.parse(code), {"_field"})) == ["__table__", "_dynamo", "_internal", "_load"]
