"""What a message has to name, whatever its wording: the flag, the file, the number."""

from __future__ import annotations


def line_with(text: str, *parts: object) -> str:
    """The first line of what was printed that holds all parts; fails where there is none."""
    lines = [line for line in text.splitlines() if all(str(part) in line for part in parts)]
    assert lines, f"no line with {parts}: {text[-2000:]}"
    return lines[0].strip()
