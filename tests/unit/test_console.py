"""What the program says goes through a logger that whoever embeds it can redirect or silence."""

from __future__ import annotations

import logging

import pytest

from vlm_sft.common.console import muted, say, warn


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append((record.levelname, record.getMessage()))


def test_lines_and_warnings_have_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    say("50 % of\nall {}")
    warn("look \x1b[31mhere")
    assert capsys.readouterr() == ("50 % of\nall {}\n", "warning: look \\u001b[31mhere\n")


def test_other_ranks_are_silent_unless_only_they_have_seen_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    say("one")
    warn("two")
    warn("three", any_rank=True)
    assert capsys.readouterr() == ("", "warning (rank 3): three\n")


def test_muted_keeps_lines_back_and_shows_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with muted():
        say("never")
        with muted(False):
            say("never either")
        warn("always")
    with muted(False):
        say("again")
    assert capsys.readouterr() == ("again\n", "warning: always\n")


def test_a_logger_redirects_and_silences(capsys: pytest.CaptureFixture[str]) -> None:
    logger, kept = logging.getLogger("vlm_sft"), Kept()
    before, level = logger.handlers[:], logger.level
    logger.handlers[:] = [kept]
    try:
        say("to a file")
        warn("of a caller")
        logger.setLevel(logging.ERROR)
        say("silenced")
        warn("silenced")
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)
    assert capsys.readouterr() == ("", "")
    assert kept.texts == [("INFO", "to a file"), ("WARNING", "of a caller")]
