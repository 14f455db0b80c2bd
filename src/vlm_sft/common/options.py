"""Options of a command: each is declared once, as a field of a dataclass that says what its flag looks like.

`add_options` makes the flags, `read_options` makes the object of the parsed command line. Recipe keys have a table of
their own (`recipe/schema.py`): they stand in files too, so their values are checked by kind and range.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vlm_sft.common.errors import RunError, nearest, quoted

Options = TypeVar("Options")
_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
_KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "Path": Path}
_ON = {"on": True, "true": True, "off": False, "false": False}


def is_function(text: str) -> bool:
    """Whether a text names a function of Python, as module:function."""
    return bool(_FUNCTION.fullmatch(text))


@dataclass(frozen=True, slots=True)
class OptionFlag:
    """How one option stands on the command line.

    Attributes:
        help: what it does; the default is added by argparse where `%(default)s` stands.
        metavar: a short sign for its value.
        choices: texts that it takes; empty for any.
        parse: turns its text into its value while the line is parsed; None: by the type of the field.
        read: the same once the whole line is parsed; it may raise a VlmSftError.
        words: for a bool that takes a value, what means true and false, e.g. ("on", "off").
        text: the default as it stands on the command line; None: the default of the field.
        bare: the text that the flag means without a value; None where it needs one.
        names: of the flag; empty for "--" and the name of the field.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    read: Callable[[str], Any] | None = None
    words: tuple[str, str] | None = None
    text: str | None = None
    bare: str | None = None
    names: tuple[str, ...] = ()


def option(default: Any, help: str, metavar: str | None = None, **more: Any) -> Any:
    """Declare a field that has a flag; the other arguments are those of `OptionFlag`."""
    return field(default=default, metadata={"flag": OptionFlag(help, metavar, **more)})


def add_options(
    parser: argparse._ActionsContainer,
    options: type,
    only: Collection[str] = (),
    but: Collection[str] = (),
    note: str = "",
) -> None:
    """Give a parser the flags of a dataclass.

    Args:
        parser: a parser, or a group of one.
        options: the dataclass.
        only: names of the fields whose flags are added; empty for all.
        but: names of fields whose flags are not.
        note: is added to the help of each.
    """
    for item in fields(options):
        flag = item.metadata.get("flag")
        if flag is not None and item.name not in but and (not only or item.name in only):
            names = flag.names or (f"--{item.name}",)
            parser.add_argument(*names, **_settings(item, flag, note))


def _settings(item: Field[Any], flag: OptionFlag, note: str) -> dict[str, Any]:
    """The arguments of `add_argument`."""
    settings: dict[str, Any] = {"help": flag.help if flag.help == argparse.SUPPRESS else flag.help + note}
    kind = str(item.type).removesuffix(" | None")
    if kind == "bool" and flag.words is None:
        return settings | {"action": "store_true"}
    if flag.words is not None:
        settings |= {"default": flag.words[0 if item.default else 1], "metavar": "|".join(flag.words)}
    else:
        default = None if item.default is MISSING else item.default
        settings |= {"default": flag.text or default, "metavar": flag.metavar}
        settings["type"] = flag.parse or (None if flag.read else _KINDS.get(kind))
    if flag.choices:
        settings["choices"] = flag.choices
    if flag.bare is not None:
        settings |= {"nargs": "?", "const": flag.bare}
    return settings


def read_options(options: type[Options], args: argparse.Namespace, **others: Any) -> Options:
    """Make the options of a parsed command line.

    Args:
        options: the dataclass.
        args: what was parsed; an option whose flag the parser does not have keeps its default.
        others: fields that have no flag.

    Raises:
        RunError: a switch has another value than on, true, off or false; all of them are named.
        VlmSftError: a value that the `read` of its flag refuses.
    """
    given = {}
    for item in fields(options):  # type: ignore[arg-type]
        flag = item.metadata.get("flag")
        name = flag.names[0].removeprefix("--") if flag is not None and flag.names else item.name
        if flag is not None and item.name not in others and hasattr(args, name):
            given[item.name] = (flag, getattr(args, name))
    wrong = [
        f"--{name} {quoted(value)}" for name, (flag, value) in given.items() if flag.words and value.lower() not in _ON
    ]
    if wrong:
        raise RunError(f"{', '.join(wrong)}: neither on nor off", "pass on (true) or off (false)")
    return options(**{name: _value(flag, value) for name, (flag, value) in given.items()}, **others)


def _value(flag: OptionFlag, value: Any) -> Any:
    """The value of an option whose flag was parsed."""
    if flag.words is not None:
        return _ON[value.lower()]
    return flag.read(value) if flag.read is not None and value is not None else value


def words_of(options: Any) -> list[str]:
    """The flags that make these options, for a command line: what `read_options` reads back.

    Args:
        options: an object of a dataclass; fields at their default, without a flag, or with a hidden one are left out.
    """
    words: list[str] = []
    for item in fields(options):
        flag, value = item.metadata.get("flag"), getattr(options, item.name)
        if flag is None or flag.help == argparse.SUPPRESS or value is None or value == item.default:
            continue
        name = flag.names[0] if flag.names else f"--{item.name}"
        if isinstance(value, bool):
            words += [name, flag.words[0 if value else 1]] if flag.words else [name]
        else:
            words += [name, str(value)]
    return words


def checked_options(options: type[Options], values: Mapping[str, Any], **others: Any) -> Options:
    """Make options of values from Python; texts are read as those of the flags.

    Args:
        options: the dataclass.
        values: by name of the field; what is not there, or None, keeps its default.
        others: fields that have no flag, or need no check.

    Raises:
        RunError: a value is of another kind, or none of the choices of its option; the first one is named.
        VlmSftError: a value that the `read` of its flag refuses.
    """
    declared = {item.name: item for item in fields(options)}  # type: ignore[arg-type]
    given = {name: _checked(declared[name], value) for name, value in values.items() if value is not None}
    return options(**given, **others)


def _checked(item: Field[Any], value: Any) -> Any:
    """The value of one option from Python."""
    flag: OptionFlag = item.metadata["flag"]
    kinds = str(item.type).split(" | ")
    wrong = f"--{item.name} {quoted(value)}"
    if flag.choices and value not in flag.choices:
        meant = nearest(str(value), flag.choices)
        raise RunError(f"{wrong} is not one of {', '.join(flag.choices)}", f"choose one of them{meant}")
    if "bool" in kinds:
        if not isinstance(value, bool) and not (flag.words and str(value).lower() in _ON):
            raise RunError(f"{wrong}: neither on nor off", "pass True or False")
        return value if isinstance(value, bool) else _ON[str(value).lower()]
    if isinstance(value, str) and flag.read is not None:
        return flag.read(value)
    if isinstance(value, bool) and kinds[0] in ("int", "float"):
        raise RunError(f"{wrong} is not a number", "pass a number")
    for kind, called in (("int", "a whole number"), ("float", "a number")):
        if kinds[0] != kind or len(kinds) > 1 and kinds[1] != "None":
            continue
        try:
            number = _KINDS[kind](value)
        except (TypeError, ValueError):
            number = None
        if number is None or number != float(value):
            raise RunError(f"{wrong} is not {called}", f"pass {called}")
        return number
    if kinds[0] == "Path":
        return (flag.read or Path)(value)
    return str(value) if kinds[0] == "str" else value
