"""What all tests share: a cache of their own, and one warm process a worker.

No test writes into the cache of whoever runs it: what it learns about tiny models would change their forecasts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.processes import Warm
from vlm_sft.data.cache.directory import VARIABLE

_FOLDER = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is collected, so that every process which is started has it."""
    config.stash[_FOLDER] = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="vlm_sft_tests.")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it again."""
    shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process with the libraries loaded, of which commands and runs are forked; started when first needed."""
    server = Warm()
    yield server
    server.close()
