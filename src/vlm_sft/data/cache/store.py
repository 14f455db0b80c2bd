"""Records of tensors on disk: immutable, memory-mapped safetensors shards with JSON indexes.

A shard's name is a SHA-256 of its content; its index appears after it, by an atomic rename. So several processes may
add to one folder, and a crash leaves nothing that is read. The index holds a checksum of each record, which is compared
when a record is read for the first time: a start reads no more than it needs, and nothing damaged is used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vlm_sft.common.artifacts import json_text, parse_json, write_bytes_atomic, write_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import size
from vlm_sft.data.cache.directory import ENTRY, FORMAT

SHARD_BYTES = 128 * 1024**2  # a shard is held in memory twice while it is written
SHARD_RECORDS = 20_000
SPARE_BYTES = 1024**3  # of the disk, left to others
Record = dict[str, torch.Tensor]
_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CacheFullError(OSError):
    """The disk or the budget has no room for more records."""


def record_bytes(record: Record) -> int:
    """Bytes of a record's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in record.values())


class _Shard:
    """One mapped file. It maps itself again after a fork server or a spawn has copied it.

    Args:
        path: the file.
        checks: checksum of each record, from `_record_check`.
    """

    def __init__(self, path: Path, checks: Sequence[str]) -> None:
        self.path = path
        self._checks = checks
        self._intact: set[int] = set()
        self._map()
        size = int.from_bytes(self._bytes[:8], "little")
        header = parse_json(self._bytes[8 : 8 + size].decode("utf-8"))
        self._fields: list[list[tuple[str, str, list[int], int]]] = [[] for _ in checks]
        for name, value in header.items():
            if name == "__metadata__":
                continue
            row, field = name.split(".", 1)
            begin, end = value["data_offsets"]
            if 8 + size + end > len(self._bytes):
                raise ValueError("it is cut off")
            self._fields[int(row)].append((field, value["dtype"], value["shape"], 8 + size + begin))
        for fields in self._fields:
            fields.sort(key=lambda field: _by_numbers(field[0]))  # safetensors has "10" before "2"

    def problem(self, row: int) -> str:
        """Why a record is not what was written; "" where it is, which is looked at once."""
        if row in self._intact:
            return ""
        try:
            if self._look(row) != self._checks[row]:
                return "the checksum of a record does not match"
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, OverflowError) as error:
            return str(error)  # the disk cannot read it, or its header is damaged
        self._intact.add(row)
        return ""

    def _look(self, row: int) -> str:
        """Checksum of a record as it is on disk: an error of the disk would end a process that looks at mapped memory.

        Raises:
            OSError: the disk cannot read it.
        """
        record = self.record(row)
        try:
            with self.path.open("rb") as stream:
                for field, _, _, offset in self._fields[row]:
                    stream.seek(offset)
                    size = record_bytes({field: record[field]})
                    if len(stream.read(size)) != size:
                        raise ValueError("it is cut off")
        except FileNotFoundError:  # cleared meanwhile: what is mapped stays
            pass
        return _record_check(record)

    def _map(self) -> None:
        with self.path.open("rb") as stream:
            # Copy on write: torch wants memory that may be written; nothing is copied as long as nobody writes.
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def record(self, row: int) -> Record:
        """The tensors of one record, not copied."""
        found = {}
        for field, kind, shape, offset in self._fields[row]:
            count = torch.Size(shape).numel()
            dtype = _TYPES[kind]
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset) if count else None
            found[field] = torch.empty(shape, dtype=dtype) if flat is None else flat.view(shape)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


