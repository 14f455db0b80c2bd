"""The files that are imported: CSV, JSON, parquet, and LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.console import say
from vlm_sft.common.errors import QUOTED_CHARACTERS, DataError, bounded, nearest, quoted
from vlm_sft.data.exchange.layouts import Names
from vlm_sft.data.sources.foreign import TABLES, refuse_foreign
from vlm_sft.data.sources.jsonl import records_of_file
from vlm_sft.data.sources.locate import IMAGE_NAMES
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.sources.splits import DATASET_INFO, files_by_split

ENDINGS = (".jsonl", ".json", ".parquet")
LONGEST_CELL = 2**31 - 1  # Python's own limit of 128 KiB refuses pictures as data URIs
QUOTING = 'put texts with delimiters, quotes or lines in quotes, and write a quote inside of one as ""'
SYNONYMS = {
    "image": IMAGE_NAMES,
    "question": ("question", "query", "prompt", "text", "instruction"),
    "answer": ("answer", "label", "response", "target", "output", "completion"),
    "split": ("split", "subset"),
    "id": ("id", "question_id"),
}
OWN_COLUMNS = tuple(
    "image images question answer answers history system messages conversations prompt completion id split".split()
)
COLUMNS = {  # what --columns can name in a layout
    "csv": tuple(SYNONYMS),
    "llamafactory": ("images", "image", "messages", "prompt", "query", "response", "history", "system"),
    "msswift": (*OWN_COLUMNS, "query", "response"),
    "trl": OWN_COLUMNS,
    "jsonl": OWN_COLUMNS,
}


def input_files(source: Path, layout: str) -> dict[str, list[Path]]:
    """The files to import, by the split that their names speak of.

    Raises:
        DataError: there is none.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist", "check the path; it is relative to the working folder")
    refuse_foreign(source)
    return files_by_split(source, TABLES if layout == "csv" else ENDINGS)


def records(path: Path, layout: str, columns: dict[str, str]) -> Iterator[tuple[int, str, Any]]:
    """Yield number, kind of place, and each record, or the RowProblem that stands in for it; as `records_of_file`."""
    if layout == "csv":
        yield from _csv_rows(path, columns)
        return
    pictures = tuple(columns[name] for name in ("image", "images") if name in columns)
    for number, label, record in records_of_file(path, pictures):
        if layout != "llamafactory" and isinstance(record, dict):
            record = record | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        yield number, label, record


def names_for(path: Path, columns: dict[str, str]) -> Names:
    """How the keys of a file are called: by the command line, else by the dataset_info.json beside it."""
    info = path.parent / DATASET_INFO
    entries = read_json(info) if info.is_file() else {}
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and Path(str(entry.get("file_name", ""))).name == path.name:
            return Names(dict(entry.get("columns") or {}) | columns, dict(entry.get("tags") or {}))
    return Names(columns)


def parse_columns(text: str | None, layout: str) -> dict[str, str]:
    """Read `--columns image=picture,question=frage`.

    Args:
        text: the flag; None names nothing.
        layout: one of `layouts.FORMATS`.

    Raises:
        DataError: an entry is not NAME=COLUMN, or nothing in this layout is called NAME.
    """
    pairs = [[part.strip() for part in entry.split("=", 1)] for entry in text.split(",")] if text is not None else []
    example = "e.g. image=picture,question=frage"
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise DataError(f"--columns {quoted(text)}: not NAME=COLUMN, comma separated", example)
    names = [name for name, _ in pairs]
    for name in names:
        if name not in COLUMNS[layout]:
            fix = f"names of --format {layout} are {', '.join(COLUMNS[layout])}"
            near = nearest(name, COLUMNS[layout])
            raise DataError(f"--columns {quoted(text)}: nothing is called {quoted(name)}{near}", fix)
        if names.count(name) > 1:
            raise DataError(f"--columns {quoted(text)}: {name} is named twice", "name it once")
    columns = {name: column for name, column in pairs}
    if layout == "llamafactory" and "image" in columns:
        columns["images"] = columns.pop("image")
    return columns


def _csv_rows(path: Path, columns: dict[str, str]) -> Iterator[tuple[int, str, Any]]:
    """The rows of a CSV by the number of the line that each begins in; a row that cannot be read costs no other one."""
    csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            rows = _split_rows(stream, _delimiter(head))
            _, first = next(rows, (1, []))
            if isinstance(first, RowProblem):
                raise DataError(f"{path}: the first line, which names the columns: {first.detail}", QUOTING)
            chosen = _columns(path, first, columns)
            _tell_columns(path, first, chosen)
            for number, cells in rows:
                yield number, "line", cells if isinstance(cells, RowProblem) else _csv_record(first, cells, chosen)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", "save it as CSV UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error


def _split_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | RowProblem]]:
    """Cut lines into rows of cells; after a row that is broken, reading goes on with the line behind its first one."""
    waiting: deque[str] = deque()
    taken: list[str] = []  # the lines of the present row

    def feed() -> Iterator[str]:
        while line := waiting.popleft() if waiting else next(lines, ""):
            taken.append(line)
            yield line

    number = 1
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            ends = f", read up to line {number + len(taken) - 1}" if len(taken) > 1 else ""
            yield number, RowProblem("broken CSV row", f"its quotes do not close as CSV{ends} ({error}); {QUOTING}")
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        else:
            if cells is None:
                return
            if cells:  # not an empty line
                yield number, cells
        number += len(taken)
        taken.clear()


def _delimiter(head: str) -> str:
    """The delimiter that the first line has most of."""
    return max(",;\t|", key=head.count)


def _columns(path: Path, there: list[str], given: dict[str, str]) -> dict[str, int]:
    """Which place of a row holds what, by the names in the file's first line."""
    by_lower = {name.strip().lower(): place for place, name in enumerate(there)}
    repeated = [name for name, count in Counter(name.strip().lower() for name in there).items() if count > 1]
    chosen = {}
    for ours, synonyms in SYNONYMS.items():
        wanted = [given[ours].lower()] if ours in given else synonyms
        column = next((name for name in wanted if name in by_lower), None)
        if column in repeated:
            raise DataError(f"{path} has several columns called {quoted(column)}", "give each a name of its own")
        if column is not None:
            chosen[ours] = by_lower[column]
        elif ours in given or ours in ("image", "question", "answer"):
            has = ", ".join(name[:QUOTED_CHARACTERS] for name in there) or "nothing"
            fix = f"say which one it is: --columns {ours}=COLUMN"
            raise DataError(f"{path} has no column for the {ours} (it has: {has})", fix)
    return chosen


def _tell_columns(path: Path, there: list[str], chosen: dict[str, int]) -> None:
    """Say what is read from where, and what is not read."""
    read = ", ".join(f"{ours} = {there[place]}" for ours, place in chosen.items())
    rest = [name for place, name in enumerate(there) if place not in chosen.values()]
    say(bounded(f"{path}: {read}" + (f"; columns that are not read: {', '.join(rest)}" if rest else "")))


def _csv_record(first: list[str], cells: list[str], chosen: dict[str, int]) -> dict[str, Any] | RowProblem:
    if len(cells) > len(first) or len(cells) <= max(chosen.values()):
        return RowProblem("broken CSV row", f"it has {len(cells)} cells, the first line {len(first)}")
    return {ours: cells[place].strip() for ours, place in chosen.items()}
