"""Options that would have no effect beside others: refused alike on the command line and in Python."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.errors import RunError


@dataclass(frozen=True, slots=True)
class Idle:
    """Options that have no effect where others stand as they do.

    Attributes:
        names: of the options, without dashes.
        where: told the options (a dataclass, or the namespace of a command line), whether that is so.
        why: they have none, as the end of a sentence; `{0.NAME}` stands for an option's value.
        fix: what to do about it.
    """

    names: tuple[str, ...]
    where: Callable[[Any], bool]
    why: str
    fix: str


def refuse_idle(options: Any, rules: Sequence[Idle], given: Collection[str]) -> None:
    """Refuse options that were given though they would have no effect.

    Args:
        options: with all values.
        rules: which ones have none, and where.
        given: the names that the user wrote: a default is no mistake.

    Raises:
        RunError: one of them was given.
    """
    for rule in rules:
        idle = [f"--{name}" for name in rule.names if name in given]
        if idle and rule.where(options):
            raise RunError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {rule.why.format(options)}",
                rule.fix,
            )


def given_names(keywords: Mapping[str, object]) -> set[str]:
    """The keyword arguments that ask for something: those that are neither None nor a switch that is off."""
    return {name for name, value in keywords.items() if value is not None and value is not False}
