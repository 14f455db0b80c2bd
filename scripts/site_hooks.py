"""Hooks of the documentation site (mkdocs.yml): pages that are in no menu yet, and links to files beside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_config(config: Any) -> Any:
    """Put every page that the menu does not name under "More", so that none is out of reach."""
    named = {page for section in config["nav"] for pages in section.values() for page in pages}
    more = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md") if path.name not in named)
    if more:
        config["nav"].append({"More": more})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show what lies outside docs/ as a file of the repository: the site holds no copy of it."""
    return OUTSIDE.sub(r'<span title="\2 in the repository">\1</span>', markdown)
