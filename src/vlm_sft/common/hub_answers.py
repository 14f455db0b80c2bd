"""What the Hugging Face Hub has answered during one command: it is asked once for each thing."""

from __future__ import annotations

from typing import Any

ANSWERS: dict[str, Any] = {}  # a configuration by its Hub id; by its message's key, that the Hub cannot be reached


def forget_answers() -> None:
    """Begin a command: the Hub may be reachable by now, or have something new."""
    ANSWERS.clear()
