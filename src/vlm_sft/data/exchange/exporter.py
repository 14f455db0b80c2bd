"""Our data sets into other programs' layouts: files that they open, images beside them, and a report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import (
    CHANGED,
    EXCHANGE,
    LEFT_OUT,
    OutputFolder,
    is_formula,
    write_json,
    write_jsonl,
    write_text_atomic,
)
from vlm_sft.common.console import progress
from vlm_sft.common.errors import DataError, RunError
from vlm_sft.common.idle import Idle
from vlm_sft.data.audit import MAX_LEFT_OUT_FRACTION, enforce
from vlm_sft.data.exchange.image_folder import FOLDER, ImageStore
from vlm_sft.data.exchange.layouts import SUPERVISED_NOTE, write_record
from vlm_sft.data.exchange.report import OUTSIDE_CAUTION, ExchangeReport, check_limits, claim_output
from vlm_sft.data.mixture import mix
from vlm_sft.data.sample import OUTSIDE, LeftOut, Sample
from vlm_sft.data.sources.arrow_tables import native_file
from vlm_sft.data.sources.registry import SPLITS, load_split
from vlm_sft.data.sources.rows import RowProblem, left_out
from vlm_sft.data.sources.spec import parse_datasets, refuse_weights
from vlm_sft.data.sources.splits import DATASET_INFO, MissingSplitError

FORMULA_CAUTION = "texts that begin like a formula, which a spreadsheet would compute: open the file with text columns"
ROW_GROUP = 100  # rows with their images that are held in memory together


@dataclass(frozen=True)
class ExportRequest:
    """What is exported.

    Attributes:
        layout: one of `layouts.FORMATS`.
        output: the folder to write; new or empty.
        style: of LLaMA-Factory: "sharegpt" or "alpaca".
        name: what the data set is called there.
        max_left_out: share of questions that may be left out, 0 to 1.
    """

    layout: str
    output: Path
    style: str = "sharegpt"
    name: str = "data"
    max_left_out: float = MAX_LEFT_OUT_FRACTION


def export_data(request: ExportRequest, splits: dict[str, list[Sample]], gone: list[LeftOut]) -> ExchangeReport:
    """Write samples in another program's layout.

    Args:
        request: how and where.
        splits: the samples of each split, e.g. {"train": […]}.
        gone: what was left out before, to be named too.

    Returns:
        What was written and what was not; the same is in export_data.json, left_out.jsonl and changed.jsonl.

    Raises:
        DataError: not one sample can be said in this layout, or more is left out than is allowed; then left_out.jsonl
            is all that is written.
        RunError: the output folder holds something else, or cannot be written.
    """
    made = (FOLDER, f"{FOLDER}/*", LEFT_OUT, *(f"{split}.*" for split in splits))
    with OutputFolder(request.output, *made).or_nothing():
        return _export(request, splits, gone)


IDLE = (
    Idle(
        ("style",),
        lambda o: o.format != "llamafactory",
        "on --format {0.format}",
        "leave it out: LLaMA-Factory alone has two styles",
    ),
)


def export_named(
    dataset: str, request: ExportRequest, split: str = "all", limit: int | None = None, columns: str | None = None
) -> ExchangeReport:
    """Write data sets in another program's layout.

    Args:
        dataset: in the grammar of `--dataset`, without weights.
        request: how and where; its name is made of those of the sets.
        split: "train", "validation", "test", or "all" that there are.
        limit: at most so many questions a split, a seeded sample; None for all.
        columns: as of `--columns`.

    Raises:
        DataError, RunError: as `export_data`; or a data set cannot be loaded.
    """
    check_limits(limit, request.max_left_out)
    specs = parse_datasets(dataset, columns)
    refuse_weights(specs, "an export holds every question once")
    splits: dict[str, list[Sample]] = {}
    gone: dict[str, LeftOut] = {}
    for one in SPLITS if split == "all" else (split,):
        seen = {sample.id for samples in splits.values() for sample in samples}
        for spec in specs:
            try:
                loaded = load_split(spec, one, at_most=limit)
            except MissingSplitError:
                if split != "all":
                    raise
                continue
            fresh = [sample for sample in loaded.samples if sample.id not in seen]  # a fallback repeats another split
            splits.setdefault(one, []).extend(mix([(spec, fresh)], limit, 0) if fresh else [])
            gone |= {item.id: item for item in loaded.left_out}
    request = replace(request, name="_".join(spec.name for spec in specs))
    return export_data(request, {one: samples for one, samples in splits.items() if samples}, list(gone.values()))


def _export(request: ExportRequest, splits: dict[str, list[Sample]], gone: list[LeftOut]) -> ExchangeReport:
    """Write the files; returns as `export_data` does."""
    claim_output(request.output)
    report = ExchangeReport(left_out=list(gone))
    store = ImageStore(request.output)
    with progress(sum(map(len, splits.values())), "exporting", "questions") as bar:
        for split, samples in splits.items():
            rows = _rows(request, samples, split, store, report, bar.advance)
            try:
                path = _write(request, split, rows, report)
            except OSError as error:
                raise RunError(f"cannot write {request.output}: {error.strerror}", "make room, then again") from error
            if report.questions[split]:
                report.files.append(path)
            else:
                path.unlink(missing_ok=True)
    write_jsonl(request.output / LEFT_OUT, map(asdict, report.left_out))
    if not report.files:
        reasons = ", ".join(sorted({item.reason for item in report.left_out}))
        raise DataError(f"no question can be said as {request.layout}: {reasons}", "choose another --format")
    enforce(report.left_out, report.total, request.max_left_out, request.output / LEFT_OUT)
    if report.changed:
        lines = [{"id": own_id, "change": note} for note, ids in report.changed.items() for own_id in ids]
        write_jsonl(request.output / CHANGED, lines)
    if request.layout == "llamafactory":
        write_json(request.output / DATASET_INFO, _dataset_info(request, report.files))
    _write_facts(request, report)
    return report


def _where(sample: Sample) -> str:
    """Where a sample comes from, for messages."""
    return sample.images[0].source if sample.images else str(sample.metadata.get("where", sample.id))


def _rows(
    request: ExportRequest, samples: list[Sample], split: str, store: ImageStore, report: ExchangeReport, tick: Any
) -> Iterator[dict[str, Any]]:
    """The records of one split; what cannot be said is named in the report."""
    for sample in samples:
        tick()
        report.records += 1
        if OUTSIDE in sample.metadata:
            report.cautions.setdefault(OUTSIDE_CAUTION, set()).update(sample.metadata[OUTSIDE])
        try:
            record = write_record(sample, [store.keep(image) for image in sample.images], request.layout, request.style)
        except RowProblem as problem:
            report.left_out.append(left_out(sample.id, _where(sample), problem))
            continue
        if request.layout == "llamafactory" and sample.history:
            report.changed.setdefault(SUPERVISED_NOTE, []).append(sample.id)
        report.questions[split] += 1
        yield record


def _write(request: ExportRequest, split: str, rows: Iterator[dict[str, Any]], report: ExchangeReport) -> Path:
    """Write one split's file."""
    folder = request.output
    if request.layout == "trl":
        return _write_parquet(folder / f"{split}.parquet", rows, folder)
    if request.layout == "csv":
        return write_text_atomic(folder / f"{split}.csv", _csv_text(_counting_formulas(rows, report)))
    if request.layout == "llamafactory":
        return write_text_atomic(folder / f"{split}.json", json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")
    return write_jsonl(folder / f"{split}.jsonl", rows)


def _counting_formulas(rows: Iterable[dict[str, Any]], report: ExchangeReport) -> Iterator[dict[str, Any]]:
    """The rows of a CSV as they are; those with a cell that a spreadsheet would compute are named in the report."""
    for row in rows:
        if any(is_formula(cell) for cell in row.values() if isinstance(cell, str)):
            report.cautions.setdefault(FORMULA_CAUTION, set()).add(row["id"])
        yield row


def _csv_text(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("id", "image", "question", "answer", "split"), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], folder: Path) -> Path:
    """Write records with the bytes of their images inside, as `datasets` reads and decodes them."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Features, Image, List, Value

    text = Value("string")
    message = {"role": text, "content": List({"type": text, "text": text})}
    features = Features(
        {
            "id": text,
            "images": List(Image()),
            "prompt": List(message),
            "completion": List(message),
            "answers": List(text),
            "split": text,
            "boxes": text,
        }
    )
    schema = features.arrow_schema
    partial = path.with_name(f"{path.name}.partial")
    with native_file(partial, "wb") as stream, pyarrow.parquet.ParquetWriter(stream, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            for row in group:
                row["images"] = [{"bytes": (folder / name).read_bytes(), "path": name} for name in row["images"]]
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return partial.replace(path)


def _dataset_info(request: ExportRequest, files: list[Path]) -> dict[str, Any]:
    """What LLaMA-Factory reads to find the files; the folder is its dataset_dir."""
    if request.style == "alpaca":
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        described: dict[str, Any] = {"columns": columns | {"system": "system", "images": "images"}}
    else:
        columns = {"messages": "conversations", "system": "system", "images": "images"}
        described = {"formatting": "sharegpt", "columns": columns}
    return {f"{request.name}_{file.stem}": {"file_name": file.name} | described for file in files}


def _write_facts(request: ExportRequest, report: ExchangeReport) -> None:
    facts = {
        "schema": 1,
        "format": request.layout,
        "style": request.style if request.layout == "llamafactory" else "",
        **report.counts(),
        "files": [path.name for path in report.files],
    }
    write_json(request.output / EXCHANGE, facts)
