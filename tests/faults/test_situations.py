"""The situations of docs/RELIABILITY.md, played; a few of each kind; the others are marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import situations
from tests.faults.situations import SITUATIONS
from tests.faults.situations.place import CannotPlay, Place, Situation
from tests.processes import Warm

QUICK = (
    "password_of_an_image_url",
    "code_in_prompt",
    "formulas_in_exported_data",
    "escapes_on_the_terminal",
    "absolute_path",
    "link_to_a_folder",
    "pictures_of_a_foreign_run",
    "cache_disk_full_or_read_only",
    "cache_with_links",
    "umask_of_the_user",
    "answer_edited",
    "odd_numbers",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize(
    "one", [pytest.param(one, marks=() if one.name in QUICK else pytest.mark.slow, id=one.name) for one in SITUATIONS]
)
def test_situation(one: Situation, tmp_path: Path, warm: Warm, shared: Path) -> None:
    try:
        assert one.play(Place(tmp_path / "place", warm, shared))
    except CannotPlay as reason:
        pytest.skip(str(reason))


def test_the_page_holds_what_was_recorded() -> None:
    record = json.loads(situations.RECORD.read_text(encoding="utf-8"))
    assert record["situations"].keys() == {one.name for one in SITUATIONS}
    assert all(row["held"] for row in record["situations"].values())
    assert situations.table(record) in situations.PAGE.read_text(encoding="utf-8")
