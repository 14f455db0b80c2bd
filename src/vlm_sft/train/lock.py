"""One run a folder: a lock that the system releases when its holder dies. Imports console, record and the errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from vlm_sft import artifacts
from vlm_sft.console import warn
from vlm_sft.errors import RunError
from vlm_sft.record import command_line


class RunLock:
    """Holds the output folder while the block runs; taken by rank 0 only.

    A POSIX record lock: it belongs to this process and not to the workers that it forks, it ends with the process
    however that dies, and NFS passes it on to other machines. The file itself stays behind and means nothing.

    Args:
        folder: the run's folder; it exists.
        wanted: False takes no lock (other ranks).
    """

    def __init__(self, folder: Path, wanted: bool = True) -> None:
        self.path = folder / artifacts.LOCK
        self.wanted = wanted
        self._stream: TextIO | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            RunError: another process holds it; the message says which one.
        """
        if not self.wanted:
            return self
        try:
            self._stream = self.path.open("a+", encoding="utf-8")
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there():  # a start that failed took its file away in this moment
                self.__exit__()
                return self.__enter__()
        except OSError as error:
            holder = self._holder() if error.errno in (errno.EAGAIN, errno.EACCES) and self._stream else ""
            self.__exit__()
            if not holder:
                warn(f"{self.path} cannot be locked ({error.strerror}): nothing keeps a second run out of this folder")
                return self
            raise RunError(
                f"--output_dir {self.path.parent} is in use by another run: {holder}",
                "wait for it, stop it, or choose another folder",
            ) from error
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "command": command_line()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name too
            self._stream.truncate(0)
            self._stream.write(json.dumps(facts) + "\n")
            self._stream.flush()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _is_there(self) -> bool:
        """Whether the file that is locked is still the one of this name."""
        assert self._stream is not None
        try:
            return os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        """Who holds the lock, in words."""
        assert self._stream is not None
        self._stream.seek(0)
        try:
            facts = artifacts.parse_json(self._stream.read())
            return f"process {facts['pid']} on {facts['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "a process that did not say which"
