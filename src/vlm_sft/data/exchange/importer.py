"""Other programs' data sets into ours: a folder of JSON lines and images, and a report of what was dropped and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from vlm_sft.common.artifacts import IMPORT, LEFT_OUT, UNENCODABLE, OutputFolder, write_json
from vlm_sft.common.console import say
from vlm_sft.common.errors import DataError, nearest, quoted
from vlm_sft.data.audit import MAX_LEFT_OUT_FRACTION, enforce
from vlm_sft.data.exchange.image_folder import FOLDER, ImageStore
from vlm_sft.data.exchange.layouts import read_record, row_of
from vlm_sft.data.exchange.report import OUTSIDE_CAUTION, PARTIAL, ExchangeReport, check_limits, claim_output
from vlm_sft.data.exchange.tables import input_files, names_for, records
from vlm_sft.data.sample import LeftOut
from vlm_sft.data.sources.columns import KEYS_TOLD, has_of
from vlm_sft.data.sources.files import root_of
from vlm_sft.data.sources.locate import lies_outside
from vlm_sft.data.sources.records import Question, require_image
from vlm_sft.data.sources.rows import RowProblem, left_out
from vlm_sft.data.sources.splits import SPLIT_WORDS
from vlm_sft.data.threads import map_images

BATCH = 256  # questions whose images are read together
REPORT_EVERY = 20_000  # questions between two lines of progress


@dataclass(frozen=True)
class ImportRequest:
    """What is imported.

    Attributes:
        source: a file, or a folder of files.
        layout: one of `layouts.FORMATS`.
        output: the folder to write; new or empty.
        images: what image paths are relative to; None for the folder of each file.
        columns: our name of a column to the file's.
        allow_urls: whether images may be fetched from the web.
        limit: at most so many questions; None for all.
        max_left_out: share of questions that may be left out, 0 to 1.
    """

    source: Path
    layout: str
    output: Path
    images: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    allow_urls: bool = False
    limit: int | None = None
    max_left_out: float = MAX_LEFT_OUT_FRACTION


@dataclass(frozen=True)
class _Item:
    """One question on its way."""

    id: str
    where: str
    split: str
    part: str
    folder: Path
    question: Question


def import_data(request: ImportRequest) -> ExchangeReport:
    """Carry out one import; files get their names when everything is written and not too much is left out.

    Returns:
        What was written and what was not; the same is in import.json and left_out.jsonl.

    Raises:
        DataError: the input cannot be read, not one question can be used, or more is left out than is allowed; then
            left_out.jsonl is all that is written.
        RunError: the output folder holds something else, or cannot be written.
    """
    check_limits(request.limit, request.max_left_out)
    with OutputFolder(request.output, FOLDER, f"{FOLDER}/*", f"*{PARTIAL}", LEFT_OUT).or_nothing():
        return _import(request)


def _import(request: ImportRequest) -> ExchangeReport:
    files = input_files(request.source, request.layout)
    if request.images is not None and not request.images.is_dir():
        raise DataError(f"--images {request.images} is not a folder", "pass the folder that holds the pictures")
    claim_output(request.output)
    store = ImageStore(request.output, request.allow_urls)
    report, outside = ExchangeReport(), set[str]()
    root = root_of(request.source)
    homes = (root, *([request.images] if request.images else []))
    writer = _Writer(request.output, report)
    with writer:
        seen: set[str] = set()
        items = islice(_items(request, files, report, writer, seen), request.limit)
        while batch := list(islice(items, BATCH)):
            before = report.total
            for item, kept in zip(batch, _keep_images(batch, store, homes, outside), strict=True):
                writer.put(item, kept)
            if report.total // REPORT_EVERY > before // REPORT_EVERY:
                say(f"imported so far: {sum(report.questions.values()):,} questions, {len(report.left_out):,} left out")
        _refuse_idle(request, report, seen, store)
        if outside:
            report.cautions[OUTSIDE_CAUTION] = outside
        _require_enough(request, report)
    _write_facts(request, report)
    return report


def _require_enough(request: ImportRequest, report: ExchangeReport) -> None:
    """Refuse an import of nothing, or one that leaves too much out.

    Raises:
        DataError: with the first reasons.
    """
    if not sum(report.questions.values()):
        first = "".join(f"\n  - {item.reason}: {item.detail}" for item in report.left_out[:3])
        raise DataError(
            f"{request.source}: no question can be used as {request.layout}; the first reasons:{first}",
            f"is it another --format? all reasons are in {request.output / LEFT_OUT}",
        )
    enforce(report.left_out, report.total, request.max_left_out, request.output / LEFT_OUT)


def _refuse_idle(request: ImportRequest, report: ExchangeReport, seen: set[str], store: ImageStore) -> None:
    """Refuse what was asked for and changed nothing.

    Raises:
        DataError: no record has a key that `--columns` names, or none names an image by a path in `--images`.
    """
    unseen = [pair for pair in request.columns.items() if pair[1] not in seen]
    if unseen and report.records:
        ours, theirs = unseen[0]
        raise DataError(
            f"--columns {ours}={theirs}: no record of {request.source} has the key {quoted(theirs)}"
            f"{nearest(theirs, seen)} (they have: {has_of(sorted(seen)[:KEYS_TOLD])})",
            "name a key that is there, or leave this one out",
        )
    if request.images is not None and report.questions and not store.looked_up:
        raise DataError(
            f"--images {request.images} has no effect: every image of {request.source} is inside the "
            "records, or has its whole path there",
            "leave it out",
        )


def _items(
    request: ImportRequest, files: dict[str, list[Path]], report: ExchangeReport, writer: _Writer, seen: set[str]
) -> Iterator[_Item]:
    """Read the records and cut them into questions; what cannot be used goes to the writer.

    The keys of the records go to `seen` where `--columns` is given.
    """
    used: Counter[str] = Counter()
    for file_split, paths in files.items():
        for path in paths:
            names = names_for(path, request.columns)
            for number, label, record in records(path, request.layout, request.columns, seen):
                report.records += 1
                where, numbered = f"{path} {label} {number}", f"{path.stem}/{number:06d}"
                try:
                    if isinstance(record, RowProblem):
                        raise record
                    questions = require_image(record, partial(read_record, record, request.layout, names))
                except RowProblem as problem:
                    writer.drop(left_out(numbered, where, problem))
                    continue
                report.conversations += len(questions) > 1
                yield from _named(
                    request, path, file_split, where, _own_id(record, numbered, used), record, questions, writer
                )


def _named(
    request: ImportRequest,
    path: Path,
    file_split: str,
    where: str,
    base: str,
    record: dict[str, Any],
    questions: list[Question],
    writer: _Writer,
) -> Iterator[_Item]:
    """The questions of one record, with ids and splits."""
    part = str(record.get("split") or "").strip()
    word = SPLIT_WORDS.get(part.lower())
    for question in questions:
        own_id = base if len(questions) == 1 else f"{base}/turn{question.turn}"
        if question.problem:
            writer.drop(left_out(own_id, where, question.problem))
        else:
            folder = request.images or path.parent
            yield _Item(own_id, where, word or file_split, "" if word else part, folder, question)


def _own_id(record: dict[str, Any], numbered: str, used: Counter[str]) -> str:
    """The record's own id, or its place; an id that was used before gets the place behind it."""
    own = record.get("id")
    name = str(own).strip() if isinstance(own, (str, int)) and not isinstance(own, bool) else ""
    name = name.encode("utf-8", "replace").decode("utf-8") or numbered
    used[name] += 1
    return name if used[name] == 1 else f"{name}:{numbered}"


