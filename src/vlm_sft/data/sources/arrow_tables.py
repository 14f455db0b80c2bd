"""Tables of records: parquet files, and the Arrow files of `datasets` (`save_to_disk`, its cache).

The texts of a file are read group by group; its images stay in it and are read one by one, so a set may be larger than
the memory. What `datasets` wrote about its columns is kept to: a class is its name, not its number.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sources.locate import StoredImage
from vlm_sft.data.video import VIDEO, VIDEO_FIX

if TYPE_CHECKING:
    import pyarrow

ARROW = ".arrow"
_BYTES = object()  # stands for an image whose bytes are in the table
_opened = threading.local()


@dataclass(frozen=True, slots=True)
class CellBytes:
    """Reads one image of a table when called; small, so that data loader workers can receive it.

    Attributes:
        file: the parquet or Arrow file.
        group, row: row group or record batch, and row within it.
        column: the column of images.
        position: which image of the cell; None where a cell is one image.
    """

    file: Path
    group: int
    row: int
    column: str
    position: int | None

    def __call__(self) -> bytes:
        """Return the encoded bytes."""
        cell = _column(self.file, self.group, self.column)[self.row].as_py()
        image = cell if self.position is None else cell[self.position]
        return image if isinstance(image, bytes) else bytes(image["bytes"])


def native_file(path: Path, mode: str = "rb") -> Any:
    """A file opened by Arrow itself, whatever bytes its name holds; to be closed by the caller.

    Raises:
        OSError: it cannot be opened.
    """
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path), mode)


def _batches(stream: Any) -> Any:
    """A reader of the record batches of an Arrow file, in either of its two formats."""
    import pyarrow.ipc

    named = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return pyarrow.ipc.open_file(stream) if named else pyarrow.ipc.open_stream(stream)


def _column(file: Path, group: int, column: str) -> Any:
    """One column of one group; each thread keeps the last one, since rows are read in order."""
    state = file.stat()
    table = (file, state.st_mtime_ns, state.st_size)  # a file that was written again is opened again
    key = (table, group, column)
    if getattr(_opened, "key", None) == key:
        return _opened.value
    if file.suffix.lower() == ARROW:
        if getattr(_opened, "table", None) != table:
            import pyarrow

            _opened.batches = list(_each_batch(_batches(pyarrow.memory_map(os.fsencode(file)))))  # maps, not copies
            _opened.table = table
        _opened.value = _opened.batches[group].column(column)
    else:
        import pyarrow.parquet

        with native_file(file) as stream, pyarrow.parquet.ParquetFile(stream) as opened:
            _opened.value = opened.read_row_group(group, columns=[column]).column(column)
    _opened.key = key
    return _opened.value


def _each_batch(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "get_batch"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell a file that is no table in one line.

    Raises:
        DataError: Arrow refuses it.
    """
    import pyarrow

    kind = "an Arrow file" if path.suffix.lower() == ARROW else "parquet"
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as {kind}: {first}", "write the file again") from error


def table_schema(path: Path) -> pyarrow.Schema:
    """The columns of a table, with their types and what `datasets` says of them.

    Raises:
        DataError: it is no table, or has a column of videos.
    """
    import pyarrow.parquet

    with _readable(path), native_file(path) as stream:
        schema = _batches(stream).schema if path.suffix.lower() == ARROW else pyarrow.parquet.read_schema(stream)
        names = Counter(schema.names)
    if len(names) < len(schema):
        double = next(name for name, count in names.items() if count > 1)
        raise DataError(f"{path} has several columns called {quoted(double)}", "give each a name of its own")
    for name, feature in _features(schema).items():
        if feature.get("_type") == "Video":
            raise DataError(f"{path}, column {quoted(name)}: {VIDEO}", VIDEO_FIX)
    return schema


def picture_columns(schema: pyarrow.Schema) -> list[str]:
    """The columns that hold encoded images, or lists of them, by their types."""
    return [field.name for field in schema if _holds_bytes(field.type)]


