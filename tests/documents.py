"""The documents, taken apart: fenced blocks with what stands before them, and command lines with their parser."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LAUNCHERS = ("deepspeed", "torchrun", "python")
SCRIPT = "src/train_vlm_sft.py"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the comment before it (`run`, `file NAME`) or ""."""

    language: str
    text: str
    mark: str


def pages() -> list[Path]:
    """Every document that a user reads."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["mark"] or "") for match in found]


def lines_of(text: str) -> list[str]:
    """The command lines of a shell block: continued lines joined, comments and empty lines left out."""
    joined = text.replace("\\\n", " ")
    return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def arguments_of(line: str) -> list[str] | None:
    """What a shell line gives to our parser, verb first; None when it starts another program."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if not words:
        return None
    if words[0] == "vlm-sft":
        return words[1:]
    if words[0] in LAUNCHERS and SCRIPT in words:
        return ["train", *words[words.index(SCRIPT) + 1 :]]
    if words[0] in LAUNCHERS and "vlm_sft" in words:
        return words[words.index("vlm_sft") + 1 :]
    return None


def our_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The lines of a document's shell blocks that our parser has to accept; one with an ellipsis is no full line."""
    for block in blocks(page):
        for line in lines_of(block.text) if block.language in ("bash", "sh", "shell") else []:
            words = arguments_of(line)
            if words is not None and "…" not in line:
                yield line, words


def parse(words: list[str]) -> Namespace:
    """Parse with the real parser; what it refuses ends in SystemExit."""
    return build_parser(words[0] if words and not words[0].startswith("-") else None).parse_args(words)
