"""`vlm-sft completion`: a script that lets a shell complete the verbs, flags and values of the command line.

The script is made from the parser and is static: pressing Tab starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELP = "print a script that completes verbs, flags and values in bash, zsh or fish"
SHELLS = ("bash", "zsh", "fish")
PROGRAM = "vlm-sft"
SET_UP = {
    "bash": 'eval "$(vlm-sft completion bash)", e.g. in ~/.bashrc',
    "zsh": 'eval "$(vlm-sft completion zsh)", e.g. in ~/.zshrc, after compinit',
    "fish": "vlm-sft completion fish | source, e.g. in ~/.config/fish/config.fish",
}


@dataclass(frozen=True)
class Flag:
    """One flag: its names, its help, whether a value may follow, and the values where they are known."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A place on the command line: the verbs that lead there, its flags, and the words that may follow."""

    path: tuple[str, ...]
    flags: tuple[Flag, ...]
    words: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    """Print the script; on a terminal also how it is used, which would disturb every new shell elsewhere."""
    import sys

    from vlm_sft.cli.parser import build_parser
    from vlm_sft.common.console import say

    places = list(walk(build_parser()))
    say(fish_script(places) if args.shell == "fish" else bash_script(places, args.shell == "zsh"))
    if sys.stdout.isatty():
        say(f"# nothing was written; next: {SET_UP[args.shell]}")
    return 0


def walk(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every place of a parser's command line, the outermost first."""
    flags: list[Flag] = []
    words: dict[str, str] = {}
    inner = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            words |= {choice.dest: choice.help or "" for choice in action._choices_actions}
            inner += [(name, child) for name, child in action.choices.items()]
        elif action.option_strings:
            flags.append(_flag(action, parser._get_formatter()._expand_help(action)))
        elif action.choices:
            words |= {str(choice): "" for choice in action.choices}
    yield Place(path, tuple(flags), words)
    for name, child in inner:
        yield from walk(child, (*path, name))


def _flag(action: argparse.Action, text: str) -> Flag:
    from vlm_sft.recipe.schema import KEYS

    values = tuple(map(str, action.choices or ()))
    if key := KEYS.get(action.dest):
        switch = ("true", "false") if key.kind in ("switch", "auto switch") else ()
        values = tuple(dict.fromkeys((*key.choices, *switch)))
    return Flag(tuple(action.option_strings), text, action.nargs != 0, values)


def bash_script(places: list[Place], zsh: bool = False) -> str:
    """The script for bash; zsh reads the same one through its bashcompinit."""
    verbs = [
        f"    {_quoted(' '.join(place.path))}) next={_quoted(' '.join(place.words))}; "
        f"flags={_quoted(' '.join(name for flag in place.flags for name in flag.names))} ;;"
        for place in places
    ]
    known = [
        f"    {_quoted(' '.join((*place.path, name)))}) values={_quoted(' '.join(flag.values))} ;;"
        for place in places
        for flag in place.flags
        for name in flag.names
        if flag.values
    ]
    free = [
        f"    {_quoted(' '.join((*place.path, name)))}) values=@files ;;"
        for place in places
        for flag in place.flags
        for name in flag.names
        if flag.takes_value and not flag.values
    ]
    template = (Path(__file__).parent / "completion.bash").read_text(encoding="utf-8")
    script = template.replace("@PLACES@", "\n".join(verbs)).replace("@VALUES@", "\n".join(known + free))
    return ("autoload -U +X bashcompinit && bashcompinit\n" if zsh else "") + script.rstrip()


def fish_script(places: list[Place]) -> str:
    """The script for fish."""
    lines = [f"complete -c {PROGRAM} -f"]
    for place in places:
        seen = [f"__fish_seen_subcommand_from {verb}" for verb in place.path]
        # A verb is offered only where none of its neighbours stands already.
        fresh = [*seen, f"not __fish_seen_subcommand_from {' '.join(place.words)}"]
        for word, text in place.words.items():
            lines.append(f"complete -c {PROGRAM} -n {_quoted('; and '.join(fresh))} -a {word} -d {_quoted(text)}")
        where = f" -n {_quoted('; and '.join(seen))}" if seen else ""
        for flag in place.flags:
            lines.append(f"complete -c {PROGRAM}{where}{_fish_flag(flag)}")
    return "\n".join(lines)


def _fish_flag(flag: Flag) -> str:
    names = "".join(f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in flag.names)
    value = f" -x -a {_quoted(' '.join(flag.values))}" if flag.values else " -r -F" if flag.takes_value else ""
    return f"{names}{value} -d {_quoted(flag.help)}"


def _quoted(text: str) -> str:
    """`text` in single quotes, for a POSIX shell and for fish; quotes inside become typographic ones."""
    return "'" + text.replace("\\", "/").replace("'", "’").replace("\n", " ") + "'"
