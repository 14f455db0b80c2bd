"""CSV and TSV: rows by the names in the first line; a row that is broken costs no other one."""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from vlm_sft.common.console import say
from vlm_sft.common.errors import DataError, bounded, quoted
from vlm_sft.data.sources.columns import SYNONYMS, flag_for, has_of, no_column_for
from vlm_sft.data.sources.compressed import open_data
from vlm_sft.data.sources.rows import RowProblem

LONGEST_CELL = 2**31 - 1  # Python's own limit of 128 KiB refuses pictures as data URIs
QUOTING = 'put texts with delimiters, quotes or lines in quotes, and write a quote inside of one as ""'


def csv_records(path: Path, columns: Mapping[str, str], alone: bool = True) -> Iterator[tuple[int, str, Any]]:
    """The rows of a CSV by the number of the line that each begins in.

    Args:
        path: CSV or TSV, compressed or not; commas, semicolons, tabs and bars are told apart.
        columns: our name of a column to the file's; for others the usual names are looked for.
        alone: `columns` is about this file alone, so that each of them has to be there.

    Yields:
        Number, "line", and the record or what stands in for it.

    Raises:
        DataError: the file cannot be read, or has no column for image, question or answer.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        with open_data(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            rows = _split_rows(chain([head], lines), _delimiter(head))
            _, first = next(rows, (1, []))
            if isinstance(first, RowProblem):
                raise DataError(f"{path}: the first line, which names the columns: {first.detail}", QUOTING)
            chosen = _columns(path, first, columns, alone)
            _tell_columns(path.resolve(), path.stat().st_mtime_ns, _choice(path, first, chosen))
            for number, cells in rows:
                yield number, "line", cells if isinstance(cells, RowProblem) else _csv_record(first, cells, chosen)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", "save it as CSV UTF-8") from error


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


def _columns(path: Path, there: list[str], given: Mapping[str, str], alone: bool) -> dict[str, int]:
    """Which place of a row holds what, by the names in the file's first line."""
    by_lower = {name.strip().lower(): place for place, name in enumerate(there)}
    repeated = [name for name, count in Counter(name.strip().lower() for name in there).items() if count > 1]
    chosen: dict[str, int] = {}
    missing = []
    for ours in dict.fromkeys((*SYNONYMS, *given)):
        named = [given[ours].lower()] if ours in given else []
        wanted = named if named and alone else [*named, *SYNONYMS.get(ours, ())]
        column = next((name for name in wanted if name in by_lower), None)
        if column in repeated:
            raise DataError(f"{path} has several columns called {quoted(column)}", "give each a name of its own")
        if column is not None:
            chosen[ours] = by_lower[column]
        elif (ours in given and alone) or ours in ("image", "question", "answer"):
            missing.append(ours)
    if missing:
        known = {ours: there[place] for ours, place in chosen.items() if ours in given}
        fix = f"say which they are: {flag_for([*known, *missing], there, known)}"
        raise DataError(f"{path} has {no_column_for(missing)} (it has: {has_of(there)})", fix)
    return chosen


def _choice(path: Path, there: list[str], chosen: dict[str, int]) -> str:
    """What is read from where, and what is not read."""
    read = ", ".join(ours if there[place] == ours else f"{ours} from {there[place]}" for ours, place in chosen.items())
    rest = [name for place, name in enumerate(there) if place not in chosen.values()]
    return f"{path}: reading {read}" + (f"; columns that are not read: {', '.join(rest)}" if rest else "")


@cache
def _tell_columns(place: Path, changed: int, choice: str) -> None:
    """Say the choice of a file once, however often it is read."""
    say(bounded(choice))


def _csv_record(first: list[str], cells: list[str], chosen: dict[str, int]) -> dict[str, Any] | RowProblem:
    if len(cells) > len(first) or len(cells) <= max(chosen.values()):
        return RowProblem("broken CSV row", f"it has {len(cells)} cells, the first line {len(first)}")
    return {ours: cells[place].strip() for ours, place in chosen.items()}
