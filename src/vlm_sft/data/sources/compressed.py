"""Text files, compressed or not, read as a stream; one that grows without end is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from vlm_sft.common.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NOT_READ = {".zip": "unzip -p {} > {}", ".7z": "7z x -so {} > {}", ".rar": "unrar p -inul {} > {}"}
MAX_RATIO, FREE_BYTES = 200, 256 * 1024**2  # text shrinks to a tenth or so; a bomb to a thousandth and less
_BEGINNINGS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf": ".7z",
    b"Rar!": ".rar",
}


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text; gzip, bzip2, xz and zstd are unpacked as it is read, told by the first bytes.

    Raises:
        DataError: it cannot be read, is damaged or cut off, is an archive of another kind, or unpacks to more than
            `MAX_RATIO` times its size.
    """
    kind = ""
    try:
        with path.open("rb") as plain:
            head = plain.read(8)
            kind = next((kind for beginning, kind in _BEGINNINGS.items() if head.startswith(beginning)), "")
            refuse_packed(path, kind)
            plain.seek(0)
            if not kind:
                yield plain
                return
            with io.BufferedReader(_Unpacked(path, plain, kind)) as stream:
                yield cast(BinaryIO, stream)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if not kind:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {path}: {reason}", "check the path and its permissions") from error
        what = f"{path} is damaged or cut off ({kind[1:]}): {error or type(error).__name__}"
        raise DataError(what, "copy or write the file again") from error


def refuse_packed(path: Path, kind: str = "") -> None:
    """Refuse an archive that is not read, with the line that unpacks it.

    Args:
        path: the file.
        kind: its kind as an ending, where the first bytes told it.

    Raises:
        DataError: it is such an archive, or a compressed one whose images cannot be reached one by one.
    """
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    kind = kind or (endings[-1] if endings else "")
    if kind in NOT_READ:
        unpacked = path.with_suffix("") if path.suffix.lower() == kind else path.with_stem(f"{path.stem}_unpacked")
        command = NOT_READ[kind].format(*(shlex.quote(str(place)) for place in (path, unpacked)))
        raise DataError(f"{path} is an archive ({kind[1:]}) that is not read", f"unpack it: {command}")
    inside = (
        endings[0] if len(endings) == 2 and endings[1] in COMPRESSED else ".tar" if kind in (".tgz", ".tbz2") else ""
    )
    if inside in (".tar", ".parquet", ".arrow"):
        unpacked = path.with_suffix("" if inside == endings[0] else ".tar")
        tool = {".bz2": "bunzip2", ".tbz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}.get(kind, "gunzip")
        command = f"{tool} -c {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}"
        what = f"{path}: images of a compressed {inside[1:]} cannot be reached one by one"
        raise DataError(what, f"unpack it: {command}")


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file; counts what comes out."""

    def __init__(self, path: Path, plain: BinaryIO, kind: str) -> None:
        self._path, self._inner = path, _opened(plain, kind)
        self._limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        self._count += len(data)
        if self._count > self._limit:
            raise DataError(
                f"{self._path} unpacks to more than {self._limit:,} bytes, over {MAX_RATIO} times its size: a "
                "decompression bomb?",
                "if it is not, unpack it yourself and pass the file",
            )
        buffer[: len(data)] = data
        return len(data)


def _opened(plain: BinaryIO, kind: str) -> Any:
    if kind == ".gz":
        return gzip.GzipFile(fileobj=plain)
    if kind == ".bz2":
        return bz2.BZ2File(plain)
    if kind == ".xz":
        return lzma.LZMAFile(plain)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(plain, mode="r"), "zstd")
