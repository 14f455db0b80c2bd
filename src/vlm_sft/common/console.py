"""What the program says to a person: lines, warnings, progress bars.

What is shown never decides about a run: `secure_streams` makes the standard streams ones that take every character and
outlive their reader, for this module and for every library that writes to them.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.errors import bounded, plain
from vlm_sft.common.formats import duration

SECONDS_BETWEEN_LINES = 15.0  # of progress, where the output is not a terminal
SECONDS_WORTH_A_LINE = 2.0  # shorter work is not reported there


def is_main_process() -> bool:
    """True on global rank 0, and when nothing was launched in parallel."""
    return os.environ.get("RANK", "0") == "0"


STREAMS = {"stdout": "standard output", "stderr": "standard error"}
_lost: dict[str, OSError] = {}


class _Enduring(io.RawIOBase):
    """The descriptor of a standard stream, whose errors are kept and not raised.

    Args:
        name: a key of `STREAMS`.
        descriptor: what is written to.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor

    def writable(self) -> bool:
        """It can be written to, whatever becomes of it."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write all of it, or note why that cannot be; a later write is tried again: a disk may have room by then."""
        rest = memoryview(data).cast("B")
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another program that shares the terminal made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                _lost.setdefault(self.name, error)
                break
        return len(data)


def secure_streams() -> None:
    """Let no character and no loss of standard output or error end the program.

    Characters that a stream's encoding lacks are replaced; what a closed pipe, a full disk, or a terminal that is gone
    does not take is dropped, and `lost_streams` tells. Streams that are no files (a notebook, a test) are left alone.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # the descriptor was closed when the program began
            _lost.setdefault(name, OSError(errno.EBADF, os.strerror(errno.EBADF)))
            stream = open(_nowhere(descriptor), "w", encoding="utf-8")
            setattr(sys, name, stream)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")
        raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u leaves the buffer out
        if isinstance(raw, io.FileIO) and raw.fileno() == descriptor:
            stream.flush()
            secured = io.TextIOWrapper(
                io.BufferedWriter(_Enduring(name, descriptor)),
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, secured)


def _nowhere(descriptor: int) -> int:
    """Open the null device at a standard descriptor that is closed, and return where it is.

    Otherwise a file of the run would get that number, and what a library prints.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) < descriptor:
        pass
    os.set_inheritable(opened, True)
    return opened


def lost_streams() -> dict[str, OSError]:
    """The standard streams that could not take all that was said, with the first reason: {"stdout": …}."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    return dict(_lost)


@dataclass(frozen=True, slots=True)
class Tone:
    """A cell of a table that a terminal shows in green (better) or red (worse); its sign says the same.

    Attributes:
        line: of the text, from 0.
        cell: its text, the last such in the line.
        better: whether it is good news.
    """

    line: int
    cell: str
    better: bool


class _Terminal(logging.Handler):
    """Shows a record on the standard stream of the moment: warnings on standard error, the rest on standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or several where the text has several."""
        text = record.getMessage()
        stream = sys.stdout
        if shows_colours(stream):
            text = _coloured(text, getattr(record, "tones", ()))
        if record.levelno >= logging.WARNING:
            stream = sys.stderr
            rank = "" if is_main_process() else f" (rank {os.environ['RANK']})"
            text = f"warning{rank}: {text}"
        stream.write(text + "\n")
        stream.flush()


def shows_colours(stream: Any) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not asked for none (no-color.org)."""
    plain_ones = ("", "dumb", "unknown")
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in plain_ones and bool(stream.isatty())


def _coloured(text: str, tones: Sequence[Tone]) -> str:
    """A text with some of its cells in colour."""
    lines = text.split("\n")
    for tone in tones:
        start, cell, end = lines[tone.line].rpartition(tone.cell)
        lines[tone.line] = f"{start}\x1b[{32 if tone.better else 31}m{cell}\x1b[0m{end}"
    return "\n".join(lines)


