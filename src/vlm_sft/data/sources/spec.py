"""The dataset argument: `NAME[@PATH][:WEIGHT]`, comma separated.

A NAME is one of `KNOWN` (or its Hub id); an entry that is a path or a pattern, `OWN_NAME@FILE`, or
`hub:ORG/NAME[:CONFIG][@stream]` is the user's own data.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm_sft.common.errors import DataError, nearest, quoted
from vlm_sft.data.sources.columns import parse_columns
from vlm_sft.data.sources.compressed import refuse_packed
from vlm_sft.data.sources.files import ARROW, data_files, is_pattern, kind_of, root_of, saved_folder, stem_of

PUBLISHED = (
    "docvqa",
    "infographicvqa",
    "chartqapro",
    "ai2d",
    "realworldqa",
    "ocrbench",
    "ocrvqa",
    "mmmu",
    "charxiv",
    "chartmuseum",
)
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
    "howard-hou/ocr-vqa": "ocrvqa",
    "mmmu/mmmu": "mmmu",
    "princeton-nlp/charxiv": "charxiv",
    "lytang/chartmuseum": "chartmuseum",
    "easy-vqa": "easy_vqa",
    "demo-charts": "demo_charts",
    "demo-text": "demo_text",
}
HUB = "hub:"
KINDS_TEXT = ".jsonl, .json, .csv, .tsv (each also .gz, .bz2, .xz, .zst), .parquet, .arrow and .tar"
STREAM = "stream"  # NAME@stream: fetch as many rows from the Hub as are needed, not the whole set
COLUMNS_HELP = "what the columns of your own data are called, e.g. image=picture,question=frage,answer=antwort"
GRAMMAR = "write NAME[@PATH][:WEIGHT], comma separated, e.g. chartqa:2,textvqa or my_data/train.jsonl"


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One entry of the dataset argument.

    Attributes:
        name: a known data set, or the label of the user's own data; sample ids start with it.
        path: parquet files of a known set, or the user's file or folder; None for the published data.
        weight: how often its questions are drawn relative to other sets; None when none was given.
        stream: None reads the whole set; else only its first rows are fetched, at most so many (0: not yet known).
        hub: id and configuration of any set on the Hub that is read as the user's own: "ORG/NAME" or "ORG/NAME:CONFIG".
        columns: of own data: our name of a column to the data's, as of `--columns`.
        alone: `columns` was given for this set alone.
    """

    name: str
    path: Path | None = None
    weight: float | None = None
    stream: int | None = None
    hub: str = ""
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    alone: bool = True

    @property
    def own(self) -> bool:
        """True for the user's own data."""
        return is_own(self.name)


def is_own(name: str) -> bool:
    """Whether a data set of this name is the user's own, or a free question: no published or generated set."""
    return name not in KNOWN


def parse_datasets(text: str, columns: str | None = None) -> list[DatasetSpec]:
    """Parse the dataset argument, e.g. `chartqa:2,textvqa:1` or `chartqa@/data/chartqa,my_data.jsonl`.

    Args:
        text: comma-separated entries `NAME[@PATH][:WEIGHT]`; a path of own data may stand in place of NAME.
        columns: as of `--columns`: what the columns of own data are called.

    Returns:
        One spec an entry, in order. Own data is named after its file or folder.

    Raises:
        DataError: every mistake of the argument together; unknown names come with the nearest known one.
    """
    named = parse_columns(columns)
    specs = _parse_all(text)
    own = [spec for spec in specs if spec.own]
    if named and not own:
        what = f"--columns {quoted(columns)} has no effect: {quoted(text)} names no data of your own"
        raise DataError(what, "leave it out")
    return _under_names(specs, named, alone=len(own) == 1)


