"""The dataset argument: `NAME[@PATH][:WEIGHT]`, comma separated.

A NAME is one of `KNOWN` (or its Hub id); an entry that is a path, or `OWN_NAME@FILE.jsonl`, is the user's own data.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sft.common.artifacts import LEFT_OUT
from vlm_sft.common.errors import DataError, nearest, quoted
from vlm_sft.data.sources.foreign import TABLES, refuse_foreign
from vlm_sft.data.sources.splits import folder_files

PUBLISHED = ("docvqa", "infographicvqa", "chartqapro", "ai2d", "realworldqa", "ocrbench")
KNOWN = ("chartqa", "textvqa", *PUBLISHED, "easy_vqa", "demo_charts", "demo_text", "demo")
TABLE_SETS = ("chartqa", "textvqa", *PUBLISHED)  # those that also read parquet files given as NAME@PATH
HUB_NAMES = {
    "huggingfacem4/chartqa": "chartqa",
    "lmms-lab/textvqa": "textvqa",
    "facebook/textvqa": "textvqa",
    "ahmed-masry/chartqapro": "chartqapro",
    "lmms-lab/ai2d": "ai2d",
    "lmms-lab/realworldqa": "realworldqa",
    "echo840/ocrbench": "ocrbench",
    "easy-vqa": "easy_vqa",
    "demo-charts": "demo_charts",
    "demo-text": "demo_text",
}
JSON_SUFFIXES = (".jsonl", ".json")
STREAM = "stream"  # NAME@stream: fetch as many rows from the Hub as are needed, not the whole set
GRAMMAR = "write NAME[@PATH][:WEIGHT], comma separated, e.g. chartqa:2,textvqa or my_data/train.jsonl"


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One entry of the dataset argument.

    Attributes:
        name: a known data set, or the label of the user's own data; sample ids start with it.
        path: parquet files of a known set, or the user's file or folder; None for the published data.
        weight: how often its questions are drawn relative to other sets; None when none was given.
        stream: None reads the whole set; else only its first rows are fetched, at most so many (0: not yet known).
    """

    name: str
    path: Path | None = None
    weight: float | None = None
    stream: int | None = None

    @property
    def own(self) -> bool:
        """True for the user's own JSON data."""
        return is_own(self.name)


def is_own(name: str) -> bool:
    """Whether a data set of this name is the user's own, or a free question: no published or generated set."""
    return name not in KNOWN


def parse_datasets(text: str) -> list[DatasetSpec]:
    """Parse the dataset argument, e.g. `chartqa:2,textvqa:1` or `chartqa@/data/chartqa,my_data.jsonl`.

    Args:
        text: comma-separated entries `NAME[@PATH][:WEIGHT]`; a path of own data may stand in place of NAME.

    Returns:
        One spec an entry, in order. Own data is named after its file or folder.

    Raises:
        DataError: every mistake of the argument together; unknown names come with the nearest known one.
    """
    specs: list[DatasetSpec] = []
    mistakes: list[str] = []
    fixes: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        try:
            specs.append(_parse_entry(entry))
        except DataError as error:
            fixes.append(error.fix)
            mistakes.append(f"{error.what} ({error.fix})" if error.fix else error.what)
    doubles = [name for name, count in Counter(s.name for s in specs if not s.own).items() if count > 1]
    for name in doubles:
        mistakes.append(f"{name} is named twice (name it once and give it a weight, e.g. {name}:2)")
    if "demo" in {s.name for s in specs} and {"demo_charts", "demo_text"} & {s.name for s in specs}:
        mistakes.append("demo already holds demo_charts and demo_text (name either demo or its parts)")
    if len(mistakes) == 1 and any(fixes):
        raise DataError(f"dataset argument {quoted(text)}: {mistakes[0].removesuffix(f' ({fixes[0]})')}", fixes[0])
    if mistakes:
        lines = mistakes[0] if len(mistakes) == 1 else "".join(f"\n  - {mistake}" for mistake in mistakes)
        raise DataError(f"dataset argument {quoted(text)}: {lines}", GRAMMAR)
    return _unique_names(specs)


def parse_loss_weights(text: str | None, specs: list[DatasetSpec]) -> dict[str, float]:
    """Read `--loss_weights`, e.g. `chartqa=0.5,chat=2`.

    Args:
        text: NAME=WEIGHT, comma separated; None for none.
        specs: the data sets that may be named.

    Returns:
        Weights by the name of the data set.

    Raises:
        DataError: a set is not among them, is named twice, or a weight is not a positive number.
    """
    known = [spec.name for spec in specs]
    weights: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, number = (part.strip() for part in entry.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"--loss_weights {quoted(entry)} is not NAME=WEIGHT with a positive number", "e.g. chat=0.5"
            )
        if name not in known or name in weights:
            what = "is named twice" if name in weights else "is not a data set of --dataset"
            raise DataError(
                f"--loss_weights: {quoted(name)} {what}", f"name each of these at most once: {', '.join(known)}"
            )
        weights[name] = weight
    return weights


def refuse_weights(specs: list[DatasetSpec], why: str) -> None:
    """Refuse weights where nothing is drawn by them.

    Raises:
        DataError: a data set has one.
    """
    for spec in specs:
        if spec.weight is not None:
            raise DataError(f"the weight {spec.weight:g} of {spec.name} has no effect here: {why}", "leave it out")


