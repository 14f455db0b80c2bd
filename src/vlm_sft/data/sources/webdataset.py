"""WebDataset tar shards: members of one key are one sample. Nothing is ever unpacked to the disk.

The layout is that of https://github.com/webdataset/webdataset: `KEY.EXTENSION`, where the key ends at the first dot
behind the last slash. A picture is read from its place in the archive when it is needed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_sft.common.artifacts import parse_json
from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sample import MAX_FILE_BYTES
from vlm_sft.data.sources.locate import PICTURE_ENDINGS, StoredImage, video_problem
from vlm_sft.data.sources.rows import RowProblem
from vlm_sft.data.video import is_video_name

MAX_TEXT_BYTES = 64 * 1024**2  # of one .json or .txt member
BLOCK = 512


@dataclass(frozen=True, slots=True)
class MemberBytes:
    """Reads one member of a tar file when called; small, so that data loader workers can receive it."""

    file: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        """Return its bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.file} ends within the member")
        return data


def tar_records(path: Path) -> Iterator[dict[str, Any] | RowProblem]:
    """Yield the samples of a shard as records, in the order of their first members.

    The keys of a `.json` member are those of the record; its pictures are `images`, in the order of their names; a
    `.txt` member is the key `txt`, and `NAME.txt` the key `NAME` (`0001.question.txt`). The key of the members is the
    `id`.

    Args:
        path: the shard; it is not compressed.

    Raises:
        DataError: it is no tar file, is damaged or cut off, or has a member that is no file within it.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    doubles: set[str] = set()
    for member in _members(path):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:  # hidden files, and names without an ending
            continue
        parts = samples.setdefault(folder + slash + stem, {})
        if extension.lower() in parts:
            doubles.add(folder + slash + stem)
        parts[extension.lower()] = member
    for key, parts in samples.items():
        if key in doubles:
            yield RowProblem("repeated member", f"{quoted(key)} has two members of one name")
            continue
        try:
            yield _record(path, key, parts)
        except RowProblem as problem:
            yield problem


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of an archive.

    Raises:
        DataError: as of `tar_records`.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                _refuse_member(path, member)
                if member.isfile():
                    yield member
            end = archive.offset
        _require_end(path, end)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        what = f"{path} is no tar file, or is damaged or cut off: {error}"
        raise DataError(what, "copy or write the file again") from error


def _refuse_member(path: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: the member {quoted(member.name)} leads out of the archive", "write the archive again")
    if not (member.isfile() or member.isdir()) or member.issparse():
        what = f"{path}: the member {quoted(member.name)} is a link, a device or has holes, and no plain file"
        raise DataError(what, "write the archive of files again")


def _require_end(path: Path, offset: int) -> None:
    """Make sure that reading ended at the end of the archive, and not at a header that is damaged.

    Raises:
        DataError: something else stands there, or nothing.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        block = stream.read(BLOCK)
    if any(block) or not block:
        what = f"{path} is damaged or cut off: no header of a member and no end of the archive at byte {offset:,}"
        raise DataError(what, "copy or write the file again")


def _record(path: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    pictures = []
    for extension, member in sorted(parts.items()):
        if is_video_name(member.name):
            raise video_problem(f"the member {quoted(member.name)}")
        if f".{extension}".endswith(PICTURE_ENDINGS):
            if member.size > MAX_FILE_BYTES:
                raise RowProblem("image cannot be read", f"{quoted(member.name)} has {member.size:,} bytes")
            where = f"{path} member {member.name}"
            pictures.append(StoredImage(where, MemberBytes(path, member.offset_data, member.size)))
        elif extension.endswith("json"):
            record |= _json(path, member)
        elif extension.endswith("txt"):
            record[extension.removesuffix(".txt")] = _text(path, member).strip()
    if pictures:
        record.pop("image", None)
        record["images"] = pictures
    return {"id": key} | record


def _text(path: Path, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise RowProblem("text too long", f"{quoted(member.name)} has {member.size:,} bytes")
    try:
        return MemberBytes(path, member.offset_data, member.size)().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowProblem("text is not UTF-8", f"{quoted(member.name)}: {error}") from error


def _json(path: Path, member: tarfile.TarInfo) -> dict[str, Any]:
    try:
        found = parse_json(_text(path, member), strict=False, unique=True)
    except ValueError as error:
        raise RowProblem("broken JSON", f"{quoted(member.name)}: {error}") from error
    if isinstance(found, list):  # a conversation alone
        return {"messages": found}
    if not isinstance(found, dict):
        raise RowProblem("not a record", f"{quoted(member.name)}: a JSON object is needed")
    return found
