"""The files that are imported: CSV, JSON, parquet, and LLaMA-Factory's dataset_info.json. Imports the sources."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_sft.artifacts import read_json
from vlm_sft.data.exchange.layouts import Names
from vlm_sft.data.sources.jsonl import records_of_file
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.sources.splits import DATASET_INFO, files_by_split
from vlm_sft.errors import DataError

ENDINGS = (".jsonl", ".json", ".parquet")
CSV_ENDINGS = (".csv", ".tsv")
SYNONYMS = {
    "image": ("image", "image_path", "image_file", "file_name", "filename", "file", "path", "picture", "img"),
    "question": ("question", "query", "prompt", "text", "instruction"),
    "answer": ("answer", "label", "response", "target", "output", "completion"),
    "split": ("split", "subset"),
    "id": ("id", "question_id"),
}


def input_files(source: Path, layout: str) -> dict[str, list[Path]]:
    """The files to import, by the split that their names speak of.

    Raises:
        DataError: there is none.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist", "check the path; it is relative to the working folder")
    return files_by_split(source, CSV_ENDINGS if layout == "csv" else ENDINGS)


def records(path: Path, layout: str, columns: dict[str, str]) -> Iterator[tuple[int, str, Any]]:
    """Yield number, kind of place, and each record, or the RowProblem that stands in for it; as `records_of_file`."""
    return _csv_rows(path, columns) if layout == "csv" else records_of_file(path)


def names_for(path: Path, columns: dict[str, str]) -> Names:
    """How the keys of a file are called: by the command line, else by the dataset_info.json beside it."""
    info = path.parent / DATASET_INFO
    entries = read_json(info) if info.is_file() else {}
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and Path(str(entry.get("file_name", ""))).name == path.name:
            return Names(dict(entry.get("columns") or {}) | columns, dict(entry.get("tags") or {}))
    return Names(columns)


def parse_columns(text: str | None) -> dict[str, str]:
    """Read `--columns image=picture,question=frage`.

    Raises:
        DataError: an entry is not NAME=COLUMN.
    """
    pairs = [entry.partition("=") for entry in text.split(",")] if text else []
    if any(not (name.strip() and column.strip()) for name, _, column in pairs):
        raise DataError(f"--columns {text}: not NAME=COLUMN, comma separated", "e.g. image=picture,question=frage")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _csv_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            rows = csv.DictReader(stream, delimiter=_delimiter(head), strict=True)
            chosen = _columns(path, list(rows.fieldnames or []), columns)
            for row in rows:
                yield rows.line_num, "line", _csv_record(row, chosen)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", "save it as CSV UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}", "quote texts with delimiters, quotes or lines") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error


def _delimiter(head: str) -> str:
    """The delimiter that the first line has most of."""
    return max(",;\t|", key=head.count)


def _columns(path: Path, there: list[str], given: dict[str, str]) -> dict[str, str]:
    """Our names to those in the file's first line."""
    by_lower = {name.strip().lower(): name for name in there}
    chosen = {}
    for ours, synonyms in SYNONYMS.items():
        wanted = [given[ours].lower()] if ours in given else synonyms
        column = next((by_lower[name] for name in wanted if name in by_lower), None)
        if column is not None:
            chosen[ours] = column
        elif ours in given or ours in ("image", "question", "answer"):
            raise DataError(
                f"{path} has no column for the {ours} (it has: {', '.join(there) or 'nothing'})",
                f"say which one it is: --columns {ours}=COLUMN",
            )
    return chosen


def _csv_record(row: dict[str | Any, Any], chosen: dict[str, str]) -> dict[str, Any] | RowProblem:
    if row.get(None) or any(row[column] is None for column in chosen.values()):
        return RowProblem("broken CSV row", "it has another number of cells than the first line")
    return {ours: row[column] for ours, column in chosen.items()}