def _keep_images(
    batch: list[_Item], store: ImageStore, homes: tuple[Path, ...], outside: set[str]
) -> list[list[str] | RowProblem]:
    """Find, check and write the images of some questions, in threads; those that lie in no home go to `outside`."""

    def keep(item: _Item) -> list[str] | RowProblem:
        try:
            refs = [store.find(item.folder, image) for image in item.question.images]
            outside.update(ref.source for ref in refs if lies_outside(ref, *homes))
            return [store.keep(ref) for ref in refs]
        except RowProblem as problem:
            return problem

    return map_images(keep, batch, len(batch), "reading images")


class _Writer:
    """Writes questions, and what was left out, line by line; names become final at a good end."""

    def __init__(self, output: Path, report: ExchangeReport) -> None:
        self._output, self._report = output, report
        self._open: dict[str, TextIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Writer:
        self._line(LEFT_OUT)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        # A refusal sends its reader to the list of what is left out.
        final = list(self._open) if kind is None else [LEFT_OUT] if issubclass(kind, DataError) else []
        for name in final:
            (self._output / f"{name}{PARTIAL}").replace(self._output / name)
        if kind is None:
            self._report.files += [self._output / name for name in self._open if name != LEFT_OUT]

    def put(self, item: _Item, images: list[str] | RowProblem) -> None:
        """Write one question, or why not."""
        if isinstance(images, RowProblem):
            self.drop(left_out(item.id, item.where, images))
            return
        try:
            row = row_of(item.question, images, item.id, item.part)
        except RowProblem as problem:
            self.drop(left_out(item.id, item.where, problem))
            return
        self._line(f"{item.split}.jsonl", row)
        self._report.questions[item.split] += 1

    def drop(self, item: LeftOut) -> None:
        """Name what cannot be used."""
        self._report.left_out.append(item)
        self._line(LEFT_OUT, asdict(item))

    def _line(self, name: str, row: dict[str, Any] | None = None) -> None:
        if name not in self._open:
            path = self._output / f"{name}{PARTIAL}"
            self._open[name] = self._stack.enter_context(path.open("w", encoding="utf-8", errors=UNENCODABLE))
        if row is not None:
            self._open[name].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _write_facts(request: ImportRequest, report: ExchangeReport) -> None:
    facts = {
        "schema": 1,
        "source": str(request.source),
        "format": request.layout,
        "records": report.records,
        "conversations": report.conversations,
        **report.counts(),
    }
    write_json(request.output / IMPORT, facts)