class Store:
    """The records of one cache entry.

    Args:
        folder: the entry's folder, from `cache_folder.open_entry`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[_Shard, int]] = {}
        self._opened: set[str] = set()

    def open(self, wanted: Iterable[str]) -> None:
        """Map the shards that hold wanted records; those that cannot be are named in one line and removed.

        Args:
            wanted: keys of records.
        """
        needed = set(wanted) - self._places.keys()
        for index in sorted(self.folder.glob("*.json")) if needed else ():
            if index.name == ENTRY or index.name in self._opened:
                continue
            try:
                self._open_shard(index, needed)
            except FileNotFoundError:  # cleared by another process meanwhile
                continue
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                _remove(index, str(error))

    def _open_shard(self, index: Path, needed: set[str]) -> None:
        """Map one shard when it holds something that is needed."""
        text = index.read_text(encoding="utf-8")
        value = parse_json(text)
        if text != json_text(value):
            raise ValueError("its index is damaged")
        records = value["records"]
        if value.pop("check") != _check(value):
            raise ValueError("the checksum of its index does not match")
        if value["format"] != FORMAT or needed.isdisjoint(records):
            return
        path = index.with_suffix(".safetensors")
        if not path.is_file():
            raise ValueError("only its index is there")
        if path.stat().st_size != value["bytes"]:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {value['bytes']:,}")
        shard = _Shard(path, value["checks"])
        self._opened.add(index.name)
        for key, row in records.items():
            self._places.setdefault(key, (shard, row))

    def __contains__(self, key: str) -> bool:
        """True when the record is on disk and mapped."""
        return key in self._places

    def get(self, key: str) -> Record | None:
        """The tensors of one record, mapped, not copied; nobody may write into them.

        Returns:
            None where there is no such record, and where it is damaged: its shard is named in one line and removed from
            the disk, so that the next start makes its content again; other records of it are used as long as they are
            intact.
        """
        shard, row = self._places.get(key, (None, 0))
        if shard is None:
            return None
        problem = shard.problem(row)
        if not problem:
            return shard.record(row)
        del self._places[key]
        index = shard.path.with_suffix(".json")
        self._opened.discard(index.name)
        if index.is_file():
            _remove(index, problem)
        return None

    def writer(self, budget_bytes: int | None = None) -> Writer:
        """Something that adds records; close it at the end.

        Args:
            budget_bytes: stop with CacheFullError beyond it; None for what the disk has.
        """
        return Writer(self, budget_bytes)

    def publish(self, records: dict[str, Record]) -> None:
        """Write records as one shard and map it.

        Raises:
            CacheFullError: the disk has no room.
            OSError: the folder cannot be written.
        """
        data = save(
            {
                f"{row}.{field}": tensor.contiguous()
                for row, record in enumerate(records.values())
                for field, tensor in record.items()
            }
        )
        if shutil.disk_usage(self.folder).free < len(data) + SPARE_BYTES:
            raise CacheFullError(f"less than {size(SPARE_BYTES)} would be left free on the disk")
        rows = {key: row for row, key in enumerate(records)}
        checks = list(map(_record_check, records.values()))
        value: dict[str, Any] = {"format": FORMAT, "bytes": len(data), "records": rows, "checks": checks}
        value["check"] = _check(value)
        path = self.folder / f"{value['check'][:32]}.safetensors"
        write_bytes_atomic(path, data)
        try:
            index = write_json(path.with_suffix(".json"), value)
        except RunError as error:
            raise OSError(error.what) from error
        self._opened.add(index.name)
        shard = _Shard(path, checks)
        self._places.update((key, (shard, row)) for key, row in rows.items())


class Writer:
    """Collects records and writes a shard whenever one is full. An error ends it; what was written stays.

    Args:
        store: where they go.
        budget_bytes: of all records together; None for no limit.

    Attributes:
        usable: False after an error.
        written_bytes: of all records that were added.
    """

    def __init__(self, store: Store, budget_bytes: int | None) -> None:
        self._store = store
        self._budget = budget_bytes
        self._records: dict[str, Record] = {}
        self._bytes = 0
        self.written_bytes = 0
        self.usable = True

    def add(self, key: str, record: Record) -> None:
        """Add one record; it can be read from the store once its shard is full or the writer is closed.

        Raises:
            CacheFullError: budget or disk have no room.
            OSError: the folder cannot be written.
        """
        added = record_bytes(record)
        if self._budget is not None and self.written_bytes + added > self._budget:
            self.usable = False
            raise CacheFullError(f"the budget of {size(self._budget)} is used up")
        self._records[key] = record
        self._bytes += added
        self.written_bytes += added
        if self._bytes >= SHARD_BYTES or len(self._records) >= SHARD_RECORDS:
            self.close()

    def close(self) -> None:
        """Write what is left; raises as `add` does."""
        records, self._records, self._bytes = self._records, {}, 0
        if not records:
            return
        try:
            self._store.publish(records)
        except OSError:
            self.usable = False
            raise


def _remove(index: Path, reason: str) -> None:
    """Take a damaged shard away and say so; several ranks may find it at the same time."""
    warn(f"cache: {index.with_suffix('.safetensors')} is damaged ({reason}); it is rebuilt", any_rank=True)
    for path in (index, index.with_suffix(".safetensors")):
        with suppress(OSError):  # a disk that cannot be read may not be writable either
            path.unlink(missing_ok=True)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """What names are sorted by where the numbers in them count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _record_check(record: Record) -> str:
    """SHA-256 of a record: names, types, shapes and values of its tensors; 32 hex digits."""
    digest = hashlib.sha256()
    for field in sorted(record):
        tensor = record[field].contiguous()
        digest.update(f"{field} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        values = tensor.as_strided((tensor.numel(),), (1,))  # of a single number the stride may be any
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _check(value: dict[str, Any]) -> str:
    """Checksum of what an index says: a changed row or key would give the tensors of another record."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
