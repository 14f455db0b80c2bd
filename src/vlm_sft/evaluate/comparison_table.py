"""A comparison as a table for a terminal, as Markdown, and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.artifacts import in_markdown
from vlm_sft.common.console import Tone
from vlm_sft.evaluate import statistics
from vlm_sft.evaluate.compare import TOO_FEW, Row, few_line
from vlm_sft.evaluate.scoring import why_cut

_CHANGES_SHOWN = 10  # of each kind, in the Markdown  # of each kind, in the Markdown


def write_comparison(result: dict[str, Any], output_dir: str | Path) -> tuple[Path, Path]:
    """Write `compare.json` and `compare.md`.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(output_dir)
    return (
        artifacts.write_json(folder / artifacts.COMPARE_JSON, result),
        artifacts.write_text_atomic(folder / artifacts.COMPARE_MARKDOWN, format_markdown(result)),
    )


def format_markdown(result: dict[str, Any]) -> str:
    """Write the whole comparison as Markdown: the table, how to read it, the items that changed."""
    lines = [
        "# Comparison",
        "",
        format_table(result),
        "",
        "Accuracies and differences are in points, with 95 % intervals; questions about one image count as a cluster. "
        "An interval leaves out 0 exactly where its p is below 0.05. The verdict is at the 5 % level after Holm's "
        "correction over all lines. The last column is the smallest true difference that this many items would show in "
        "four cases of five; none: so few images cannot show any.",
    ]
    for c in result["comparisons"]:
        lines += ["", in_markdown(f"## {c['benchmark']}: {c['run']}"), "", f"Test: {c['test']}."]
        lines += _changed_section("Score fell (right → wrong)", c["lost"])
        lines += _changed_section("Score rose (wrong → right)", c["gained"])
    return "\n".join(lines) + "\n"


def format_table(result: dict[str, Any]) -> str:
    """Lay the comparisons out as a table for a person, in points (percent)."""
    (header, *rows), notes = comparison_cells(result)
    first = f"baseline: {in_markdown(result['baseline'])}"
    return "\n".join([first, "", *_table(header, rows), *map(in_markdown, notes)])


def comparison_tones(result: dict[str, Any]) -> list[Tone]:
    """The verdicts of `format_table` that are good or bad news."""
    verdicts = enumerate((c["verdict"] for c in result["comparisons"]), start=4)  # below the baseline and the header
    return [Tone(line, verdict, verdict == "better") for line, verdict in verdicts if verdict in ("better", "worse")]


def comparison_cells(result: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The cells of the table of `format_table`, header first, and the lines below it."""
    header = (
        "benchmark",
        "n",
        "run",
        "baseline",
        "accuracy",
        "difference",
        "p",
        "p (Holm)",
        "verdict",
        "smallest detectable",
    )
    rows = [
        (
            in_markdown(c["benchmark"]),
            f"{c['n']:,}",
            in_markdown(c["run"]),
            _with_interval(c["baseline_accuracy"], c["baseline_interval"]),
            _with_interval(c["accuracy"], c["accuracy_interval"]),
            _with_interval(c["difference"], c["interval"], signed=True),
            f"{c['p_value']:.4f}",
            f"{c['p_holm']:.4f}",
            c["verdict"],
            _detectable(c),
        )
        for c in result["comparisons"]
    ]
    notes = [
        few_line(c["benchmark"], c["n"], c["clusters"], c["difference"], (c["questions_needed"], c["clusters_needed"]))
        for c in result["comparisons"]
        if c["verdict"] == TOO_FEW
    ]
    notes += [
        f"not compared: {missing['benchmark']} (not evaluated in {missing['missing_in']})"
        for missing in result["not_compared"]
    ]
    notes += [
        f"{c['benchmark']}, {who}: {why_cut(count, c['n'], None, None)}"
        for c in result["comparisons"]
        for who, count in (("baseline", c["baseline_cut"]), (c["run"], c["cut"]))
        if count
    ]
    return [header, *rows], notes


def _detectable(comparison: Mapping[str, Any]) -> str:
    """The smallest difference that would be found; "none" where the images are too few to show any."""
    if comparison["clusters"] < statistics.FEWEST_CLUSTERS:
        return "none"
    return _points(comparison["smallest_detectable_difference"])


def _with_interval(value: float, interval: Sequence[float], signed: bool = False) -> str:
    low, high = (_points(bound, signed) for bound in interval)
    return f"{_points(value, signed)} [{low}, {high}]"


def _points(value: float, signed: bool = False) -> str:
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"


def _changed_section(title: str, changes: Sequence[Row]) -> list[str]:
    if not changes:
        return []
    header = ("id", "question", "answers", "baseline", "now")
    rows = [
        tuple(
            in_markdown(str(value))
            for value in (
                change["id"],
                change["question"] or "",
                ", ".join(dict.fromkeys(change["answers"] or [])),
                change["baseline_prediction"],
                change["prediction"],
            )
        )
        for change in changes[:_CHANGES_SHOWN]
    ]
    more = len(changes) - len(rows)
    rest = [f"... and {more:,} more in {artifacts.COMPARE_JSON}"] if more else []
    return ["", f"### {title}: {len(changes):,}", "", *_table(header, rows), *rest]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up, so that it reads well in a terminal too."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    rule = "-|-".join("-" * width for width in widths)
    return [f"| {lines[0]} |", f"|-{rule}-|", *(f"| {line} |" for line in lines[1:])]
