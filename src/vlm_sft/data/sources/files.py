"""Which files hold a data set: one file, a folder, a pattern of names, a folder of `save_to_disk`; sorted by split."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from vlm_sft.common.artifacts import RUN, read_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import DataError, RunError, quoted
from vlm_sft.data.sources.compressed import COMPRESSED, NOT_READ, refuse_packed
from vlm_sft.data.sources.splits import NO_DATA, SPLIT_WORDS, split_of_name

TABLES = (".csv", ".tsv")
ARROW = ".arrow"
KINDS = (".jsonl", ".parquet", ".tar", ".json", *TABLES)  # of a folder's files, the first that is there is its data
MANY = 100_000  # names that a pattern may stand for
Item = TypeVar("Item")
IMAGE_FOLDER = "add metadata.csv with the columns file_name, question and answer beside the pictures"


def kind_of(path: Path) -> str:
    """The kind of a file, one of `KINDS` or ".arrow", by its name without the ending of a compression; else ""."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in (*KINDS, ARROW) else ""


def stem_of(path: Path) -> str:
    """The name of a file without the endings of its kind and compression."""
    stem = path.stem if path.suffix.lower() in COMPRESSED else path.name
    return Path(stem).stem if kind_of(path) else stem


def is_pattern(place: str) -> bool:
    """Whether a text stands for several files: `shards/{000..031}.tar`, `data/*.jsonl.gz`."""
    return any(mark in place for mark in "*?[{") and not Path(place).expanduser().exists()


def root_of(path: Path) -> Path:
    """The folder that names of a data set's files are relative to: the part of a pattern that is plain."""
    if path.is_dir():
        return path
    plain = [part for part in path.parts[: len(path.parts) - 1]]
    stop = next((place for place, part in enumerate(plain) if any(mark in part for mark in "*?[{")), len(plain))
    return Path(*plain[:stop]) if is_pattern(str(path)) else path.parent


def expand(pattern: str) -> list[Path]:
    """The files that a pattern stands for: braces as in a shell, and `*`, `?`, `[…]`.

    Raises:
        DataError: a file of the braces is missing, or nothing is found.
    """
    files: list[Path] = []
    missing = []
    for name in _unbraced(str(Path(pattern).expanduser())):
        found = sorted(map(Path, glob.glob(name, recursive=True)))
        files += [path for path in found if path.is_file()]
        missing += [] if found else [name]
    if missing:
        what = f"{pattern}: there is no {quoted(missing[0])}"
        more = f", nor {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise DataError(what + more, "correct the pattern, or fetch the files that are missing")
    return list(dict.fromkeys(files))


def _unbraced(pattern: str) -> list[str]:
    waiting, done = [pattern], []
    while waiting:
        text = waiting.pop(0)
        found = re.search(r"\{([^{}]*)\}", text)
        if found is None:
            done.append(text)
            continue
        span = re.fullmatch(r"(\d+)\.\.(\d+)", found.group(1))
        if span:
            low, high = map(int, span.groups())
            width = len(span.group(1)) if span.group(1).startswith("0") else 0
            words = [f"{number:0{width}}" for number in range(low, min(high, low + MANY) + 1)]
        else:
            words = found.group(1).split(",")
        waiting = [text[: found.start()] + word + text[found.end() :] for word in words] + waiting
        if len(waiting) + len(done) > MANY:
            raise DataError(f"{pattern}: more than {MANY:,} names", "write a narrower pattern")
    return done


def data_files(path: Path, kinds: Sequence[str] = KINDS) -> dict[str, list[Path]]:
    """The files of a data set by split, in a fixed order; beside a single train file its siblings count.

    Args:
        path: a file, a folder, a pattern, or a folder that `save_to_disk` of `datasets` wrote.
        kinds: of the files in a folder, the first kind of these that is there is read; CSV and TSV together.

    Raises:
        DataError: there is none, or some cannot be read one by one.
    """
    if is_pattern(str(path)):
        return _sorted_by_split(expand(str(path)), root_of(path))
    saved = saved_folder(path)
    if saved is not None:
        return _saved_files(saved)
    if not path.is_dir():
        refuse_packed(path)
        return _with_siblings(path)
    files = folder_files(path)
    there = {kind_of(file) for file in files}
    first = next((kind for kind in kinds if kind in there), "")
    if first == ".json" and any(stem_of(file) == "metadata" and kind_of(file) in TABLES for file in files):
        first = ".csv"
    taken = tuple(kinds) if not first else TABLES if first in TABLES else (first,)
    others = sorted(there - {"", ".json", *taken})  # JSON beside others is mostly settings
    if first and others:
        _warn_once(path.resolve(), f"{path}: its {first} files are read, those of {', '.join(others)} are not")
    return files_by_split(path, taken)


def _with_siblings(path: Path) -> dict[str, list[Path]]:
    """A file by its split; beside a train file those of the same name for the other splits ("x_train" -> "x_val")."""
    files = {split_of_name(path.name) or "train": [path]}
    if split_of_name(path.name) == "train":
        for word, split in SPLIT_WORDS.items():
            sibling = path.with_name(re.sub("train(ing)?", word, path.name, count=1, flags=re.IGNORECASE))
            if split != "train" and split not in files and sibling.is_file():
                files[split] = [sibling]
    return files


@cache
def _warn_once(place: Path, line: str) -> None:
    warn(line)


