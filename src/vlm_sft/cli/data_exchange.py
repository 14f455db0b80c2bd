"""`vlm-sft data import` and `data export`: between our JSONL and the layouts of other trainers."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.errors import bounded
from vlm_sft.data.exchange.layouts import FORMATS, layout_of
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


def run_import(args: argparse.Namespace) -> int:
    """Run `data import`; where too much is left out, only the list of that is written.

    Raises:
        DataError: the input cannot be read, or more is left out than `--max_left_out` allows.
        RunError: the output folder cannot be used.
    """
    from vlm_sft.common.console import say
    from vlm_sft.data.exchange.importer import ImportRequest, import_data
    from vlm_sft.data.exchange.tables import parse_layout_columns

    layout = args.format or layout_of(args.source)
    say(bounded(f"importing {args.source} as {layout}"))
    request = ImportRequest(
        args.source,
        layout,
        args.output,
        args.images,
        parse_layout_columns(args.columns, layout),
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
    from vlm_sft.common.console import say
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.data.exchange.exporter import IDLE, ExportRequest, export_named

    refuse_idle(args, IDLE, args.given)
    say(bounded(f"exporting {args.dataset} as {args.format}"))
    request = ExportRequest(args.format, args.output, args.style, max_left_out=args.max_left_out)
    report = export_named(args.dataset, request, args.split, args.limit, args.columns)
    _tell(report, args)
    names = {"folder": shlex.quote(str(args.output)), "first": shlex.quote(str(report.files[0]))}
    say("next: " + NEXT[args.format].format(**names, plain=str(args.output)))
    return 0


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
