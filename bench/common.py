"""What the benchmarks share: where results go, what a result file says about its origin, tables in README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlm_sft.common import artifacts  # noqa: E402
from vlm_sft.common.console import warn  # noqa: E402
from vlm_sft.common.record import device_name, git_state, now, versions  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "chartqa_real"
RESULTS = ROOT / "bench" / "results"
README = ROOT / "bench" / "README.md"
# By benchmarks that were run before.
WRITTEN = ("README.md", "bench/results", "bench/README.md", "docs", "src/vlm_sft/forecast/measured")
PARTIAL = ROOT / "outputs" / "bench"  # results of runs that do less than recorded ones


def origin() -> dict[str, Any]:
    """When, where, from which commit and by which command a result came about."""
    # Folders outside the repository are a matter of the machine: their names are enough.
    arguments = [f"…/{Path(word).name}" if word.startswith(("/", "../")) else word for word in sys.argv[1:]]
    command = ["python", f"bench/{Path(sys.argv[0]).name}", *arguments]
    return {
        "schema": 1,
        "made": now(),
        "command": command,
        "device": device_name(),
        "versions": versions(),
        "git": git_state(WRITTEN),
    }


def write_record(
    path: Path,
    result: dict[str, Any],
    covered: Callable[[dict[str, Any]], Mapping[str, float]],
    partial: Path = PARTIAL,
) -> Path:
    """Write a result, but never in the place of a recorded one that covers more.

    Args:
        path: of the record, which tables are made from.
        result: what this run found.
        covered: what a result is about and how much of each: {"trl": 3} for three rounds of one side.
        partial: folder that takes the result where the record is kept; the record is deleted by hand, or stays.

    Returns:
        The file that was written.
    """
    before = covered(artifacts.read_json(path)) if path.is_file() else {}
    now_covered = covered(result)
    less = [
        f"{name}: {now_covered.get(name, 0):g} of {count:g}"
        for name, count in before.items()
        if now_covered.get(name, 0) < count
    ]
    if less:
        kept, path = path, partial / path.name
        warn(
            f"this run covers less than {kept.name}, which is kept ({'; '.join(less)}); its result: {path}; to replace "
            "the record by a smaller one, delete it first"
        )
    return artifacts.write_json(path, result)


def commit(result: dict[str, Any]) -> str:
    """Short hash of the commit of a result, marked when the checkout had changes."""
    return (result["git"]["hash"] or "unknown")[:7] + (" (dirty)" if result["git"]["dirty"] else "")


def made_at(entries: list[dict[str, Any]]) -> str:
    """The commits of the entries of a result, each of which holds its own."""
    commits = sorted({one["commit"] for one in entries})
    return f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def device_of(result: dict[str, Any]) -> str:
    """The device of a result as a reader is shown it: without trademarks, and "1 thread"."""
    return str(result["device"]).replace("(R)", "").replace(", 1 threads)", ", 1 thread)")


def write_block(name: str, title: str, table: str, page: Path = README) -> None:
    """Replace the table between the marks of one benchmark in a page; a missing section is added."""
    begin, end = marks(name)
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Measurements\n"
    if begin not in text:
        text += f"\n## {title}\n\nMade by `python bench/{name}.py`.\n\n{begin}\n{end}\n"
    artifacts.write_text_atomic(page, with_block(text, name, table))


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a generated block."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def with_block(text: str, name: str, block: str) -> str:
    """A page with another block between the marks of that name, which it has."""
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}"
