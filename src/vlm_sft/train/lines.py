"""Lines of a log that wait for a disk which is full or broken for a while. Imports artifacts and console."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_sft.artifacts import UNENCODABLE
from vlm_sft.console import warn


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
                warn(f"{self.path} cannot be written ({error.strerror}); its lines are kept until it can")
            return
        self._waiting = ""
