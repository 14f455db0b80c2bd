"""Figures and tables of a report as files for papers: SVG, PNG, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.common import artifacts, formats
from vlm_sft.common.console import progress
from vlm_sft.common.errors import RunError
from vlm_sft.report import comparison, facts, figures, quality, svg
from vlm_sft.report.collect import benchmark_names, collect_runs
from vlm_sft.report.markdown import table
from vlm_sft.report.records import RunReport, Score

Cell = str | float | None
Table = list[list[Cell]]  # the first row is the header; numbers keep every digit


def export(run_folders: Sequence[Path], folder: Path) -> list[Path]:
    """Write the figures and tables of a report as files.

    Args:
        run_folders: output folders of training runs.
        folder: where the files are written; made when missing. Files of the same names are replaced.

    Returns:
        The files: tables as CSV with full precision and as Markdown to read, figures as SVG and as PNG with 300 dots
        per inch.

    Raises:
        RunError: a folder is no run, or a file cannot be written.
    """
    runs = collect_runs(run_folders)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a folder", "name a folder for --export; it is made when missing")
    choices = quality.choices(runs, benchmark_names(runs))
    written = []
    for name, rows in _tables(runs, choices).items():
        if len(rows) > 1:
            written.append(artifacts.write_text_atomic(folder / f"{name}.csv", as_csv(rows)))
            written.append(artifacts.write_text_atomic(folder / f"{name}.md", as_markdown(rows)))
    curves = _training(runs)
    if len(curves) > 1:
        written.append(artifacts.write_text_atomic(folder / "training.csv", as_csv(curves)))
    drawings = _drawings(runs, choices)
    with progress(len(drawings), "drawing", "figures") as bar:
        for name, drawing in drawings.items():
            for ending, data in svg.files(drawing).items():
                path = folder / f"{name}.{ending}"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    artifacts.write_bytes_atomic(path, data)
                except OSError as error:
                    raise RunError(f"cannot write {path}: {error.strerror}", "choose another --export") from error
                written.append(path)
            bar.advance()
    return written


def _drawings(runs: Sequence[RunReport], choices: Sequence[quality.Choice]) -> dict[str, svg.Drawing]:
    """Every figure by the name of its file."""
    found: dict[str, svg.Drawing | None] = {}
    for choice in choices:
        found[f"quality_time_{_file_name(choice.benchmark)}"] = choice.drawing
    if len(runs) > 1:
        leading = [one.name for choice in choices for one in choice.candidates if one.on_front]
        found |= {f"runs_{_file_name(one.title)}": one for one in comparison.overlays(runs, leading)}
    for place, run in enumerate(runs, start=1):
        prefix = f"{place:03d}_{_file_name(run.name)}_" if len(runs) > 1 else ""
        best = run.record.best if run.record else None
        for drawing in (
            figures.accuracy_drawing(run.benchmarks, "export"),
            figures.loss_drawing(run.series, best, "export"),
            figures.metric_drawing(run.series, "export"),
            figures.guard_drawing(run.guard, "export"),
            figures.forecast_drawing(run.record.forecasts if run.record else (), "export"),
        ):
            if drawing is not None:
                found[prefix + _file_name(drawing.title)] = drawing
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _file_name(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower()[:60] or "unnamed"


def _tables(runs: Sequence[RunReport], choices: Sequence[quality.Choice]) -> dict[str, Table]:
    differing, rows, _ = facts.parameter_differences(runs)

    def cells(name: str, values: Sequence[str]) -> list[Cell]:
        return [name, *values]

    return {
        "results": _results(runs),
        "quality_time": _quality(choices),
        "forecast": _forecasts(runs),
        "parameters": [["run", *differing], *(cells(name, values) for name, values in rows)] if differing else [],
    }


def _results(runs: Sequence[RunReport]) -> Table:
    """Accuracies and differences as fractions, splits on lines of their own."""
    ends = ("", "_low", "_high")
    scores = [f"{name}{end}" for name in ("base", "tuned", "difference") for end in ends]
    rows: Table = [["run", "benchmark", "split", "synthetic", "n", *scores, "p_value", "verdict"]]
    for run in runs:
        for one in run.benchmarks:
            synthetic = "yes" if one.synthetic else "no"
            difference = [one.difference, *(one.difference_interval or (None, None))]
            counted = [*_score(one.base), *_score(one.tuned), *difference]
            rows.append([run.name, one.name, "", synthetic, one.n, *counted, one.p_value, one.verdict])
            for split in one.splits:
                gain = None if split.base is None or split.tuned is None else split.tuned - split.base
                alone = [cell for value in (split.base, split.tuned, gain) for cell in (value, None, None)]
                rows.append([run.name, one.name, split.name, synthetic, split.n, *alone, None, ""])
    return rows


def _score(score: Score | None) -> list[Cell]:
    if score is None:
        return [None, None, None]
    return [score.accuracy, *(score.interval or (None, None))]


def _quality(choices: Sequence[quality.Choice]) -> Table:
    rows: Table = [["benchmark", "candidate", "training_seconds", "accuracy", "low", "high", "on_front", "recommended"]]
    for choice in choices:
        for one in choice.candidates:
            rows.append(
                [
                    choice.benchmark,
                    one.name,
                    one.seconds,
                    one.accuracy,
                    *(one.interval or (None, None)),
                    "yes" if one.on_front else "no",
                    "yes" if one is choice.recommended else "no",
                ]
            )
    return rows


def _forecasts(runs: Sequence[RunReport]) -> Table:
    rows: Table = [["run", "quantity", "forecast", "low", "high", "actual", "relative_error"]]
    for run in runs:
        for one in run.record.forecasts if run.record else ():
            rows.append([run.name, one.quantity, one.value, *(one.interval or (None, None)), one.actual, one.error])
    return rows


def _training(runs: Sequence[RunReport]) -> Table:
    """Every logged value on a line of its own."""
    rows: Table = [["run", "metric", "step", "value"]]
    for run in runs:
        for metric, points in run.series.items():
            rows += [[run.name, metric, step, value] for step, value in points]
    return rows


def as_csv(rows: Table) -> str:
    """A table as CSV; a text that a spreadsheet would take for a formula is quoted with an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_plain(cell) if isinstance(cell, str) else cell for cell in row])
    return buffer.getvalue()


def _plain(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")
    return f"'{text}" if artifacts.is_formula(text) else text


def as_markdown(rows: Table) -> str:
    """A table as Markdown with aligned columns and four significant digits."""
    return table([[_shown(cell) for cell in row] for row in rows]) + "\n"


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell.encode("utf-8", "replace").decode("utf-8")
    return formats.number(cell) if isinstance(cell, float) else str(cell)
