"""CPU seconds (user and system) of every phase of every test: `CPU_SECONDS=cpu.tsv pytest -p tests.cpu_seconds …`.

Unlike times of the clock they hardly depend on what else the machine does. A process counts in the phase in which it
was waited for, also one that was forked from the warm process.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Generator

import pytest

from tests.processes import Warm


def used() -> float:
    """CPU seconds of this process, of its processes that have ended, and of forked runs."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found) + Warm.cpu_seconds


def _measured(item: pytest.Item, phase: str) -> Generator[None, object, object]:
    begun = used()
    try:
        return (yield)
    finally:
        with open(os.environ["CPU_SECONDS"], "a", encoding="utf-8") as table:
            table.write(f"{used() - begun:.2f}\t{phase}\t{item.nodeid}\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Fixtures."""
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """The test itself."""
    return (yield from _measured(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """The end of fixtures."""
    return (yield from _measured(item, "teardown"))
