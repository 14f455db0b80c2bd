"""Parquet files of records in our own keys or those of other trainers.

The texts of a file are read row group by row group; its images stay in it and are read one by one, so a set may be
larger than the memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import DataError
from vlm_sft.data.sources.locate import StoredImage

IMAGE_COLUMNS = ("images", "image")
_opened = threading.local()


@dataclass(frozen=True, slots=True)
class CellBytes:
    """Reads one image of a parquet file when called; small, so that data loader workers can receive it.

    Attributes:
        file: the parquet file.
        group, row: row group, and row within it.
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


def _column(file: Path, group: int, column: str) -> Any:
    """One column of one row group; each thread keeps the last one, since rows are read in order."""
    key = (file, group, column)
    if getattr(_opened, "key", None) != key:
        import pyarrow.parquet

        with native_file(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            _opened.value = table.read_row_group(group, columns=[column]).column(column)
        _opened.key = key
    return _opened.value


def parquet_columns(path: Path) -> list[str]:
    """The columns of a parquet file.

    Raises:
        DataError: it is no parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with native_file(path) as stream:
            return list(pyarrow.parquet.read_schema(stream).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}", "write the file again") from error


def parquet_records(path: Path, pictures: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file as records, in order.

    Args:
        path: the file. Columns `images` or `image` hold paths, encoded bytes, or `{"bytes", "path"}`.
        pictures: other columns that hold such.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    names = parquet_columns(path)
    holding = [name for name in names if name in IMAGE_COLUMNS or name in pictures]
    texts = [name for name in names if name not in holding]
    try:
        with native_file(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=texts).to_pylist() if texts else []
                images = {
                    name: _images(path, table.read_row_group(group, columns=[name]).column(name), group, name)
                    for name in holding
                }
                for index, row in enumerate(rows):
                    row = {key: value for key, value in row.items() if value is not None}
                    yield row | {name: cells[index] for name, cells in images.items() if cells[index] is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}", "write the file again") from error


def _images(file: Path, column: Any, group: int, name: str) -> list[Any]:
    """The cells of a column of images: paths as they are, bytes as `StoredImage`."""
    cells: list[Any] = []
    for row, cell in enumerate(column):
        value = cell.as_py()
        where = f"{file} group {group} row {row} {name}"
        if isinstance(value, list):
            cells.append(
                [
                    _image(image, f"{where}[{position}]", CellBytes(file, group, row, name, position))
                    for position, image in enumerate(value)
                ]
            )
        else:
            cells.append(_image(value, where, CellBytes(file, group, row, name, None)))
    return cells


def _image(value: Any, where: str, load: CellBytes) -> Any:
    stored = isinstance(value, bytes) or (isinstance(value, dict) and bool(value.get("bytes")))
    return StoredImage(where, load) if stored else value
