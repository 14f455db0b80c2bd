"""Ranks that share the work of preparing data. Standard library only; `model/caches.py` finds who they are."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nobody(what: str) -> None:
    """There is no other rank to wait for."""


def _alone(value: Any) -> list[Any]:
    return [value]


def _here(work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True, slots=True)
class Team:
    """This rank among those that write to the same cache folder: each prepares its share, and all read everything.

    Attributes:
        index, size: this rank's number, and how many share the folder.
        ranks, local_size: of the whole run, and of this machine, which share its cores.
        wait: waits for all ranks of the run, of other teams too; takes what they do, for the user.
        gather: gives what all ranks of the run pass, by rank.
        agree: does something on the first rank of the run and gives all of them its result, or its error.
    """

    index: int = 0
    size: int = 1
    ranks: int = 1
    local_size: int = 1
    wait: Callable[[str], None] = _nobody
    gather: Callable[[Any], list[Any]] = _alone
    agree: Callable[[Callable[[], Any]], Any] = _here

    @property
    def share(self) -> str:
        """What a line about this rank's work adds; "" where one rank does all of it."""
        return f", 1/{self.size} on each rank" if self.size > 1 else ""

    @property
    def threads(self) -> int:
        """Threads of this rank's share of the machine."""
        return min(16, max(1, (os.cpu_count() or 1) // self.local_size))

    def owns(self, key: str) -> bool:
        """Whether this rank prepares what has a key: the same answer on all ranks, whatever is prepared already."""
        return zlib.crc32(key.encode()) % self.size == self.index


ALONE = Team()
