"""Lines of a log that wait for a disk which is full or broken for a while."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import UNENCODABLE
from vlm_sft.common.console import LOGGER, is_main_process, warn
from vlm_sft.common.errors import VlmSftError, plain


class PatientLines:
    """Appends lines to a file; a disk that refuses them ends no training that could go on.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def append(self, line: str) -> None:
        """Write a line, whole or not at all; where the disk refuses it, it is kept and written with the next one.

        Args:
            line: without its end.
        """
        first = not self._waiting
        self._waiting += line + "\n"
        try:
            # Without a buffer: what one has kept after an error, closing the file would write once more.
            with self.path.open("ab", buffering=0) as stream:
                end = stream.tell()
                rest = self._waiting.encode("utf-8", UNENCODABLE)
                try:
                    while rest:
                        rest = rest[stream.write(rest) :]
                except OSError:
                    os.truncate(self.path, end)
                    raise
        except OSError as error:
            if first:
                warn(f"{self.path} cannot be written ({error.strerror}); its lines are kept in memory until then")
            return
        self._waiting = ""


class _RunLog(logging.Handler):
    """log.txt: every line with its time in UTC; warnings say so. A resumed run goes on with it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._lines = PatientLines(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record; a text of several lines has one time."""
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self._lines.append(f"{moment} {mark}{record.getMessage()}")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Keep what rank 0 tells while the block runs, details too, and the error that ends it.

    Args:
        path: the file; lines are appended.
    """
    if not is_main_process():
        yield
        return
    handler = _RunLog(path)
    LOGGER.addHandler(handler)
    try:
        yield
    except VlmSftError as error:
        record = LOGGER.makeRecord(LOGGER.name, logging.ERROR, path.name, 0, "%s", (plain(str(error)),), None)
        handler.emit(record)
        raise
    finally:
        LOGGER.removeHandler(handler)


_NAMED = 64  # sample ids of one event that are written out


class EventLog:
    """anomalies.jsonl: appended to, never rewritten, so that a resumed run keeps what happened before.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = PatientLines(path)

    def write(self, step: int, kind: str, detail: str, sample_ids: Sequence[str] = (), **facts: Any) -> None:
        """Append one event and warn; on rank 0 only.

        Args:
            step: optimizer step, 1 for the first.
            kind: a name of docs/ARTIFACTS.md.
            detail: one sentence.
            sample_ids: the questions that it is about.
            **facts: further values.
        """
        if not is_main_process():
            return
        row: dict[str, Any] = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "kind": kind}
        row |= {"sample_ids": list(sample_ids[:_NAMED]), "samples": len(sample_ids), "detail": detail}
        row |= {name: _json(value) for name, value in facts.items()}
        self._lines.append(json.dumps(row, ensure_ascii=False))
        named = f": {', '.join(sample_ids[:3])}{', …' if len(sample_ids) > 3 else ''}" if sample_ids else ""
        warn(f"step {step}: {detail}{named} (recorded in {artifacts.ANOMALIES})")


def _json(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
