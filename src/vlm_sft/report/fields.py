"""Tolerant reading of JSON objects that may be unfinished, old or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


class Fields:
    """Typed access to one JSON object: what is missing reads as None or empty, what has a wrong type is noted.

    Args:
        value: the parsed JSON value; anything but an object is noted as a problem and read as empty.
        place: file and key of the object, for the messages.
        problems: the list that messages are appended to; one list collects all problems of a run.
    """

    def __init__(self, value: Any, place: str, problems: list[str]) -> None:
        self._place = place
        self._problems = problems
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            problems.append(f"{place}: expected an object, found {_show(value)}")

    def _note(self, key: str, expected: str) -> None:
        self._problems.append(f"{self._place}: {key!r} should be {expected}, found {_show(self._values[key])}")

    def given(self, key: str) -> bool:
        """True when the key holds something other than null."""
        return self._values.get(key) is not None

    def number(self, key: str) -> float | None:
        """A finite number, or None."""
        if not self.given(key):
            return None
        number = finite(self._values[key])
        if number is None:
            self._note(key, "a finite number")
        return number

    def whole(self, key: str) -> int | None:
        """A whole number, or None."""
        number = self.number(key)
        return None if number is None else round(number)

    def text(self, key: str) -> str:
        """A text, or ""."""
        if not self.given(key):
            return ""
        value = self._values[key]
        if not isinstance(value, str):
            self._note(key, "a text")
            return ""
        return value

    def flag(self, key: str) -> bool | None:
        """True, false, or None."""
        if not self.given(key):
            return None
        value = self._values[key]
        if not isinstance(value, bool):
            self._note(key, "true or false")
            return None
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list as texts; entries of other types are shown as JSON."""
        if not self.given(key):
            return ()
        if not isinstance(self._values[key], list):
            self._note(key, "a list")
            return ()
        return tuple(as_text(entry) for entry in self._values[key])

    def entries(self, key: str) -> Iterator[Fields]:
        """The objects of a list, one by one; nothing when there is none."""
        if not self.given(key):
            return
        if not isinstance(self._values[key], list):
            self._note(key, "a list")
            return
        for number, entry in enumerate(self._values[key], start=1):
            yield Fields(entry, f"{self._place} {key!r} {number}", self._problems)

    def series(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers, or ()."""
        if not self.given(key):
            return ()
        value = self._values[key]
        numbers = [finite(entry) for entry in value] if isinstance(value, list) else [None]
        if None in numbers:
            self._note(key, "a list of finite numbers")
            return ()
        return tuple(number for number in numbers if number is not None)

    def interval(self, key: str) -> tuple[float, float] | None:
        """A pair of finite numbers, lower and upper end, or None."""
        if not self.given(key):
            return None
        value = self._values[key]
        ends = [finite(end) for end in value] if isinstance(value, list) else []
        if len(ends) != 2 or ends[0] is None or ends[1] is None:
            self._note(key, "a pair of finite numbers")
            return None
        return ends[0], ends[1]

    def inside(self, key: str) -> Fields:
        """The object under a key; empty when there is none."""
        value = self._values[key] if self.given(key) else {}
        return Fields(value, f"{self._place} {key!r}", self._problems)

    def objects(self) -> Iterator[tuple[str, Fields]]:
        """Every key with the object under it, in the order of the file."""
        for key in self._values:
            yield key, self.inside(key)

    def numbers(self, key: str) -> dict[str, float]:
        """The object under a key as finite numbers; other entries are noted and left out."""
        inner = self.inside(key)
        found = {name: inner.number(name) for name in inner._values}
        return {name: value for name, value in found.items() if value is not None}

    def values(self) -> dict[str, Any]:
        """The object as it is."""
        return self._values

    def plain(self) -> dict[str, str]:
        """Every key with its value as text, for display."""
        return {key: as_text(value) for key, value in self._values.items()}


def finite(value: Any) -> float | None:
    """The value as a float when it is a finite JSON number, else None (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _show(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."
