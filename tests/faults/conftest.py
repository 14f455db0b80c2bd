"""What tests of injected faults share: one place, and the warm process, which has the layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import make_place
from tests.faults.injection import can_inject
from tests.processes import Warm


@pytest.fixture(scope="package")
def injected_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and data."""
    return make_place(tmp_path_factory.mktemp("injected"))


@pytest.fixture(scope="package")
def injected_warm(warm: Warm) -> Warm:
    """A warm process whose runs can be struck."""
    if not can_inject():
        pytest.skip("faults are injected by a layer that takes a C compiler and Linux")
    return warm
