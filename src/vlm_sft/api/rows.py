"""Writes data that a caller holds in memory to a folder of records, which training reads like any other data."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_sft.common import artifacts
from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sources.arrow_tables import name_classes
from vlm_sft.data.sources.locate import base64_kind
from vlm_sft.data.sources.splits import SPLIT_WORDS, SPLITS
from vlm_sft.data.video import VIDEO, VIDEO_FIX

SHAPES = (
    "pass a list of dicts, a datasets.Dataset or DatasetDict, a pandas or polars frame, a path, a name such as "
    '"chartqa", or a dict of splits: {"train": …, "test": …}'
)
_IMAGE_KEYS = {"image", "images", "path"}  # of a record, and of an image that is written as an object
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


def is_named(data: Any) -> bool:
    """Whether data is a path, a name, or a list of them: nothing has to be written."""
    return isinstance(data, str | Path) or (
        isinstance(data, list | tuple) and bool(data) and all(isinstance(one, str | Path) for one in data)
    )


def dataset_argument(data: Any, folder: Path) -> str:
    """The `--dataset` value for some data; rows are first written to `folder`.

    Args:
        data: rows, a data set, a frame, a path, names; see `SHAPES`.
        folder: where rows go: one JSONL file a split, and their images. The same rows give the same files.

    Raises:
        DataError: the data is none of these, or has no rows.
        RunError: the folder cannot be written.
    """
    if is_named(data):
        return str(data) if isinstance(data, str | Path) else ",".join(map(str, data))
    for name, rows in _splits(data).items():
        texts = [json.dumps(record, ensure_ascii=False) for record in _records(rows, folder)]
        if not texts:
            raise DataError(f"the data has no rows{f' in {name}' if name != 'data' else ''}", SHAPES)
        artifacts.write_text_atomic(folder / f"{name}.jsonl", "\n".join(texts) + "\n")
    return str(folder)


def _splits(data: Any) -> dict[str, Any]:
    """Rows by the name of their file: a split, or "data" if the rows name none."""
    if not isinstance(data, Mapping):
        return {"data": data}
    names = {name: SPLIT_WORDS.get(str(name).lower()) for name in data}
    unknown = [str(name) for name, split in names.items() if split is None]
    if unknown or not data:
        raise DataError(
            f"a dict of splits has the keys {', '.join(map(quoted, unknown)) or '(none)'}",
            f"its keys are {', '.join(SPLITS)}; a single row is [{{…}}]",
        )
    return {str(split): data[name] for name, split in names.items()}


def _records(rows: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows as JSON values; their images are written to files."""
    for number, row in enumerate(_mappings(rows), start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is {quoted(row)}, not a dict", SHAPES)
        yield _record(row, folder)


def _record(row: Mapping[Any, Any], folder: Path) -> dict[str, Any]:
    """A row, or an object within one, as JSON values."""
    filled = {str(key): value for key, value in row.items() if not _is_nothing(value)}
    return {key: _value(value, folder, key in _IMAGE_KEYS) for key, value in filled.items()}


def _mappings(rows: Any) -> Iterable[Any]:
    """The rows as mappings."""
    if hasattr(rows, "cast_column") and hasattr(rows, "features"):  # datasets: images stay encoded as they are stored
        return _undecoded(rows)
    if hasattr(rows, "collect_schema") and hasattr(rows, "collect"):  # a lazy frame of polars
        rows = rows.collect()
    if hasattr(rows, "iter_rows"):  # polars
        return rows.iter_rows(named=True)
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        return rows.to_dict("records")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"data is {quoted(rows)}", SHAPES)
    return rows


def _undecoded(rows: Any) -> Any:
    """A data set of the library datasets whose images come as bytes, and classes as their names."""
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Video):
            raise DataError(f"the column {quoted(name)}: {VIDEO}", VIDEO_FIX)
        if isinstance(feature, datasets.Image | datasets.Audio):
            rows = rows.cast_column(name, type(feature)(decode=False))
    classes = {name: one.names for name, one in (rows.features or {}).items() if isinstance(one, datasets.ClassLabel)}
    return map(partial(_name_classes, classes), rows) if classes else rows


def _name_classes(classes: Mapping[str, list[str]], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers; -1 stands for none."""
    named = dict(row)
    name_classes(named, classes)
    return named


def _is_nothing(value: Any) -> bool:
    """Whether a value stands for a cell that is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value) in ("NaT", "<NA>")


def _value(value: Any, folder: Path, image: bool = False) -> Any:
    """A value as JSON has it; pictures become files, and paths of images (`image`) those seen from any folder."""
    if isinstance(value, Image.Image):
        return _store(_png(value), folder)
    if isinstance(value, bytes | bytearray):
        return _store(bytes(value), folder)
    if isinstance(value, np.ndarray) and value.ndim in (2, 3) and value.dtype == np.uint8:
        return _store(_png(Image.fromarray(value)), folder)
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes | bytearray):
            return _store(bytes(value["bytes"]), folder)
        return _record(value, folder)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple | set):
        return [_value(one, folder, image) for one in value]
    if isinstance(value, Path) or (image and isinstance(value, str) and _is_path(value)):
        return str(Path(value).expanduser().resolve())
    return value if isinstance(value, str | int | float | bool) else str(value)


def _is_path(text: str) -> bool:
    """Whether the text of an image is a path, not a URI, a URL or base64."""
    if not 0 < len(text) < 1000 or "\0" in text or "://" in text or text.startswith("data:"):
        return False
    return not base64_kind(text) or Path(text).is_file()


def _png(picture: Image.Image) -> bytes:
    """A picture as PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    kept = picture if picture.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA") else picture.convert("RGB")
    kept.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _store(data: bytes, folder: Path) -> str:
    """Write an encoded image, once, under the hash of its bytes; returns its path below `folder`."""
    suffix = next((one for start, one in _SUFFIXES.items() if data.startswith(start)), "")
    path = folder / "images" / f"{sha256(data).hexdigest()[:32]}{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_bytes_atomic(path, data)
    return path.relative_to(folder).as_posix()
