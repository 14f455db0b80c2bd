"""The table of many text rows is that of its record."""

from __future__ import annotations

import text_rows as bench
from common import with_block
from vlm_sft.common import artifacts


def test_the_page_has_the_table_of_the_record() -> None:
    result = artifacts.read_json(bench.RESULT)
    page = bench.PAGE.read_text(encoding="utf-8")
    assert with_block(page, "text_rows", bench.table(result)) == page
    for one in result["runs"]:
        assert one["rows"] == one["text_rows"] and one["steps"] == bench.STEPS
