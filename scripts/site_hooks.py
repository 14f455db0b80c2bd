"""Hooks of the documentation site (mkdocs.yml): pages that are in no menu yet, and links to files beside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FLAG = re.compile(r"(?<![\w-])--\w[\w-]*")
INLINE_CODE = re.compile(r"(?<!<pre>)<code>([^<]*)</code>")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_config(config: Any) -> Any:
    """Put every page that the menu does not name under "More", so that none is out of reach."""
    entries = [entry for section in config["nav"] for pages in section.values() for entry in pages]
    named = {page for entry in entries for page in (entry.values() if isinstance(entry, dict) else [entry])}
    more = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md") if path.name not in named)
    if more:
        config["nav"].append({"More": more})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show what lies outside docs/ as a file of the repository: the site holds no copy of it."""
    return OUTSIDE.sub(r'<span title="\2 in the repository">\1</span>', markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep flags in running text whole: a browser would break a line after their dashes."""
    return INLINE_CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)
