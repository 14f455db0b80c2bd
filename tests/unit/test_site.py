"""The documentation site builds strictly: no warning, no dead link, every page within reach."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("material") is None, reason="the docs extra is not installed")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{"index" if page.stem == "index" else page.stem}.html"' in home or page.stem == "index", (
            page.name
        )
    api = (tmp_path / "API.html").read_text(encoding="utf-8")
    assert "load_recipe" in api and "paired_test" in api and "relaxed" in api
    for file in tmp_path.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', file.read_text(encoding="utf-8")
        )
        assert not [url for url in loaded if "canonical" not in url], f"{file.name} loads {loaded}"
