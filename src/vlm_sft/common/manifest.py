"""Checksums of a folder: what belongs to it, and whether it is still what was written.

`manifest.json` lists every file with its size and SHA-256, `manifest.sha256` holds the checksum of `manifest.json`, so
a changed byte anywhere is seen. A manifest tells damage; it is no signature: whoever can write the folder can write its
manifest too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import FILE_MODE, MANIFEST, MANIFEST_CHECKSUM, UNENCODABLE, json_text, parse_json
from vlm_sft.common.errors import RunError

_READ_BYTES = 8 * 1024**2
# What a library might unpickle when it finds it: such a file is a stranger in a folder that does not list it.
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content as hexadecimal digits; about 1 s a GB.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Raises:
        OSError: the disk could not take them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block say which file it is about: reads, writes and flushes leave that out.

    Args:
        path: the file that the block works on.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_manifest(folder: Path, names: Iterable[str] | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Flush files to the disk, and write down what they are; the manifest itself is on the disk when this returns.

    Args:
        folder: the folder.
        names: files that belong to it, relative to it; None for all that it holds.
        facts: what else the manifest says; JSON values.

    Returns:
        The manifest.

    Raises:
        OSError: a file cannot be read or written.
    """
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {}
    for name in sorted(set(names) - {MANIFEST, MANIFEST_CHECKSUM}):
        path = folder / name
        with suppress(OSError):  # a file system without modes, or another's file
            path.chmod(FILE_MODE)
        flush(path)
        with naming(path):
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"schema": 1, **facts, "files": files}
    data = json_text(manifest).encode("utf-8", UNENCODABLE)
    for name, content in ((MANIFEST, data), (MANIFEST_CHECKSUM, _checksum_line(data).encode())):
        path = folder / name
        with naming(path):
            path.write_bytes(content)
        flush(path)
    for place in {(folder / name).parent for name in files} | {folder}:
        flush(place)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        RunError: there is none, or it is damaged; the message names the folder and the reason.
    """
    again = "use another folder"
    try:
        data = (folder / MANIFEST).read_bytes()
        line = (folder / MANIFEST_CHECKSUM).read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {Path(str(error.filename)).name} is missing", again) from error
    except OSError as error:
        raise RunError(f"{folder}: its manifest cannot be read: {error.strerror}", again) from error
    if line != _checksum_line(data).encode():
        raise RunError(f"{folder}: the checksum of {MANIFEST} does not match", again)
    return _checked(folder, data)


def _checked(folder: Path, data: bytes) -> dict[str, Any]:
    """The manifest that some bytes are; its checksum says nothing about who wrote it."""
    try:
        manifest = parse_json(data.decode("utf-8"))
        for name, entry in manifest["files"].items():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise ValueError(f"what it says about {name!r} is not a size and checksum")
        if not isinstance(manifest.get("identity", {}), dict):
            raise ValueError("its identity is not an object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: {MANIFEST} is not one of this program: {error}", "use another folder") from error
    return dict(manifest)


def folder_problems(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Compare a folder with its manifest.

    Args:
        folder: the folder.
        names: files to look at; None for all, and then files that a library would unpickle must be listed too.

    Returns:
        What is wrong, one sentence a file; empty when all is as it was written.
    """
    try:
        files = read_manifest(folder)["files"]
    except RunError as error:
        return [error.what.removeprefix(f"{folder}: ")]
    found = []
    for name in files if names is None else names:
        problem = _file_problem(folder / name, files.get(name))
        if problem:
            found.append(f"{name} {problem}")
    if names is None:
        strangers = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _PICKLES}
        found += [f"{name} is not in its manifest" for name in sorted(strangers - files.keys())]
    return found


def _file_problem(path: Path, expected: dict[str, Any] | None) -> str:
    """What is wrong with one file, or ""."""
    if expected is None:
        return "is not in its manifest"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size:,} bytes instead of {expected['bytes']:,}"
        return "" if file_sha256(path) == expected["sha256"] else "is damaged: its checksum does not match"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _checksum_line(data: bytes) -> str:
    """The content of manifest.sha256, as sha256sum writes it."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n"
