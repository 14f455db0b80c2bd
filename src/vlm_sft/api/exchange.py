"""Data sets checked, and those of other programs in and out, from Python: `vlm-sft data` as functions."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_sft.api.keywords import columns_text
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument
from vlm_sft.common.errors import DataError, nearest
from vlm_sft.common.idle import refuse_idle
from vlm_sft.data.audit import MAX_LEFT_OUT_FRACTION
from vlm_sft.data.exchange.exporter import IDLE, ExportRequest, export_named
from vlm_sft.data.exchange.importer import ImportRequest
from vlm_sft.data.exchange.importer import import_data as carry_out
from vlm_sft.data.exchange.layouts import FORMATS, layout_of
from vlm_sft.data.exchange.report import ExchangeReport
from vlm_sft.data.exchange.tables import parse_layout_columns
from vlm_sft.planning.data_check import DataCheck
from vlm_sft.planning.data_check import check_data as carry_out_check
from vlm_sft.planning.options import CheckRequest

STYLES = ("sharegpt", "alpaca")


def import_data(
    source: str | Path,
    output: str | Path,
    format: str | None = None,
    *,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    allow_image_urls: bool = False,
    limit: int | None = None,
    max_left_out: float = MAX_LEFT_OUT_FRACTION,
) -> ExchangeReport:
    """Read a data set of TRL, LLaMA-Factory, ms-swift, or a CSV file beside a folder of images.

    Args:
        source: the file, or a folder of files (train, val, test).
        output: a new folder: JSON lines and images, which `finetune` takes.
        format: "trl", "llamafactory", "msswift", "csv" or "jsonl"; None for what the file's name says.
        images: folder that image paths are relative to; None for that of each file.
        columns: our name of a column to the file's: {"image": "picture"}.
        allow_image_urls: fetch images given as http or https URLs.
        limit: read at most the first `limit` questions.
        max_left_out: share of unusable questions that is no error, 0 to 1.

    Returns:
        What was written, left out and changed; the same is in import.json, left_out.jsonl and changed.jsonl.

    Raises:
        DataError: the input cannot be read, or more is left out than is allowed.
        RunError: the output folder holds something else, or cannot be written.

    Examples:
        >>> import vlm_sft
        >>> vlm_sft.import_data("questions.txt", "data")
        Traceback (most recent call last):
        vlm_sft.common.errors.DataError: --format is missing, and the name of questions.txt says none
          fix: pass one of trl, llamafactory, msswift, csv, jsonl
    """
    layout = layout_of(Path(source)) if format is None else _known("format", format, FORMATS)
    named = parse_layout_columns(columns_text({"columns": columns}).get("columns"), layout)
    place = Path(images) if images is not None else None
    return carry_out(
        ImportRequest(Path(source), layout, Path(output), place, named, allow_image_urls, limit, max_left_out)
    )


def export_data(
    dataset: str | Path,
    output: str | Path,
    format: str,
    *,
    style: str | None = None,
    split: str = "all",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_left_out: float = MAX_LEFT_OUT_FRACTION,
) -> ExchangeReport:
    """Write a data set for TRL, LLaMA-Factory, ms-swift, or as CSV.

    Args:
        dataset: names and paths as of `--dataset`, without weights.
        output: a new folder.
        format: "trl", "llamafactory", "msswift", "csv" or "jsonl".
        style: of LLaMA-Factory's two layouts, "sharegpt" (the default) or "alpaca".
        split: "train", "validation", "test", or "all".
        columns: what the columns of own data are called: {"image": "picture"}.
        limit: a seeded sample of at most so many questions a split.
        max_left_out: share of unusable questions that is no error, 0 to 1.

    Returns:
        What was written, left out and changed; the same is in export_data.json, left_out.jsonl and changed.jsonl.

    Raises:
        DataError: the data cannot be read, or more is left out than is allowed.
        RunError: the output folder holds something else, or an option would have no effect.
    """
    _known("format", format, FORMATS)
    refuse_idle(SimpleNamespace(format=format), IDLE, [] if style is None else ["style"])
    chosen = _known("style", style or STYLES[0], STYLES)
    request = ExportRequest(format, Path(output), chosen, max_left_out=max_left_out)
    chosen = _known("split", split, ("all", "train", "validation", "test"))
    return export_named(str(dataset), request, chosen, limit, columns_text({"columns": columns}).get("columns"))


def check_data(
    data: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    base_model: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    max_left_out: float = MAX_LEFT_OUT_FRACTION,
    output_dir: str | Path | None = None,
) -> DataCheck:
    """Check data without training: read everything, decode every image, find repeats, write a preview.

    Args:
        data: as of `finetune`: rows, a data set, a frame, a path, names.
        split: "train", "validation", "test", or "all".
        columns: what the columns of own data are called: {"image": "picture"}.
        base_model: also look for images and texts that this model's processor cannot take.
        max_length: with a base model, name the samples of more than so many tokens.
        limit: check a seeded sample of at most so many questions.
        max_left_out: share of unusable questions that is no error, 0 to 1.
        output_dir: where counts and preview go; None for outputs/data_check/NAME-SPLIT.

    Returns:
        Counts, what is left out, repeats, and the place of the preview.

    Raises:
        DataError: the data cannot be read, or more is left out than is allowed.
        RunError: the output folder cannot be written.
    """
    chosen = _known("split", split, ("train", "validation", "test", "all"))
    named = columns_text({"columns": columns}).get("columns")
    folder = None if output_dir is None else Path(output_dir)
    with restored(), tempfile.TemporaryDirectory(prefix="vlm_sft_rows") as rows:
        text = dataset_argument(data, Path(rows) / "rows")
        return carry_out_check(CheckRequest(text, named, chosen, folder, base_model, max_length, limit, max_left_out))


def _known(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of the choices.

    Raises:
        DataError: the value is none of them.
    """
    if value not in choices:
        what = f"--{name} {value} is not one of {', '.join(choices)}"
        raise DataError(what, f"choose one of them{nearest(str(value), choices)}")
    return str(value)