def parse_beside(text: str, specs: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Parse another argument that names data sets, e.g. `--eval_benchmarks`; `--columns` holds for them too.

    Args:
        text: as of `parse_datasets`.
        specs: the data sets of the command.

    Raises:
        DataError: as of `parse_datasets`.
    """
    named = next((spec.columns for spec in specs if spec.columns), {})
    return _under_names(_parse_all(text), named, alone=False)


def _under_names(specs: list[DatasetSpec], named: Mapping[str, str], alone: bool) -> list[DatasetSpec]:
    """Data sets that know what their columns are called, each with a label of its own."""
    if named:
        specs = [replace(spec, columns=named, alone=alone) if spec.own else spec for spec in specs]
    for spec in specs:
        _require_records(spec)
    return _unique_names(specs)


def _parse_all(text: str) -> list[DatasetSpec]:
    """The entries of the argument; every mistake is told together."""
    specs: list[DatasetSpec] = []
    mistakes: list[str] = []
    fixes: list[str] = []
    for entry in (part.strip() for part in re.split(r",(?![^{}]*\})", text)):
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
    return specs


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
    if entry.startswith(HUB):
        return _hub_entry(entry)
    body, weight = _split_weight(entry)
    name, at, place = body.partition("@")
    known = HUB_NAMES.get(name.lower(), name.lower())
    if at and place == STREAM and known in KNOWN:
        if known not in TABLE_SETS:
            raise DataError(f"{known} is not on the Hub and cannot be streamed", f"write {known} alone")
        return DatasetSpec(known, None, weight, 0)
    if known in KNOWN:
        return DatasetSpec(known, _table_path(known, place) if at else None, weight)
    if at and re.fullmatch(r"[\w.-]+", name) and (kind_of(Path(place)) or _is_place(place)):
        return DatasetSpec(name, _own_path(place), weight)
    if at and not _exists(body):
        raise DataError(f"unknown data set {quoted(name)}", _nearest(name))
    if _is_place(body) or kind_of(Path(body)) or body.startswith(("/", "./", "../", "~")):
        return DatasetSpec(_own_name(Path(body).expanduser()), _own_path(body), weight)
    raise DataError(f"unknown data set {quoted(name)}", _nearest(name))


def _hub_entry(entry: str) -> DatasetSpec:
    """Read `hub:ORG/NAME[:CONFIG][@stream][:WEIGHT]`; a number at the end is the weight."""
    found = re.fullmatch(
        r"hub:(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>(?![\d.]+$)[\w.+-]+|[\d.]+(?=[:@])))?(?P<stream>@stream)?(:(?P<weight>[^:@]*))?",
        entry,
    )
    if found is None:
        raise DataError(f"{quoted(entry, 200)} is no set on the Hub", "write hub:ORG/NAME, or hub:ORG/NAME:CONFIG")
    weight = None if found["weight"] is None else _weight(found["weight"], found["id"])
    place = f"{found['id']}:{found['config']}" if found["config"] else found["id"]
    stream = 0 if found["stream"] else None
    return DatasetSpec(_own_name(Path(found["id"])), None, weight, stream, place)


def _split_weight(entry: str) -> tuple[str, float | None]:
    """Cut a trailing `:WEIGHT` off; a colon inside a path that exists is part of the path."""
    body, colon, tail = entry.rpartition(":")
    if not colon or _exists(entry.partition("@")[2] or entry):
        return entry, None
    return body, _weight(tail, body)


def _weight(text: str, of: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise DataError(f"weight {quoted(text)} of {quoted(of)} is not a number") from None
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"weight {text} of {quoted(of)} is not a positive number")
    return weight


def _exists(place: str) -> bool:
    """Whether there is such a path; a text that is too long for one names none."""
    try:
        return Path(place).expanduser().exists()
    except OSError:
        return False


def _is_place(place: str) -> bool:
    """Whether a text names files here."""
    return _exists(place) or (len(place) < 4096 and is_pattern(place))


def _nearest(name: str) -> str:
    meant = nearest(name, KNOWN, "did you mean {}? ")
    own = "own data is a path to a file or folder, or hub:ORG/NAME of any set on the Hub"
    return f"{meant}known are {', '.join(KNOWN)}; {own}"


def _existing(place: str) -> Path:
    path = Path(place).expanduser()
    if not _is_place(place):
        raise DataError(f"{place} does not exist", "check the path; it is relative to the working folder")
    return path


def _table_path(name: str, place: str) -> Path:
    if name not in TABLE_SETS:
        raise DataError(f"{name} takes no path", f"write {name} alone")
    path = Path(place)
    if kind_of(path) not in ("", ".parquet") or (_exists(place) and saved_folder(path.expanduser())):
        raise DataError(f"{name}@PATH reads parquet files, not {place}", "give the path alone for your own data")
    return _existing(place)


def _own_path(place: str) -> Path:
    path = _existing(place)
    if path.is_file() and saved_folder(path) is None:
        refuse_packed(path)
        if not kind_of(path):
            layout = f"vlm-sft data import {place} --format FORMAT --output FOLDER"
            raise DataError(
                f"{place} is of no kind that is read", f"known are {KINDS_TEXT}; others are read by {layout}"
            )
    return path


def _require_records(spec: DatasetSpec) -> None:
    """Refuse parquet and Arrow files without the columns of records before anything else is done.

    Raises:
        DataError: with the columns and the flag to write.
    """
    if not spec.own or spec.path is None:
        return
    first = next(iter(data_files(spec.path).values()))[0]
    if kind_of(first) not in (".parquet", ARROW):
        return
    from vlm_sft.data.sources.readers import require_table

    try:
        require_table(first, spec.columns, spec.alone)
    except DataError as error:
        if kind_of(first) == ".parquet" and not spec.columns:
            fix = f"{error.fix}; or write chartqa@{spec.path} or textvqa@{spec.path} for their schema"
            raise DataError(error.what, fix) from error
        raise


def _own_name(path: Path) -> str:
    """Label own data by its file, or by its folder where the file is only called train, data or the like."""
    if is_pattern(str(path)):
        path = root_of(path)
    label = stem_of(path) if kind_of(path) else path.resolve().name
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
