"""The files that are imported, and LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import DataError
from vlm_sft.data.exchange.layouts import Names
from vlm_sft.data.sources.columns import NAMES, SYNONYMS, parse_columns
from vlm_sft.data.sources.files import KINDS, TABLES, data_files, is_pattern
from vlm_sft.data.sources.readers import records_of_file
from vlm_sft.data.sources.spec import HUB
from vlm_sft.data.sources.splits import DATASET_INFO

COLUMNS = {  # what --columns can name in a layout
    "csv": tuple(SYNONYMS),
    "llamafactory": ("images", "image", "messages", "prompt", "query", "response", "history", "system"),
    "msswift": (*NAMES, "query", "response"),
    "trl": NAMES,
    "jsonl": NAMES,
}


def input_files(source: Path, layout: str) -> dict[str, list[Path]]:
    """The files to import, by the split that their names speak of.

    Raises:
        DataError: there is none.
    """
    if str(source).startswith(HUB):
        what = f"{source}: data import reads files"
        fix = f"--dataset {source} reads it; as a folder: vlm-sft data export {source} --format jsonl --output FOLDER"
        raise DataError(what, fix)
    if not source.exists() and not is_pattern(str(source)):
        raise DataError(f"{source} does not exist", "check the path; it is relative to the working folder")
    return data_files(source, TABLES if layout == "csv" else KINDS)


def records(path: Path, layout: str, columns: dict[str, str], seen: set[str]) -> Iterator[tuple[int, str, Any]]:
    """Yield number, kind of place, and each record, or the RowProblem that stands in for it; as `records_of_file`."""
    if layout != "llamafactory":  # which has names of its own for everything
        yield from records_of_file(path, columns, checked=layout != "msswift", seen=seen)
        return
    for number, label, record in records_of_file(path, checked=False):
        seen.update(record if columns and isinstance(record, dict) else ())
        yield number, label, record


def names_for(path: Path, columns: dict[str, str]) -> Names:
    """How the keys of a file are called: by the command line, else by the dataset_info.json beside it."""
    info = path.parent / DATASET_INFO
    entries = read_json(info) if info.is_file() else {}
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and Path(str(entry.get("file_name", ""))).name == path.name:
            return Names(dict(entry.get("columns") or {}) | columns, dict(entry.get("tags") or {}))
    return Names(columns)


def parse_layout_columns(text: str | None, layout: str) -> dict[str, str]:
    """Read `--columns` for a layout, see `parse_columns`.

    Raises:
        DataError: as there; the names depend on the layout.
    """
    columns = parse_columns(text, COLUMNS[layout])
    if layout == "llamafactory" and "image" in columns:
        columns["images"] = columns.pop("image")
    return columns
