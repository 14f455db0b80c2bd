"""Files that look like data and are not read: each is named with the way to one that is."""

from __future__ import annotations

import shlex
from pathlib import Path

from vlm_sft.common.errors import DataError

COMPRESSED = {".gz": "gunzip -c", ".bz2": "bunzip2 -c", ".xz": "unxz -c", ".zst": "unzstd -c", ".zip": "unzip -p"}
_BEGINNINGS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
TABLES = (".csv", ".tsv")


def refuse_foreign(path: Path) -> None:
    """Refuse a file or folder that was named as data and is of a kind that is not read.

    Raises:
        DataError: it is a folder of `save_to_disk`, a file of one, or compressed.
    """
    saved = _saved_to_disk(path)
    if saved is not None:
        place = str(saved)
        if (saved / "dataset_dict.json").is_file():
            code = f"[part.to_parquet(f'FOLDER/{{name}}.parquet') for name, part in load_from_disk({place!r}).items()]"
        else:
            code = f"load_from_disk({place!r}).to_parquet('FOLDER/train.parquet')"
        raise DataError(
            f"{saved} is a folder that datasets' save_to_disk wrote; its .arrow files are not read here",
            f'write it as parquet and pass FOLDER: python -c "from datasets import load_from_disk; {code}"',
        )
    if path.is_file():
        refuse_compressed(path)


def refuse_compressed(path: Path, beginning: bytes = b"") -> None:
    """Refuse a compressed file, told by its name or by its first bytes.

    Raises:
        DataError: it is compressed.
    """
    ending = next((kind for magic, kind in _BEGINNINGS.items() if beginning.startswith(magic)), path.suffix.lower())
    if ending in COMPRESSED:
        unpacked = path.with_suffix("") if path.suffix.lower() == ending else path.with_stem(f"{path.stem}_unpacked")
        command = f"{COMPRESSED[ending]} {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}"
        raise DataError(f"{path} is compressed ({ending[1:]}) and is not read", f"unpack it: {command}")


def _saved_to_disk(path: Path) -> Path | None:
    """The folder that `save_to_disk` wrote, where `path` is one, lies in one, or holds one directly."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".arrow" and path.name not in ("state.json", "dataset_info.json"):
        return None
    if (folder / "dataset_dict.json").is_file() or _one_split(folder):
        return folder
    return next((inner for inner in sorted(folder.iterdir()) if _one_split(inner)), None) if path.is_dir() else None


def _one_split(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
