"""The results table as Markdown, readable as plain text too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_sft.common import formats
from vlm_sft.common.artifacts import in_markdown
from vlm_sft.common.console import Tone
from vlm_sft.evaluate.compare import TOO_FEW
from vlm_sft.report.collect import parse_results
from vlm_sft.report.records import Benchmark, Score

HEADER = ("benchmark", "n", "base", "tuned", "difference", "time")
DIFFERENCE = HEADER.index("difference")
CUT = "cut (base, tuned)"


def results_table(results: dict[str, Any]) -> str:
    """Render the content of results.json as a Markdown table with aligned columns.

    Accuracies are in percent with their 95 % intervals, the difference (tuned minus base) in percentage points, the
    time is that of both evaluations together. Synthetic benchmarks are called so, splits follow their benchmark. Where
    the limit of tokens ended answers, a column counts them. What a reader has to know of a benchmark (such answers, too
    few questions, questions that were used before) stands below the table.

    Args:
        results: the parsed results.json; what is missing in it is shown as a dash.

    Returns:
        The table, and such lines, without a final newline.
    """
    cells, notes = results_cells(results)
    return "\n\n".join([table(cells), *notes])


def results_cells(results: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The cells of the table of `results_table`, header first, and the lines below it."""
    benchmarks = parse_results(results)
    cut = [note for benchmark in benchmarks for note in benchmark.cut_notes]
    rows: list[tuple[str, ...]] = [(*HEADER, CUT) if cut else HEADER]
    for benchmark in benchmarks:
        own = _rows(benchmark)
        rows += [(*row, _cut(benchmark) if row is own[0] else "") for row in own] if cut else own
    notes = [in_markdown(line) for benchmark in benchmarks for line in benchmark.cautions]
    return rows, [*notes, *cut]


def results_tones(results: dict[str, Any]) -> list[Tone]:
    """The differences of `results_table` that are good or bad news: significant ones."""
    tones, line = [], 2  # below the header and its rule
    for benchmark in parse_results(results):
        own = _rows(benchmark)
        if benchmark.direction != "same":
            tones.append(Tone(line, own[0][DIFFERENCE], benchmark.direction == "better"))
        line += len(own)
    return tones


def table(rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table whose columns are aligned in plain text too; the first column to the left.

    Args:
        rows: of equal length; the first is the header.

    Returns:
        The table without a final newline.
    """
    cells = [[in_markdown(text) for text in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in cells]
    lines.insert(
        1,
        "|"
        + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
        + "|",
    )
    return "\n".join(lines)


def told(score: Score | None) -> str:
    """A cell of the table: percent with the interval; a dash for what was not evaluated."""
    return formats.NOTHING if score is None else score.told


def _rows(benchmark: Benchmark) -> list[tuple[str, ...]]:
    sure = f"({TOO_FEW})" if benchmark.verdict == TOO_FEW else formats.points_interval(benchmark.difference_interval)
    difference = f"{formats.points(benchmark.difference)} {sure}"
    rows: list[tuple[str, ...]] = [
        (
            benchmark.title,
            formats.count(benchmark.n),
            told(benchmark.base),
            told(benchmark.tuned),
            difference.strip(),
            formats.duration(benchmark.seconds),
        )
    ]
    for split in benchmark.splits:
        gain = None if split.base is None or split.tuned is None else split.tuned - split.base
        rows.append(
            (
                f"· {split.name}",
                formats.count(split.n),
                formats.percent(split.base),
                formats.percent(split.tuned),
                formats.points(gain),
                "",
            )
        )
    return rows


def _cut(benchmark: Benchmark) -> str:
    """How many answers of base and tuned the limit of tokens ended."""
    scores = (benchmark.base, benchmark.tuned)
    return ", ".join(formats.NOTHING if score is None else f"{score.cut:,}" for score in scores)


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [cells[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)
    ]
    return "| " + " | ".join(padded) + " |"
