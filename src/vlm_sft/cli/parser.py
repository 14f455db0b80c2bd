"""The parser of the whole command line, put together from the verbs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from vlm_sft import __version__
from vlm_sft.cli.flag_groups import GROUPS, MANY_FLAGS
from vlm_sft.common.errors import RunError, bounded, nearest, quoted
from vlm_sft.recipe.validation import ALIASES

VERBS = (
    "train",
    "verify",
    "plan",
    "recommend",
    "sweep",
    "eval",
    "score",
    "compare",
    "data",
    "report",
    "export",
    "ask",
    "demo",
    "completion",
)
# What other trainers call flags of ours; such a word is taken for ours.
SAME_FLAGS = ALIASES | dict.fromkeys(("model_name_or_path", "model", "model_id"), "base_model")
FEW_FLAGS = 20  # so many are listed in a message; of more, the help is named
DASHES = "-\N{EN DASH}\N{EM DASH}"  # what text programs make of two hyphens


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in two lines, with the nearest word for one that it does not know.

    Flags may be written with hyphens, or as other trainers call them (`--lr`); they cannot be abbreviated. The
    namespace of a command line has `given`: the names of the flags that stand on it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"allow_abbrev": False} | settings))

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, flags that are not known first: whatever else is missing may follow from them."""
        words = self._in_our_words(list(sys.argv[1:] if args is None else args))
        given = self._given(words)
        found, rest = super().parse_known_args(words, namespace)
        found.given = given | getattr(found, "given", frozenset())
        return found, rest

    def _in_our_words(self, words: list[str]) -> list[str]:
        """Words with the flags that are ours but for hyphens, and those that other trainers call otherwise, as ours."""
        ours: list[str] = []
        for place, word in enumerate(words):
            if word == "--" or (self._subparsers is not None and word[:1] not in DASHES):
                return ours + words[place:]
            flag, equals, value = word.partition("=")
            if not flag.startswith("--") or " " in flag or flag in self._option_string_actions:
                ours.append(word)
                continue
            name = flag[2:].replace("-", "_")
            meant = next((f"--{one}" for one in (name, SAME_FLAGS.get(name)) if f"--{one}" in self._flags()), flag)
            ours.append(f"{meant}{equals}{value}")
        return ours

    def format_help(self) -> str:
        """The page of `--help`: the flags of a verb that has many of them stand in the groups of `flag_groups.py`."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        if self._subparsers is not None or len(shown) <= MANY_FLAGS:
            return super().format_help()
        formatter = self._get_formatter()
        needed = [action for action in shown if action.required]
        words = [" ".join((*action.option_strings[-1:], str(action.metavar or action.dest))) for action in needed]
        formatter.add_usage(" ".join([self.prog, *words, "[FLAG …]"]), (), ())
        formatter.add_text(self.description)
        for title, text, actions in self._sections(shown):
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _sections(self, shown: list[argparse.Action]) -> Iterator[tuple[str, str | None, list[argparse.Action]]]:
        """The groups of the table with title, sentence and flags; last what it does not name."""
        free = {_flag_name(action): action for action in shown}
        for group in GROUPS:
            if actions := [free.pop(name) for name in group.names if name in free]:
                yield group.title, group.text, actions
        if free:
            yield "others", None, list(free.values())

    def _flags(self) -> set[str]:
        """The flags that `--help` shows."""
        known = self._option_string_actions.items()
        return {option for option, action in known if option.startswith("--") and action.help != argparse.SUPPRESS}

    def _given(self, words: list[str]) -> frozenset[str]:
        """The flags among words by their names, up to a verb with flags of its own; ends where one is not known."""
        given, unknown = set(), []
        for word in words:
            if word == "--" or (self._subparsers is not None and word[:1] not in DASHES):
                break
            flag = word.partition("=")[0]
            action = self._option_string_actions.get(word) or self._option_string_actions.get(flag)
            if action is not None:
                given.add(action.dest)
            elif _is_flag(word):
                unknown.append(flag)
        if unknown:
            told = [f"unknown flag {bounded(flag, 80)}{self._meant(flag)}" for flag in unknown]
            self.fail("\n  ".join(told), self._help_with_flags())
        return frozenset(given)

    def _meant(self, flag: str) -> str:
        """The flag that was probably meant, as the end of a message."""
        known = {option.lstrip("-"): option for option in sorted(self._flags())}
        others = {name: f"--{key}" for name, key in SAME_FLAGS.items() if key in known}
        word = flag.lstrip(DASHES).replace("-", "_")
        if word in known | others:
            return f"; did you mean {(known | others)[word]}?"
        near = nearest(word, known | others, "{}")
        return f"; did you mean {(known | others)[near]}?" if near else ""

    def _help_with_flags(self) -> str:
        if self._subparsers is not None:
            return f"flags come after the action; {self.prog} --help lists that"
        flags = [
            action.option_strings[-1]
            for action in self._actions
            if action.help != argparse.SUPPRESS and action.option_strings and action.dest != "help"
        ]
        few = 0 < len(flags) <= FEW_FLAGS
        return f"its flags are {', '.join(flags)}" if few else f"{self.prog} --help lists its flags"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        meant = nearest(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            self.fail(f"{self.prog} does not know {quoted(value)}{meant}", f"choose one of {', '.join(known)}")
        raise argparse.ArgumentError(action, f"{quoted(value)} is not one of {', '.join(known)}{meant}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if action.type not in (int, float):
                raise
            kind = "a whole number" if action.type is int else "a number"
            raise argparse.ArgumentError(action, f"{quoted(arg_string)} is not {kind}") from error

    def error(self, message: str) -> NoReturn:
        """Tell what argparse found, without its page of usage."""
        message = message.removeprefix("argument ").replace("the following arguments are required: ", "missing: ")
        message = message.replace("expected one argument", "a value is missing")
        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            message = f"nothing takes {quoted(words)}; a text with spaces stands in quotes"
        help_line = f"{self.prog} --help describes what it takes"
        self.fail(message, f"write {self._needed()}; {help_line}" if message.startswith("missing: ") else help_line)

    def _needed(self) -> str:
        """The shortest command line that is whole."""
        words = [self.prog]
        for action in self._actions:
            if action.required and not isinstance(action, argparse._SubParsersAction):
                name = str(action.metavar or action.dest.upper())
                words.append(f"{action.option_strings[-1]} {name}" if action.option_strings else name)
        return " ".join(words)

    def fail(self, what: str, fix: str) -> NoReturn:
        """Tell a mistake as all others are told, and end."""
        self.exit(RunError.exit_code, f"{RunError.label}: {RunError(what, fix)}\n")


def _flag_name(action: argparse.Action) -> str:
    """The long name of a flag, without dashes; that of an argument."""
    return action.option_strings[-1].lstrip("-") if action.option_strings else action.dest


def _is_flag(word: str) -> bool:
    """Whether a word that is no flag of ours was meant to be one; argparse takes texts with spaces for values too."""
    if word[:1] not in DASHES or len(word) < 2 or " " in word:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def build_parser(verb: str | None = None) -> Parser:
    """Build the parser; with a verb only its flags are filled in, so that `--help` stays fast."""
    parser = Parser(prog="vlm-sft", description="Fine-tune vision-language models to answer questions about images.")
    parser.add_argument("--version", action="version", version=f"vlm-sft {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = importlib.import_module(f"vlm_sft.cli.{name}")
        child = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        if verb in (name, None):
            module.add_arguments(child)
    return parser
