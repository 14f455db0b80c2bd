"""A report as a browser lays it out: rows of figures are full, a phone scrolls one way only, dates are the reader's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import chromium
from tests.report_runs import make_run
from vlm_sft.report.html import write_report

# Of each row of each grid of figures: by how many pixels its left margin differs from its right one.
ROWS = """[...document.querySelectorAll('.figures')].filter(grid => grid.offsetWidth).flatMap(grid => {
  const box = grid.getBoundingClientRect(), rows = [];
  for (const one of [...grid.children].map(child => child.getBoundingClientRect())) {
    const row = rows.find(row => row.some(other => one.top < other.bottom && other.top < one.bottom));
    row ? row.push(one) : rows.push([one]);
  }
  return rows.map(row => Math.abs(
    Math.min(...row.map(one => one.left)) - box.left - box.right + Math.max(...row.map(one => one.right))));
})"""


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("runs", [1, 2])
def test_rows_of_figures_are_full_and_a_phone_fits(tmp_path: Path, runs: int) -> None:
    folders = [make_run(tmp_path / f"run{number}") for number in range(runs)]
    page = write_report(folders, tmp_path / "r.html")
    with chromium.Chromium(1150, 900) as browser:
        browser.open(page)
        browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        lopsided = browser.run(ROWS)
        assert lopsided and max(lopsided) < 60, lopsided
        if runs == 1:
            shown = browser.run("document.querySelector('time').textContent")
            assert re.fullmatch(r"[12] Jan 2026, \d\d:\d\d", shown), shown
    with chromium.Chromium(390, 800, phone=True) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") == 390
        heights = browser.run("[...document.querySelectorAll('.highlights')].map(one => one.offsetHeight)")
        assert all(height < 700 for height in heights)
