"""What the functions of the API return: tables, a curve and a page, shown in notebooks and terminals."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.formats import percent, percent_interval
from vlm_sft.evaluate.comparison_table import comparison_cells
from vlm_sft.report.markdown import results_cells, table
from vlm_sft.report.records import Best
from vlm_sft.report.svg import Drawing

if TYPE_CHECKING:
    import pandas

PAGE_HEIGHT = 720  # of a report in a notebook, in pixels
_STYLE = "text-align:right;padding:2px 10px;font-variant-numeric:tabular-nums"
# The colours that figures name, readable on a light and on a dark notebook.
_COLOURS = "--line:#9aa5b4;--faint:#9aa5b4;--series-1:#3f7fdf;--series-2:#c8691f;--series-3:#1f9f8e"


class Table(Sequence[dict[str, Any]]):
    """Rows of values that print as a table, in a notebook as HTML.

    Args:
        rows: one dict a row, all with the same keys.
        cells: what is shown: a header, then the texts of each row; the rows themselves by default.
        notes: sentences below the table.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], cells: Sequence[Sequence[str]] = (), notes: Sequence[str] = ()
    ) -> None:
        self.rows = list(rows)
        header = list(self.rows[0]) if self.rows else ["nothing"]
        self._cells = list(cells) or [header, *([_text(row.get(name)) for name in header] for row in self.rows)]
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a pandas frame, one column per value."""
        import pandas

        return pandas.DataFrame(self.rows)

    def __repr__(self) -> str:
        return "\n".join([table(self._cells), *self.notes])

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        header, *body = self._cells
        head = "".join(f"<th style='{_STYLE}'>{html.escape(cell)}</th>" for cell in header)
        rows = ["".join(f"<td style='{_STYLE}'>{html.escape(cell)}</td>" for cell in row) for row in body]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        lines = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{notes}"


def _text(value: Any) -> str:
    """A value in a cell."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class Results(Table):
    """Base against tuned on every benchmark: accuracies (0 to 1) with 95 % intervals, the paired difference, its test.

    Args:
        values: the content of results.json. `results["chartqa"]` is its entry of a benchmark.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.benchmarks: dict[str, dict[str, Any]] = dict(self.values.get("benchmarks", {}))
        cells, notes = results_cells(self.values)
        super().__init__([_result_row(name, entry) for name, entry in self.benchmarks.items()], cells, notes)

    def __getitem__(self, index: Any) -> Any:
        return self.benchmarks[index] if isinstance(index, str) else super().__getitem__(index)


def _result_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One benchmark as one flat row."""
    row = {"benchmark": name, "metric": entry["metric"], "n": entry["n"]}
    for side in ("base", "tuned"):
        low, high = entry[side]["interval"]
        row |= {side: entry[side]["accuracy"], f"{side}_low": low, f"{side}_high": high}
    low, high = entry["difference_interval"]
    row |= {"difference": entry["difference"], "difference_low": low, "difference_high": high}
    row |= {"p_value": entry["p_value"], "verdict": entry["verdict"]}
    for side in ("base", "tuned"):
        row |= {f"{side}_{metric}": value for metric, value in entry[side].get("secondary", {}).items()}
    return row


class Scores(Table):
    """The scores of one model on one or several benchmarks: accuracy from 0 to 1 with its 95 % interval.

    Args:
        values: by benchmark: what `vlm-sft eval` or `vlm-sft score` writes. `scores["chartqa"]` is one of them.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        self.values = {name: dict(entry) for name, entry in values.items()}
        rows, cells = [], [["benchmark", "metric", "n", "accuracy", "95 % interval"]]
        for name, entry in self.values.items():
            low, high = entry["interval"]
            row = {"benchmark": name, "metric": entry["metric"], "n": entry["n"], "accuracy": entry["accuracy"]}
            rows.append({**row, "low": low, "high": high, **entry["secondary"]})
            shown = percent(entry["accuracy"]), percent_interval((low, high))
            cells.append([name, entry["metric"], f"{entry['n']:,}", *shown])
            cells += [["", other, "", percent(value), ""] for other, value in entry["secondary"].items()]
        super().__init__(rows, cells)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index] if isinstance(index, str) else super().__getitem__(index)


class Comparison(Table):
    """A paired comparison of runs on the same questions.

    Args:
        values: the content of compare.json, with every item that changed.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        flat = (str, int, float)
        rows = [
            {key: value for key, value in one.items() if isinstance(value, flat)} for one in self.values["comparisons"]
        ]
        cells, notes = comparison_cells(self.values)
        super().__init__(rows, cells, [f"baseline: {self.values['baseline']}", *notes])


class LossCurve(Table):
    """The losses of a training: a curve in a notebook, rows of step and losses as a table.

    Args:
        rows: the lines of metrics.jsonl that hold a loss.
        best: the step that was kept, where one was chosen.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], best: Best | None) -> None:
        kept = ("step", "epoch", "loss", "eval_loss", "learning_rate")
        super().__init__([{name: row.get(name) for name in kept} for row in rows])
        self.best = best

    @property
    def drawing(self) -> Drawing | None:
        """The figure of the report, None without a logged loss."""
        from vlm_sft.report.figures import loss_drawing

        names = ("loss", "eval_loss")
        series = {
            name: [(int(row["step"]), float(row[name])) for row in self.rows if isinstance(row[name], int | float)]
            for name in names
        }
        return loss_drawing(series, self.best, "notebook")

    def _repr_html_(self) -> str:
        """The curve for a notebook."""
        drawing = self.drawing
        if drawing is None:
            return "<p>no loss was logged</p>"
        return (
            f"<div style='max-width:40rem;--text:currentColor;--quiet:currentColor;{_COLOURS}'>{drawing.markup}</div>"
        )


class ReportPage:
    """A report: a file, and its page inside a notebook.

    Args:
        path: the HTML file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"report: {self.path}"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, where its styles and scripts stay."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return (
            f'<iframe title="report" sandbox="allow-scripts" style="width:100%;height:{PAGE_HEIGHT}px;border:0" '
            f'srcdoc="{page}"></iframe>'
        )
