"""A program of the user's that grades answers: it reads one line of JSON an answer, and writes one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from vlm_sft.common.errors import EvaluationError, quoted

PATIENCE = 900.0  # seconds for one line; a program may load a model first
GRACE = 10.0  # seconds to end in, once nothing more is asked
FIX = 'let it answer every line with one line, {"score": 0 to 1}, and write all else to standard error'


class OutOfStep(EvaluationError):
    """A program wrote more lines than it was asked for: its verdicts may belong to other answers."""


def asked_program(command: str, name: str, lines: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Give a program one line at a time, and yield the line that it answers with.

    Args:
        command: the program with its arguments.
        name: what messages call it.
        lines: JSON objects by key; `id` names them in messages.

    Raises:
        EvaluationError: it cannot be started, ends, is silent for `PATIENCE`, or writes what is no JSON object, so that
            a later line could be taken for the verdict on another answer; `OutOfStep` where lines are left at the end.
    """
    if not lines:
        return
    process = _started(command, name)
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        try:
            for key, line in lines.items():
                reply = _exchanged(pool, process, json.dumps(line), f"{name}: no answer about {quoted(line['id'])}")
                if not reply:
                    what = f"{name} ended at {quoted(line['id'])} (exit code {_code(process)})"
                    raise EvaluationError(what, FIX)
                if not _is_object(reply):
                    what = f"{name} answered {quoted(line['id'])} with {quoted(reply.strip())}, no JSON object"
                    raise EvaluationError(what, FIX)
                yield key, reply.strip()
            if more := _rest(pool, process).strip():
                what = f"{name} wrote more lines than it was asked for ({quoted(more)}), so none of them counts"
                raise OutOfStep(what, FIX)
        finally:
            _kill(process)
            process.wait()


def _started(command: str, name: str) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that what it starts can be ended with it
        )
    except OSError as error:
        raise EvaluationError(f"{name}: it cannot be started: {error.strerror}", "pass a command that runs") from error


def _exchanged(pool: Executor, process: subprocess.Popen[str], line: str, late: str) -> str:
    """Write one line and read one; "" where the program has ended.

    Raises:
        EvaluationError: nothing comes within `PATIENCE`; the message begins with `late`.
    """

    def exchange() -> str:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""

    try:
        return pool.submit(exchange).result(timeout=PATIENCE)
    except TimeoutError as error:
        raise EvaluationError(f"{late} within {PATIENCE:g} s", FIX) from error


def _rest(pool: Executor, process: subprocess.Popen[str]) -> str:
    """What a program still writes once nothing more is asked; it is ended after `GRACE`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    reading = pool.submit(process.stdout.read)
    try:
        rest = reading.result(timeout=GRACE)
    except TimeoutError:
        _kill(process)
        rest = reading.result()
    _code(process)
    return rest


def _code(process: subprocess.Popen[str]) -> int | str:
    """The exit code of a program that writes no more."""
    try:
        return process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        return "none: it goes on, and writes nothing more"


def _kill(process: subprocess.Popen[str]) -> None:
    """End a program, with all that it has started, unless its end has been seen."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _is_object(text: str) -> bool:
    """Whether a text is an object in JSON."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
