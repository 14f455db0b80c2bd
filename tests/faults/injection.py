"""Disks that fail and data workers that die or hang where a test wants it: what `injected.c` does, from Python."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("injected.c")
EVER = 1_000_000  # calls


@dataclass(frozen=True)
class Fault:
    """Calls that are struck.

    Attributes:
        call: "read", "write", "fsync", "rename" or "unlink".
        path: pattern of the file's whole path, as of a shell, where `*` takes in slashes.
        action: "eio": the call fails; "kill": its process ends; "stop": its process stands still, and the
            call fails once it goes on; "pause": it stands still, and nothing fails.
        first, count: which of the calls that fit.
        rank: "0", "1", or "*".
        place: "worker": in data workers only; or "*".
    """

    call: str
    path: str
    action: str = "eio"
    first: int = 1
    count: int = EVER
    rank: str = "*"
    place: str = "*"


class Injected:
    """Faults, and how often each of them could have struck.

    Args:
        folder: for the counters; made when missing.
        faults: what is to happen.
    """

    def __init__(self, folder: Path, *faults: Fault) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._counters = [folder / str(number) for number in range(len(faults))]
        self.variables = {"FAULT_RULES": "\n".join(map(_rule, faults, self._counters))}

    @property
    def met(self) -> list[int]:
        """For each fault the calls that fitted."""
        return [path.stat().st_size if path.exists() else 0 for path in self._counters]


def _rule(fault: Fault, counter: Path) -> str:
    parts = (fault.call, fault.rank, fault.place, fault.first, fault.count, fault.action, fault.path, counter)
    return "|".join(map(str, parts))


def can_inject() -> bool:
    """Whether the layer can be built here."""
    return compiler_here() is not None and Path("/proc/self/fd").is_dir()


def compiler_here() -> str | None:
    """A C compiler."""
    return shutil.which("cc") or shutil.which("gcc")


def layer(folder: Path) -> dict[str, str]:
    """Build the layer; the variables that load it into a process. Skips the test where that cannot be done."""
    compiler = compiler_here()
    if compiler is None or not can_inject():
        pytest.skip("faults are injected by a layer that takes a C compiler and Linux")
    library = folder / "injected.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return {"LD_PRELOAD": str(library)}