def folder_files(path: Path) -> list[Path]:
    """The files of a data set's folder and its subfolders, sorted: none that is hidden or was written by our commands.

    A run may have its output folder in the folder of its data.
    """
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    ours = {file.parent for file in files if file.name == RUN and file.parent != path and _is_record(file)}
    return [
        file
        for file in files
        if file.name not in NO_DATA
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and ours.isdisjoint(file.parents)
    ]


def _is_record(file: Path) -> bool:
    """Whether a file is a run.json of ours, and not data of that name."""
    try:
        return {"schema", "command", "status"} <= read_json(file).keys()
    except RunError:
        return False


def files_by_split(path: Path, kinds: Sequence[str]) -> dict[str, list[Path]]:
    """Sort the data files under `path` by the split that their names (or their folders' names) speak of.

    Args:
        path: one file, or a folder that is searched with its subfolders.
        kinds: of the files to take, e.g. (".parquet",).

    Returns:
        Files in sorted order by split; files that name no split count as train.

    Raises:
        DataError: there is no such file, or one stands there twice: packed and unpacked.
    """
    if path.is_file():
        refuse_packed(path)
        return {split_of_name(path.name) or "train": [path]}
    taken: list[Path] = []
    for file in folder_files(path):
        if file.suffix.lower() in NOT_READ and kind_of(file.with_suffix("")) in kinds:
            refuse_packed(file)  # train.jsonl.zip beside the others would be passed over
        if kind_of(file) not in kinds:
            continue
        taken.append(file)
    if not taken:
        fix = f"pass the file, or the folder that holds it; of pictures alone: {IMAGE_FOLDER}"
        raise DataError(f"{path} holds no {' or '.join(kinds)} file", fix)
    return _sorted_by_split(taken, path)


def _sorted_by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their names, or those of their folders below `root`, speak of; else train.

    Raises:
        DataError: one stands there twice, packed and unpacked, or cannot be read as it is.
    """
    found: dict[str, list[Path]] = {}
    plain: set[Path] = set()
    for file in files:
        refuse_packed(file)
        unpacked = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
        if unpacked in plain:
            raise DataError(f"{unpacked} and {file} are one file twice", "take one of them out")
        plain.add(unpacked)
        inside = file.relative_to(root.expanduser()).parts
        split = next((found_split for part in reversed(inside) if (found_split := split_of_name(part))), "train")
        found.setdefault(split, []).append(file)
    return found


def saved_folder(path: Path) -> Path | None:
    """The folder that `save_to_disk` wrote, where `path` is one, is its state.json, or holds some directly."""
    if path.is_file():
        return path.parent if path.name in ("state.json", "dataset_info.json") and _is_saved(path.parent) else None
    if not path.is_dir():
        return None
    if (path / "dataset_dict.json").is_file() or _is_saved(path):
        return path
    return path if any(_is_saved(inner) for inner in path.iterdir() if inner.is_dir()) else None


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_files(folder: Path) -> dict[str, list[Path]]:
    """The Arrow files of a folder of `save_to_disk`, by split."""
    if _is_saved(folder):
        return {split_of_name(folder.name) or "train": _arrow_files(folder)}
    inner = [place for place in sorted(folder.iterdir()) if place.is_dir() and _is_saved(place)]
    if (folder / "dataset_dict.json").is_file():
        listed = _json_of(folder / "dataset_dict.json").get("splits")
        names = listed if isinstance(listed, list) else []
        gone = [str(name) for name in names if str(name) not in {place.name for place in inner}]
        if gone or not names:
            raise DataError(f"{folder} has no split {', '.join(gone) or 'at all'}", "save the data set again")
        inner = [folder / str(name) for name in names]
    chosen = by_split({place.name: [place] for place in inner}, str(folder))
    return {split: [file for place in places for file in _arrow_files(place)] for split, places in chosen.items()}


def _json_of(file: Path) -> Mapping[str, object]:
    try:
        return dict(read_json(file))
    except (RunError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}", "save the data set again") from error


def _arrow_files(folder: Path) -> list[Path]:
    """The files of one data set of `save_to_disk`, as its state.json lists them.

    Raises:
        DataError: one is missing or lies elsewhere, or the rows are a selection of another table's.
    """
    state = _json_of(folder / "state.json")
    if any(state.get(key) for key in ("_indices_data_files", "_indices_files")):
        raise DataError(f"{folder} is a selection of rows as old versions of datasets wrote it", "save it again")
    listed = state.get("_data_files")
    names = [str(item.get("filename")) for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{folder} has no file {quoted(name)}, which its state.json names", "save it again")
    if not names:
        raise DataError(f"{folder}: its state.json names no file", "save it again")
    return [folder / name for name in names]


def by_split(named: Mapping[str, list[Item]], place: str) -> dict[str, list[Item]]:
    """Files (or names) under another program's splits, sorted by ours; splits that are not used are named once.

    Args:
        named: files by split.
        place: where they are, for messages.

    Raises:
        DataError: none of several splits is one of ours.
    """
    chosen: dict[str, list[Item]] = {}
    unused = []
    for name, files in named.items():
        split = split_of_name(name) or ("train" if len(named) == 1 else None)
        if split is None:
            unused.append(name)
        else:
            chosen.setdefault(split, []).extend(files)
    if not chosen:
        has = ", ".join(named) or "none"
        raise DataError(f"{place} has no split train, validation or test (it has: {has})", "rename one of them")
    if unused:
        _warn_once(Path(place), f"{place}: splits that are not used: {', '.join(unused)}")
    return chosen
