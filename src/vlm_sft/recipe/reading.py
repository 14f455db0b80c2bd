"""The text of a recipe's file: JSON, JSON with comments, YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

YAML_SUFFIXES = (".yaml", ".yml")
SUFFIXES = (".json", ".jsonc", *YAML_SUFFIXES)
# A text between quotes, or a comment: // to the end of the line, or between /* and */.
_TEXT_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


class RecipeObject(dict[str, Any]):
    """An object of a file that remembers the keys it was given more than once, which `dict` would forget."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__()
        self.repeated: dict[str, list[Any]] = {}
        for name, value in pairs:
            if name in self:
                self.repeated.setdefault(name, [self[name]]).append(value)
            self[name] = value


def parse_recipe(text: str, path: Path) -> Any:
    """Parse the text of a recipe's file.

    Args:
        text: the text.
        path: the file; it is YAML when its name ends in .yaml or .yml, else JSON, which may have comments.

    Returns:
        What the file holds; objects are `RecipeObject`.

    Raises:
        ValueError: it is neither; the message says where, as the end of a sentence.
        RecursionError: it is nested too deeply.
    """
    if path.suffix.lower() in YAML_SUFFIXES:
        return _parse_yaml(text)
    try:
        return json.loads(_TEXT_OR_COMMENT.sub(_blank, text), object_pairs_hook=RecipeObject)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at line {error.lineno} column {error.colno} ({error.msg})") from error


def _blank(found: re.Match[str]) -> str:
    """A comment as so much white space, so that what follows keeps its line and column; a text as it is."""
    return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ValueError(f"not YAML{place} ({getattr(error, 'problem', None) or error})") from error


def _loader() -> Any:
    """A safe loader whose numbers and switches are those of YAML 1.2, as JSON has them.

    PyYAML's own take `no` and `off` for false, 2e-4 for a text and 010 for 8.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc,no-any-unimported]
        """Made anew: PyYAML's class is left as it is."""

        yaml_implicit_resolvers: dict[str, Any] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            """A node; an alias is none: a few nested ones stand for more than fits into memory."""
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, "an alias is not read", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> RecipeObject:
            """An object with what it was given twice."""
            pairs = (
                (self.construct_object(key, True), self.construct_object(value, True)) for key, value in node.value
            )
            return RecipeObject((str(key), value) for key, value in pairs)

    kinds = (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    )
    for kind, pattern, first in kinds:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_mapping)
    return Loader