def _parse_entry(entry: str) -> DatasetSpec:
    if not entry:
        raise DataError("an entry is empty")
    if re.match(r"\w+://", entry):
        raise DataError(f"{quoted(entry, 200)} is an address; data sets are not fetched", "download it, pass its path")
    body, weight = _split_weight(entry)
    name, at, place = body.partition("@")
    known = HUB_NAMES.get(name.lower(), name.lower())
    if at and place == STREAM and known in KNOWN:
        if known not in TABLE_SETS:
            raise DataError(f"{known} is not on the Hub and cannot be streamed", f"write {known} alone")
        return DatasetSpec(known, None, weight, 0)
    if known in KNOWN:
        return DatasetSpec(known, _table_path(known, place) if at else None, weight)
    if at and place.endswith((*JSON_SUFFIXES, ".parquet")) and re.fullmatch(r"[\w.-]+", name):
        return DatasetSpec(name, _existing(place), weight)
    if at and re.fullmatch(r"[\w.-]+", name) and _exists(place) and not Path(place).expanduser().is_dir():
        return DatasetSpec(name, _own_path(place), weight)
    if at and not _exists(body):
        raise DataError(f"unknown data set {quoted(name)}", _nearest(name))
    path = Path(body).expanduser()
    if _exists(body) or body.endswith((*JSON_SUFFIXES, ".parquet")) or body.startswith(("/", "./", "../", "~")):
        return DatasetSpec(_own_name(path), _own_path(body), weight)
    raise DataError(f"unknown data set {quoted(name)}", _nearest(name))


def _split_weight(entry: str) -> tuple[str, float | None]:
    """Cut a trailing `:WEIGHT` off; a colon inside a path that exists is part of the path."""
    body, colon, tail = entry.rpartition(":")
    if not colon or _exists(entry.partition("@")[2] or entry):
        return entry, None
    try:
        weight = float(tail)
    except ValueError:
        raise DataError(f"weight {quoted(tail)} of {quoted(body)} is not a number") from None
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"weight {tail} of {quoted(body)} is not a positive number")
    return body, weight


def _exists(place: str) -> bool:
    """Whether there is such a path; a text that is too long for one names none."""
    try:
        return Path(place).expanduser().exists()
    except OSError:
        return False


def _nearest(name: str) -> str:
    meant = nearest(name, KNOWN, "did you mean {}? ")
    own = "own data is a path to a .jsonl, .json or .parquet file or a folder of them"
    return f"{meant}known are {', '.join(KNOWN)}; {own}"


def _existing(place: str) -> Path:
    path = Path(place).expanduser()
    if not path.exists():
        raise DataError(f"{place} does not exist", "check the path; it is relative to the working folder")
    refuse_foreign(path)
    return path


def _table_path(name: str, place: str) -> Path:
    if name not in TABLE_SETS:
        raise DataError(f"{name} takes no path", f"write {name} alone")
    if place.endswith(JSON_SUFFIXES):
        raise DataError(f"{name}@PATH reads parquet files, not {place}", "give the path alone for your own JSON data")
    return _existing(place)


def _own_path(place: str) -> Path:
    path = _existing(place)
    shards = [path] if path.suffix == ".parquet" else []
    if path.is_dir() and not any(child.suffix == ".jsonl" and child.name != LEFT_OUT for child in path.iterdir()):
        shards = [file for file in folder_files(path) if file.suffix == ".parquet"]
    if shards and not _holds_records(shards[0]):
        from vlm_sft.data.sources.shards import parquet_columns

        has = ", ".join(parquet_columns(shards[0]))
        raise DataError(
            f"{place} holds parquet without the columns of own records (it has: {has})",
            f"write chartqa@{place} or textvqa@{place} for their schema, or say which columns they are: vlm-sft data "
            f"import {place} --format jsonl --columns image=COLUMN,question=COLUMN,answer=COLUMN --output FOLDER",
        )
    if not path.is_dir() and path.suffix not in (*JSON_SUFFIXES, ".parquet"):
        layout = "csv" if path.suffix.lower() in TABLES else "FORMAT"
        others = f"vlm-sft data import {shlex.quote(place)} --format {layout} --output FOLDER"
        raise DataError(f"{place} is not a .jsonl, .json or .parquet file", f"others are read by {others}")
    return path


def _holds_records(shard: Path) -> bool:
    """Whether a parquet file has the columns of our records; the published sets have others of the same names."""
    from vlm_sft.data.sources.shards import parquet_columns

    names = set(parquet_columns(shard))
    plain = {"question"} <= names and bool({"answer", "answers"} & names) and "ocr_tokens" not in names
    return plain or bool({"messages", "conversations"} & names) or {"prompt", "completion"} <= names


def _own_name(path: Path) -> str:
    """Label own data by its file, or by its folder where the file is only called train, data or the like."""
    label = path.stem if path.suffix in (*JSON_SUFFIXES, ".parquet") else path.resolve().name
    if label.lower() in {"train", "data", "test", "val", "validation", "dev"} and path.resolve().parent.name:
        label = path.resolve().parent.name
    label = re.sub(r"[^\w.-]+", "_", label) or "own"  # which also takes bytes of a name that are no UTF-8
    return f"{label}_own" if label.lower() in KNOWN else label


def _unique_names(specs: list[DatasetSpec]) -> list[DatasetSpec]:
    """Number own data sets that would share a label, so that sample ids stay unique."""
    seen: Counter[str] = Counter()
    unique = []
    for spec in specs:
        seen[spec.name] += 1
        unique.append(spec if seen[spec.name] == 1 else replace(spec, name=f"{spec.name}_{seen[spec.name]}"))
    return unique
