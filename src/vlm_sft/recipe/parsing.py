"""What one key of a recipe may hold: type, range, choices. Pure functions."""

from __future__ import annotations

import json
import math
from typing import Any

from vlm_sft.recipe.schema import Key

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def shown(value: object) -> str:
    """A value as JSON writes it, shortened to fit a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_text(key: Key, text: str) -> object:
    """Turn the text of a command-line flag into the value that a file would hold.

    Text that cannot be turned is given back as it is, and `check_value` then names it as a wrong type.
    """
    word = text.strip()
    if key.optional and word.lower() in ("null", "none"):
        return None
    try:
        if key.kind in ("whole number", "auto number"):
            return word if word in key.choices else int(word)
        if key.kind == "number":
            return float(word)
    except ValueError:
        return text
    if key.kind in ("switch", "auto switch"):
        return True if word.lower() in _TRUE else False if word.lower() in _FALSE else word
    return word


def check_value(key: Key, value: Any) -> tuple[Any, str]:
    """Check one value against its key's type, range and choices.

    Args:
        key: the description of the key.
        value: a JSON value.

    Returns:
        The value as `Recipe` holds it, and what is wrong with it: "" when nothing is.
    """
    if value is None:
        return None, "" if key.optional else "null is not allowed"
    check = {
        "number": _check_number,
        "whole number": _check_number,
        "auto number": _check_number,
        "switch": _check_switch,
        "auto switch": _check_switch,
        "text": _check_text,
        "names": _check_names,
    }[key.kind]
    return check(key, value)


def _wrong_type(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number with a fraction",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    word = next((word for kind, word in names.items() if isinstance(value, kind)), type(value).__name__)
    return f"wrong type ({word})"


def _check_number(key: Key, value: Any) -> tuple[Any, str]:
    whole = key.kind != "number"
    if isinstance(value, str) and value in key.choices:
        return value, ""
    if isinstance(value, float) and not math.isfinite(value):
        return value, "not a finite number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return value, _wrong_type(value)
    if key.range is not None and not key.range.contains(value):
        return value, "out of range"
    try:
        return (value if whole else float(value)), ""
    except OverflowError:
        return value, "out of range"


def _check_switch(key: Key, value: Any) -> tuple[Any, str]:
    if isinstance(value, bool) or (isinstance(value, str) and value in key.choices):
        return value, ""
    return value, _wrong_type(value)


def _check_text(key: Key, value: Any) -> tuple[Any, str]:
    if not isinstance(value, str):
        return value, _wrong_type(value)
    return value, "" if not key.choices or key.is_choice(value) else "not one of the choices"


def _check_names(key: Key, value: Any) -> tuple[Any, str]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return value, _wrong_type(value) if not isinstance(value, list | tuple) else "not a list of texts"
    names = tuple(dict.fromkeys(name.strip() for name in value))
    if not names or "" in names:
        return value, "no name in it" if not names else "an empty name in it"
    strange = [name for name in names if key.choices and name not in key.choices]
    return names, f"{shown(strange[0])} is not one of the choices" if strange else ""
