"""What the columns and keys of a user's data are called: `--columns`, and what to write where one is missing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vlm_sft.common.errors import QUOTED_CHARACTERS, DataError, nearest, quoted

NAMES = tuple(
    "image images question answer answers history system messages conversations prompt completion id split".split()
)
IMAGE_NAMES = ("image", "image_path", "image_file", "file_name", "filename", "file", "path", "picture", "img")
SYNONYMS: Mapping[str, Sequence[str]] = {
    "image": IMAGE_NAMES,
    "question": ("question", "query", "prompt", "text", "instruction"),
    "answer": ("answer", "label", "response", "target", "output", "completion"),
    "split": ("split", "subset"),
    "id": ("id", "question_id"),
}
TALKS = ("messages", "conversations", "prompt", "completion")
KEYS_TOLD = 30  # of records that lack a key
# What a column that the user named stands in for: keys that would be read instead of it, or beside it.
_GIVES_WAY = {"image": ("images",), "images": ("image",), "answer": ("answers",), "question": TALKS}


def parse_columns(text: str | None, known: Sequence[str] = NAMES) -> dict[str, str]:
    """Read `--columns image=picture,question=frage`.

    Args:
        text: the flag; None names nothing.
        known: what can be named.

    Returns:
        Our name of a column to the data's.

    Raises:
        DataError: an entry is not NAME=COLUMN, or nothing is called NAME.
    """
    pairs = [[part.strip() for part in entry.split("=", 1)] for entry in text.split(",")] if text is not None else []
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise DataError(
            f"--columns {quoted(text)}: not NAME=COLUMN, comma separated", "e.g. image=picture,question=frage"
        )
    names = [name for name, _ in pairs]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise DataError(
                f"--columns {quoted(text)}: nothing is called {quoted(name)}{near}", f"names are {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise DataError(f"--columns {quoted(text)}: {name} is named twice", "name it once")
    return {name: column for name, column in pairs}


def renamed(record: Any, columns: Mapping[str, str]) -> Any:
    """A record under our names; keys that a column of the user's stands in for are taken out."""
    if not columns or not isinstance(record, dict):
        return record
    found = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    aside = {name for ours in found for name in _GIVES_WAY.get(ours, ())} - found.keys()
    return {key: value for key, value in record.items() if key not in aside} | found


def flag_for(missing: Iterable[str], there: Collection[Any], likely: Mapping[str, str] | None = None) -> str:
    """The flag that names missing columns, with the column that is probably meant in each place.

    Args:
        missing: our names.
        there: the columns or keys of the data.
        likely: what is known to be meant.
    """
    taken: dict[str, str] = {}
    rest = [str(name)[:QUOTED_CHARACTERS] for name in there]
    for ours in missing:
        guess = (likely or {}).get(ours) or _meant(ours, rest)
        rest = [name for name in rest if name != guess]
        taken[ours] = guess or "COLUMN"
    return f"--columns {','.join(f'{ours}={theirs}' for ours, theirs in taken.items())}"


def _meant(ours: str, there: Sequence[str]) -> str:
    """The column that is probably meant by one of our names; "" where none looks like it."""
    lower = {name.lower(): name for name in there}
    usual = SYNONYMS.get(ours, (ours,))
    known = next((lower[name] for name in usual if name in lower), "")
    longer = next((lower[name] for name in lower if any(word in name for word in usual if len(word) > 3)), "")
    return known or longer or "".join(difflib.get_close_matches(ours, there, n=1, cutoff=0.8))


def has_of(names: Iterable[Any]) -> str:
    """The columns or keys that data has, for messages."""
    return ", ".join(str(name)[:QUOTED_CHARACTERS] for name in names) or "nothing"


def require_columns(
    place: str,
    there: Sequence[str],
    columns: Mapping[str, str],
    alone: bool,
    pictures: Sequence[str] = (),
    talks: Sequence[str] = (),
) -> None:
    """Refuse a table whose columns are no records of ours under the given names.

    Args:
        place: the table, for messages.
        there: its columns.
        columns: as of `parse_columns`.
        alone: `columns` is about this data alone, so that each of them has to be there.
        pictures, talks: those of its columns that hold images, and conversations.

    Raises:
        DataError: with the columns that are there and the flag to write.
    """
    gone = {ours: theirs for ours, theirs in columns.items() if theirs not in there}
    names = set(renamed(dict.fromkeys(there), columns))
    missing = _missing(names)
    if gone and (alone or missing):
        ours, theirs = next(iter(gone.items()))
        guess = nearest(theirs, there)
        fix = f"name columns that are there: {flag_for(columns, there, _kept(columns, gone))}"
        raise DataError(f"{place} has no column {quoted(theirs)}{guess} (it has: {has_of(there)})", fix)
    if missing:
        likely = {"image": pictures[0]} if pictures and not {"image", "images"} & names else {}
        wanted = [*likely, *(["messages"] if talks else missing)]
        likely |= {"messages": talks[0]} if talks else {}
        what = f"{place} has {no_column_for(missing)} (it has: {has_of(there)})"
        raise DataError(what, f"say which they are: {flag_for(wanted, there, likely)}")


def no_column_for(missing: Sequence[str]) -> str:
    """What a table lacks, in words: "no columns for image, question and answer"."""
    *first, last = missing
    return f"no columns for {', '.join(first)} and {last}" if first else f"no column for {last}"


def _kept(columns: Mapping[str, str], gone: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours not in gone}


def _missing(names: Collection[str]) -> list[str]:
    """What a record needs and does not find under these names."""
    if {"messages", "conversations"} & set(names) or {"prompt", "completion"} <= set(names):
        return []
    missing = [] if "question" in names else ["question"]
    return missing if {"answer", "answers"} & set(names) else [*missing, "answer"]
