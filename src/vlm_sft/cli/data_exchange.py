"""`vlm-sft data import` and `data export`: between our JSONL and the layouts of other trainers."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.errors import DataError, bounded
from vlm_sft.data.exchange.layouts import FORMATS
from vlm_sft.data.sources.spec import COLUMNS_HELP

if TYPE_CHECKING:
    from vlm_sft.data.exchange.report import ExchangeReport

IMPORT_HELP = "read a data set of TRL, LLaMA-Factory, ms-swift, datasets, WebDataset, or a CSV with a folder of images"
EXPORT_HELP = "write a data set for TRL, LLaMA-Factory, ms-swift, or as CSV"
NEXT = {
    "trl": "datasets.load_dataset('parquet', data_dir={plain!r})  # then trl.SFTTrainer",
    "llamafactory": "llamafactory-cli train … --dataset_dir {folder} --dataset NAME of dataset_info.json",
    "msswift": "ROOT_IMAGE_DIR={folder} swift sft --dataset {first}",
    "csv": "vlm-sft data import {folder} --format csv --output FOLDER  # reads it again",
    "jsonl": "vlm-sft train --dataset {folder} --output_dir outputs/mine",
}


def add_exchange_arguments(actions: Any) -> None:
    """Add `data import` and `data export` to the actions of `data`."""
    reader = actions.add_parser("import", help=IMPORT_HELP, description=IMPORT_HELP)
    reader.add_argument("source", type=Path, metavar="FILE", help="the file, or a folder of files (train, val, test)")
    _add_common(reader, "the layout outside (default: what the files say: CSV, WebDataset, save_to_disk, imagefolder)")
    reader.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that image paths are relative to (default: that of each file)",
    )
    reader.add_argument("--columns", metavar="NAME=COLUMN,…", help=COLUMNS_HELP)
    reader.add_argument(
        "--allow_image_urls",
        action="store_true",
        help="fetch images given as http or https URLs, at most 32 MiB and 30 s each",
    )
    reader.add_argument("--limit", type=int, metavar="N", help="read at most the first N questions")
    writer = actions.add_parser("export", help=EXPORT_HELP, description=EXPORT_HELP)
    writer.add_argument("dataset", metavar="DATASET", help="NAME[@PATH], or your own data, as in vlm-sft train")
    writer.add_argument("--columns", metavar="NAME=COLUMN,…", help=COLUMNS_HELP)
    _add_common(writer, "the layout outside")
    writer.add_argument(
        "--style",
        default="sharegpt",
        choices=("sharegpt", "alpaca"),
        help="one of LLaMA-Factory's two layouts (default: %(default)s)",
    )
    writer.add_argument(
        "--split",
        default="all",
        choices=("train", "validation", "test", "all"),
        help="which split to write (default: all)",
    )
    writer.add_argument("--limit", type=int, metavar="N", help="a seeded sample of at most N questions a split")


def _add_common(parser: argparse.ArgumentParser, layout: str) -> None:
    parser.add_argument("--format", required="default" not in layout, choices=FORMATS, help=layout)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder to write to")
    parser.add_argument(
        "--max_left_out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of unusable questions that is tolerated, 0 to 1 (default: %(default)s)",
    )


def _layout_of(source: Path) -> str:
    """The layout that the name of a file says, or that it has as the kind of data that it is.

    Raises:
        DataError: neither.
    """
    from vlm_sft.data.sources.files import TABLES, data_files, is_pattern, kind_of, saved_folder

    if kind_of(source) in TABLES:
        return "csv"
    if saved_folder(source) or kind_of(source) in (".tar", ".arrow"):
        return "jsonl"
    if source.is_dir() or is_pattern(str(source)):
        files = [file for paths in data_files(source).values() for file in paths]
        kinds = {kind_of(file) for file in files}
        if kinds <= {".tar"} or all(file.name.startswith("metadata.") for file in files):
            return "jsonl"
        if kinds <= set(TABLES):
            return "csv"
    raise DataError(f"--format is missing, and the name of {source} says none", f"pass one of {', '.join(FORMATS)}")


def run_import(args: argparse.Namespace) -> int:
    """Run `data import`; where too much is left out, only the list of that is written.

    Raises:
        DataError: the input cannot be read, or more is left out than `--max_left_out` allows.
        RunError: the output folder cannot be used.
    """
    from vlm_sft.common.console import say
    from vlm_sft.data.audit import enforce
    from vlm_sft.data.exchange.importer import ImportRequest, import_data
    from vlm_sft.data.exchange.tables import parse_layout_columns

    enforce([], 0, args.max_left_out)
    _check_limit(args.limit)
    args.format = args.format or _layout_of(args.source)
    say(bounded(f"importing {args.source} as {args.format}"))
    columns = parse_layout_columns(args.columns, args.format)
    request = ImportRequest(
        args.source,
        args.format,
        args.output,
        args.images,
        columns,
        args.allow_image_urls,
        args.limit,
        args.max_left_out,
    )
    report = import_data(request)
    several = f", {report.conversations:,} of them conversations of several questions" if report.conversations else ""
    say(f"read {report.records:,} rows{several}")
    _tell(report, args)
    folder = shlex.quote(str(args.output))
    say(f"next: vlm-sft data check {folder}\n      vlm-sft train --dataset {folder} --output_dir outputs/mine")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Run `data export`; where too much is left out, only the list of that is written.

    Raises:
        DataError: the data cannot be read, or more is left out than `--max_left_out` allows.
        RunError: the output folder cannot be used.
    """
    from vlm_sft.cli.parser import refuse_idle
    from vlm_sft.common.console import say
    from vlm_sft.data.audit import enforce
    from vlm_sft.data.exchange.exporter import ExportRequest, export_data
    from vlm_sft.data.mixture import mix
    from vlm_sft.data.sources.registry import SPLITS
    from vlm_sft.data.sources.spec import parse_datasets, refuse_weights

    if args.format != "llamafactory":
        refuse_idle(args, ("style",), f"on --format {args.format}", "leave it out: LLaMA-Factory alone has two styles")
    enforce([], 0, args.max_left_out)
    _check_limit(args.limit)
    specs = parse_datasets(args.dataset, args.columns)
    refuse_weights(specs, "an export holds every question once")
    say(bounded(f"exporting {args.dataset} as {args.format}"))
    splits: dict[str, list[Any]] = {}
    gone: dict[str, Any] = {}
    for split in SPLITS if args.split == "all" else (args.split,):
        seen = {sample.id for samples in splits.values() for sample in samples}
        for spec in specs:
            samples, left_out = _split_of(spec, split, args)
            fresh = [sample for sample in samples if sample.id not in seen]  # a fallback repeats another split
            splits.setdefault(split, []).extend(mix([(spec, fresh)], args.limit, 0) if fresh else [])
            gone |= {item.id: item for item in left_out}
    name = "_".join(spec.name for spec in specs)
    splits = {split: samples for split, samples in splits.items() if samples}
    request = ExportRequest(args.format, args.output, args.style, name, args.max_left_out)
    report = export_data(request, splits, list(gone.values()))
    _tell(report, args)
    names = {"folder": shlex.quote(str(args.output)), "first": shlex.quote(str(report.files[0]))}
    say("next: " + NEXT[args.format].format(**names, plain=str(args.output)))
    return 0


def _split_of(spec: Any, split: str, args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Samples of one split without the weight, and what was left out; ([], []) where `all` meets a missing one."""
    from vlm_sft.data.sources.registry import load_split
    from vlm_sft.data.sources.splits import MissingSplitError

    try:
        loaded = load_split(spec, split, at_most=args.limit)
    except MissingSplitError:
        if args.split != "all":
            raise
        return [], []
    return loaded.samples, loaded.left_out


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit} is below 1", "give a number of questions, or leave it out")


def _tell(report: ExchangeReport, args: argparse.Namespace) -> None:
    """Say what was written, left out and changed."""
    from vlm_sft.common.artifacts import CHANGED, LEFT_OUT
    from vlm_sft.common.console import say, warn

    counts = ", ".join(f"{split} {count:,}" for split, count in report.questions.items() if count)
    say(f"questions written: {counts}")
    for path in report.files:
        say(f"  {path}")
    for note, ids in report.changed.items():
        warn(f"{len(ids):,} questions were changed: {note}; listed in {args.output / CHANGED}")
    for caution, found in report.cautions.items():
        warn(f"{caution}: {len(found):,}; the first: {min(found)}")
    say(f"left out: {len(report.left_out):,} (named in {args.output / LEFT_OUT})")
