"""What the program says goes through a logger that whoever embeds it can redirect or silence."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest

from vlm_sft.common.console import detail, folded, muted, say, warn
from vlm_sft.common.errors import RunError
from vlm_sft.report.markdown import results_table, results_tones
from vlm_sft.train.event_log import logged


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


def test_details_are_folded_on_the_terminal_and_kept_in_the_log_of_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "log.txt"
    with pytest.raises(RunError), logged(path), folded():
        say("a line")
        detail("a detail\nof two lines")
        with folded(False):
            warn("a warning")
        raise RunError("it broke", "mend it")
    detail("shown again")
    assert capsys.readouterr() == ("a line\nshown again\n", "warning: a warning\n")
    lines = path.read_text().splitlines()
    assert [line.partition("Z ")[2] or line for line in lines] == [
        "a line",
        "a detail",
        "of two lines",
        "warning: a warning",
        "error: it broke",
        "  fix: mend it",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "shown"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)]
)
def test_significant_differences_are_coloured_where_a_terminal_can(
    variables: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    benchmark = {"n": 400, "base": {"accuracy": 0.5}, "splits": {"human": {"n": 9, "base": 0.1, "tuned": 0.9}}}
    results = {
        "benchmarks": {
            name: benchmark | {"tuned": {"accuracy": 0.5 + gain}, "difference": gain, "verdict": verdict}
            for name, gain, verdict in (
                ("one", 0.25, "better"),
                ("two", -0.25, "worse"),
                ("three", 0.01, "no significant difference"),
            )
        }
    }
    screen, table = Terminal(), results_table(results)
    monkeypatch.setattr("sys.stdout", screen)
    say(table, results_tones(results))
    text = screen.getvalue()
    found = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", text)
    assert [(code, cell.strip()) for code, cell in found] == ([("32", "+25.0"), ("31", "-25.0")] if shown else [])
    assert re.sub(r"\x1b\[\d+m", "", text) == table + "\n", "colours move nothing"
