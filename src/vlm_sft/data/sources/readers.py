"""The records of one file of a user's data, whatever kind it is of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import parse_json
from vlm_sft.common.errors import DataError
from vlm_sft.data.sources.columns import renamed, require_columns
from vlm_sft.data.sources.compressed import open_data
from vlm_sft.data.sources.csv_tables import csv_records
from vlm_sft.data.sources.files import ARROW, TABLES, kind_of, stem_of
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.sources.splits import SPLIT_WORDS

BOM = b"\xef\xbb\xbf"
# The table of a folder of images in the layout of datasets' imagefolder names its pictures so.
IMAGE_FOLDER = {"image": "file_name", "images": "file_names"}


def records_of_file(
    path: Path,
    columns: Mapping[str, str] | None = None,
    alone: bool = True,
    checked: bool = True,
    seen: set[str] | None = None,
) -> Iterator[tuple[int, str, Any]]:
    """Yield number, kind of place ("line", "item", "row", "sample"), and the record or what stands in for it.

    Args:
        path: JSON lines, a JSON list, CSV or TSV, each of them compressed or not; a WebDataset shard; a table, whose
            images stay in the file.
        columns: our name of a key to the file's.
        alone: `columns` is about this data alone, so that a table has to have each of them.
        checked: a table has to have the columns of our records.
        seen: takes the keys of the file's records, where `columns` is given.

    Raises:
        DataError: the file cannot be read, or a table lacks a column.
    """
    columns = columns or {}
    kind = kind_of(path)
    found: set[str] = set() if seen is None else seen
    of_images = stem_of(path).lower() == "metadata"
    if kind in TABLES:
        found |= set(columns.values())
        for number, label, record in csv_records(path, columns, alone):
            yield number, label, _in_its_split(record) if of_images else record
        return
    names = {**IMAGE_FOLDER, **columns} if of_images else columns
    if kind in (".parquet", ARROW) and checked:
        require_table(path, columns, alone)
    for number, label, record in _records(path, kind):
        if columns and isinstance(record, dict):
            found.update(record)
        record = renamed(record, names)
        yield number, label, _in_its_split(record) if of_images else record


def _in_its_split(record: Any) -> Any:
    """A row about a picture in a folder that is called train, validation or test belongs there."""
    image = record.get("image") if isinstance(record, dict) else None
    top = image.removeprefix("./").partition("/")[0].lower() if isinstance(image, str) else ""
    return record | {"split": SPLIT_WORDS[top]} if top in SPLIT_WORDS and not record.get("split") else record


def require_table(path: Path, columns: Mapping[str, str], alone: bool, place: str = "") -> None:
    """Refuse a parquet or Arrow file that has not the columns of records; as `require_columns`."""
    from vlm_sft.data.sources.arrow_tables import picture_columns, table_schema, talk_columns

    schema = table_schema(path)
    require_columns(place or str(path), schema.names, columns, alone, picture_columns(schema), talk_columns(schema))


def _records(path: Path, kind: str) -> Iterator[tuple[int, str, Any]]:
    if kind in (".parquet", ARROW):
        from vlm_sft.data.sources.arrow_tables import table_records

        for number, row in enumerate(table_records(path)):
            yield number, "row", row
    elif kind == ".tar":
        from vlm_sft.data.sources.webdataset import tar_records

        for number, sample in enumerate(tar_records(path), start=1):
            yield number, "sample", sample
    else:
        yield from _json_records(path, kind == ".json")


def _json_records(path: Path, one_document: bool) -> Iterator[tuple[int, str, Any]]:
    """The records of JSON lines, or of one JSON list."""
    with open_data(path) as stream:
        number, first = 0, b""
        for number, line in enumerate(stream, start=1):
            first = line.removeprefix(BOM) if number == 1 else line
            if first.strip():
                break
        if one_document or first.lstrip().startswith(b"["):
            whole = first + stream.read()
            documents = _whole_document(path, whole)
            if documents is not None:
                yield from ((place, "item", record) for place, record in enumerate(documents, start=1))
                return
            yield from _lines(whole.split(b"\n"), number)
            return
        yield from _lines((line for part in ([first], stream) for line in part), number)


def _lines(lines: Any, first: int) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            yield number, "line", parse_json(line.decode("utf-8"), strict=False, unique=True)
        except UnicodeDecodeError as error:
            yield number, "line", RowProblem("line is not UTF-8", str(error))
        except ValueError as error:
            yield number, "line", RowProblem("broken JSON line", f"not JSON: {error}")


def _whole_document(path: Path, data: bytes) -> list[Any] | None:
    """The records of a file that is one JSON list (or one object over several lines); None for JSON lines."""
    try:
        document = parse_json(data.decode("utf-8"), strict=False, unique=True)
    except ValueError as error:
        if data.lstrip().startswith(b"["):
            raise DataError(f"{path} is not JSON: {error}", "correct the file, or write one record a line") from error
        return None
    return document if isinstance(document, list) else [document]