# What `say`, `detail` and `warn` pass on: whoever embeds the package can set its level or its handlers.
LOGGER = logging.getLogger("vlm_sft")
LOGGER.setLevel(logging.DEBUG)
LOGGER.propagate = False  # a root handler would show every line twice
_TERMINAL = _Terminal()
LOGGER.addHandler(_TERMINAL)


@contextmanager
def muted(wanted: bool = True) -> Iterator[None]:
    """Keep `say` silent while the block runs; warnings are shown all the same."""
    before = LOGGER.level
    LOGGER.setLevel(max(before, logging.WARNING) if wanted else before)
    try:
        yield
    finally:
        LOGGER.setLevel(before)


@contextmanager
def folded(wanted: bool = True) -> Iterator[None]:
    """Keep what `detail` tells off the terminal while the block runs; the log of a run gets it all the same."""
    before = _TERMINAL.level
    _TERMINAL.setLevel(logging.INFO if wanted else before)
    try:
        yield
    finally:
        _TERMINAL.setLevel(before)


def detail(text: str) -> None:
    """Tell what few readers look for, as `say` does; `folded` keeps it off the terminal."""
    if is_main_process():
        LOGGER.debug("%s", plain(text))


def say(text: str, tones: Sequence[Tone] = ()) -> None:
    """Tell the user one thing, on standard output, from rank 0 only.

    Args:
        text: what is told.
        tones: its cells that are good or bad news.
    """
    if is_main_process():
        LOGGER.info("%s", plain(text), extra={"tones": tones})


def warn(text: str, any_rank: bool = False) -> None:
    """Tell the user that something needs attention, on standard error, from rank 0 only; long lines are cut.

    Args:
        text: what does.
        any_rank: other ranks tell it too, with their number: what only they have seen.
    """
    if is_main_process() or any_rank:
        LOGGER.warning("%s", bounded(plain(text)))


def in_notebook() -> bool:
    """Whether a notebook shows what is printed: Jupyter, VS Code, Colab, Kaggle."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


class Bar:
    """A progress bar with count, rate and time left; silent on other ranks.

    Where the output is not a terminal it writes a line now and then, and one at the end, instead of redrawing.

    Args:
        total: how many things there are.
        description: what is being done.
        unit: what is counted, in the plural.
    """

    def __init__(self, total: int, description: str, unit: str) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._count, self._note = 0, ""
        self._began = self._told = time.monotonic()
        self._bar = None
        if is_main_process() and (sys.stderr.isatty() or in_notebook()):
            with warnings.catch_warnings():  # without ipywidgets a notebook gets a bar of text
                warnings.filterwarnings("ignore", "IProgress not found")
                from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=plain(description), unit=f" {unit}", dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._told > self._pause():
            self._tell()

    def note(self, text: str) -> None:
        """Show a text beside the bar from the next advance on, in place of the one before."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(plain(text), refresh=False)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
        elif time.monotonic() - self._began > SECONDS_WORTH_A_LINE:
            self._tell()

    def _pause(self) -> float:
        """Seconds between two lines: they become rarer, down to a sixth."""
        return min(max(SECONDS_BETWEEN_LINES, 0.1 * (self._told - self._began)), 6 * SECONDS_BETWEEN_LINES)

    def _tell(self) -> None:
        """Write one line of progress."""
        if not is_main_process():
            return
        self._told = time.monotonic()
        seconds = self._told - self._began
        rate = self._count / max(seconds, 1e-9)
        left = (self._total - self._count) / rate if rate else 0.0
        end = f", {duration(left)} left" if self._count < self._total else f" in {duration(seconds)}"
        note = f", {self._note}" if self._note else ""
        line = f"{self._description}: {self._count:,} of {self._total:,} {self._unit}, {rate:.1f}/s{end}{note}"
        sys.stderr.write(plain(line) + "\n")
        sys.stderr.flush()


@contextmanager
def progress(total: int, description: str, unit: str = "it") -> Iterator[Bar]:
    """Show progress of `total` things while the block runs."""
    bar = Bar(total, description, unit)
    try:
        yield bar
    finally:
        bar.close()
