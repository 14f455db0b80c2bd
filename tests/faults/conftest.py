"""What tests of injected faults share: one place, and one warm process with the layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import make_place
from tests.faults.injection import layer
from tests.processes import Warm


@pytest.fixture(scope="package")
def injected_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and data."""
    return make_place(tmp_path_factory.mktemp("injected"))


@pytest.fixture(scope="package")
def injected_warm(injected_place: Path) -> Iterator[Warm]:
    """A warm process whose runs can be struck."""
    server = Warm(layer(injected_place))
    yield server
    server.close()