def talk_columns(schema: pyarrow.Schema) -> list[str]:
    """The columns that hold conversations, by the names of the parts of their cells."""
    from pyarrow import types

    found = []
    for field in schema:
        kind = field.type.value_type if types.is_list(field.type) or types.is_large_list(field.type) else field.type
        parts = [kind.field(place).name for place in range(kind.num_fields)] if types.is_struct(kind) else []
        found += [field.name] if {"role", "from", "user"} & set(parts) else []
    return found


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        fields = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
        return fields.keys() <= {"bytes", "path"} and "bytes" in fields and _holds_bytes(fields["bytes"])
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote about the columns; empty where it did not, or cannot be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def table_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as records, in order; encoded images stay in the file as `StoredImage`.

    Args:
        path: a parquet or Arrow file.

    Raises:
        DataError: the file cannot be read.
    """
    schema = table_schema(path)
    holding = picture_columns(schema)
    texts = [name for name in schema.names if name not in holding]
    classes = {
        name: feature["names"]
        for name, feature in _features(schema).items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
    with _readable(path):
        for group, table in enumerate(_groups(path, texts, holding)):
            rows = table.select(texts).to_pylist() if texts else [{} for _ in range(table.num_rows)]
            images = {name: _images(path, table.column(name), group, name) for name in holding}
            for index, row in enumerate(rows):
                name_classes(row, classes)
                row = {key: value for key, value in row.items() if value is not None}
                yield row | {name: cells[index] for name, cells in images.items() if cells[index] is not None}


def _groups(path: Path, texts: list[str], holding: list[str]) -> Iterator[Any]:
    """The row groups of a parquet file, or the batches of an Arrow file."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ARROW:
        for batch in _each_batch(_batches(pyarrow.memory_map(os.fsencode(path)))):
            batch.validate(full=True)  # offsets of a damaged file lead out of it
            yield batch
        return
    with native_file(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
        for group in range(table.num_row_groups):
            yield table.read_row_group(group, columns=[*texts, *holding])


def name_classes(row: dict[str, Any], classes: Mapping[str, list[str]]) -> None:
    """Write the names of classes in place of their numbers; -1 stands for none."""
    for name, names in classes.items():
        number = row.get(name)
        if isinstance(number, int):
            row[name] = names[number] if 0 <= number < len(names) else None


def _images(file: Path, column: Any, group: int, name: str) -> list[Any]:
    """The cells of a column of images: paths as they are, bytes as `StoredImage`; no image is copied."""
    cells: list[Any] = []
    for chunk in getattr(column, "chunks", [column]):
        for cell in _cells(chunk):
            row = len(cells)
            where = f"{file} group {group} row {row} {name}"
            if isinstance(cell, list):
                found: Any = [
                    StoredImage(f"{where}[{place}]", CellBytes(file, group, row, name, place)) if one is _BYTES else one
                    for place, one in enumerate(cell)
                ]
            else:
                found = StoredImage(where, CellBytes(file, group, row, name, None)) if cell is _BYTES else cell
            cells.append(found)
    return cells


def _cells(array: Any) -> list[Any]:
    """What each cell holds: `_BYTES`, `{"path": …}`, a list of these, or None."""
    import pyarrow.compute
    from pyarrow import types

    there = array.is_valid().to_pylist()
    if types.is_struct(array.type):
        names = [array.type.field(place).name for place in range(array.type.num_fields)]
        lengths = pyarrow.compute.binary_length(array.field("bytes")).to_pylist()
        paths = array.field("path").to_pylist() if "path" in names else [None] * len(array)
        found: list[Any] = [
            _BYTES if size else {"bytes": None, "path": path} for size, path in zip(lengths, paths, strict=True)
        ]
    elif types.is_binary(array.type) or types.is_large_binary(array.type):
        found = [_BYTES] * len(array)
    elif types.is_fixed_size_list(array.type):
        width = array.type.list_size
        inner = _cells(array.flatten())  # without those of empty cells
        starts = [place * width for place in accumulate(there, initial=0)]
        found = [inner[start : start + width] for start in starts[: len(array)]]
    else:
        ends, inner = array.offsets.to_pylist(), _cells(array.values)
        found = [inner[start:end] for start, end in pairwise(ends)]
    return [cell if valid else None for cell, valid in zip(found, there, strict=True)]
