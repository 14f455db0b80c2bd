"""Renders runs as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vlm_sft.common import artifacts, formats
from vlm_sft.common.errors import RunError
from vlm_sft.report import comparison, facts, figures, quality
from vlm_sft.report.browser import browser
from vlm_sft.report.collect import benchmark_names, collect_runs
from vlm_sft.report.live import LiveView, live_view
from vlm_sft.report.outcome import claims_of, summarize
from vlm_sft.report.predictions import NEAR, OUTCOMES, tally, tally_near
from vlm_sft.report.records import Benchmark, RunReport
from vlm_sft.report.svg import Drawing

LEFT_OUT_SHOWN = 20
_MOMENT = r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)"
RUNS_WITH_FIGURES = 12  # beyond, the figures that compare runs have to do: each run has several of its own


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as the template shows it."""

    key: str
    run: RunReport
    accuracy: Drawing | None
    curves: list[Drawing]
    histograms: list[Drawing]
    forecast: Drawing | None
    forecast_rows: list[tuple[str, ...]]
    forecast_items: facts.Rows
    summary: facts.Rows
    cost: facts.Rows
    data: list[tuple[str, str, str]]
    environment: facts.Rows
    since: str
    live: LiveView | None


@dataclass(frozen=True, slots=True)
class Settings:
    """What a sweep says of its settings, above the runs that are its trials.

    Attributes:
        title: of the table.
        cells: its header and rows.
        choice: which setting to take, with its figure; it stands in place of a choice among the runs.
    """

    title: str
    cells: Sequence[Sequence[str]]
    choice: quality.Choice


def write_report(run_folders: list[Path], output: Path, settings: Settings | None = None) -> Path:
    """Render the artifacts of one or several runs as one self-contained HTML file.

    The page depends on the artifacts alone: equal artifacts give equal bytes. What a run lacks is named in the page.

    Args:
        run_folders: output folders of training runs, finished or not.
        output: the file to write; it has to end in .html or .htm.
        settings: of a sweep.

    Returns:
        The path of the file.

    Raises:
        RunError: a folder is no run (all of them are named), or the file cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise RunError(
            f"a report cannot be written to {output}", "name a file that ends in .html, such as --output report.html"
        )
    runs = collect_runs([Path(folder) for folder in run_folders])
    return artifacts.write_text_atomic(output, render(runs, settings=settings))


def render(
    runs: Sequence[RunReport],
    version: str | None = None,
    changed: float = 0.0,
    frame: str = "",
    settings: Settings | None = None,
) -> str:
    """Render collected runs as one HTML page.

    Args:
        runs: at least one run, as `collect_runs` returns them.
        version: of a page that is served and loads itself anew when `/version` says something else; None for a file.
        changed: of such a page: when a file of the runs was written last, in seconds since 1970.
        frame: of such a page: the version of all but what a training adds at each step.
        settings: of a sweep.

    Returns:
        The page. It holds no address other than data and anchors; the only scripts that a browser will run in it are
        its own, named by their hash in its content security policy.
    """
    many = len(runs) > 1
    names = benchmark_names(runs)
    choices = [settings.choice] if settings else quality.choices(runs, names) if many else []
    leading = [one.name for choice in choices for one in choice.candidates if one.on_front and not one.is_base]
    tallies = [(run.name, name, counts) for run in runs for name, counts in tally(run.predictions).items()]
    near = {(run.name, name): n for run in runs for name, n in tally_near(run.predictions).items()}
    outcome = None if many else summarize(runs[0])
    scripts = [_script("report.js"), *([_script("watch.js")] if version is not None else [])]
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=f"sweep of {len(runs)} trials" if settings else f"{len(runs)} runs" if many else runs[0].name,
            settings=settings,
            views=[
                _view(run, f"run{number}", len(runs), version is not None) for number, run in enumerate(runs, start=1)
            ],
            comparison=_comparison(runs, names) if many else {},
            choices=choices,
            overlays=comparison.overlays(runs, list(dict.fromkeys(leading))) if many else [],
            differences=facts.parameter_differences(runs) if many else ([], [], 0),
            browser=browser(runs),
            tallies=tallies,
            near=near,
            near_label=NEAR,
            outcome=outcome,
            claims=outcome.claims if outcome else _claims(runs, choices, settings),
            outcomes=[one for one in OUTCOMES if any(one in counts for _, _, counts in tallies)],
            left_out_shown=LEFT_OUT_SHOWN,
            runs_with_figures=RUNS_WITH_FIGURES,
            scripts=scripts,
            hashes=[_hash(script) for script in scripts],
            version=version,
            changed=changed,
            frame=frame,
            running=any(run.status == facts.RUNNING for run in runs),
            so_far=facts.WALL_SO_FAR,
        )
    )
    return _clean(page)


def _environment() -> Environment:
    """The templates, and how they write numbers and texts."""
    environment = Environment(
        loader=PackageLoader("vlm_sft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=formats.percent,
        percent_interval=formats.percent_interval,
        points=lambda value: formats.typeset(formats.points(value)),
        points_interval=lambda ends: formats.typeset(formats.points_interval(ends)),
        p_value=formats.p_value,
        count=formats.count,
        duration=formats.duration,
        size=formats.size,
        shorten=formats.shorten,
        number=formats.number,
        markup=Markup,
        typeset=formats.typeset,
        inline=_inline,
        moment=_moment,
    )
    return environment


def _inline(text: str) -> Markup:
    """A text whose command line flags stay whole where a line breaks, and whose moments are dates."""
    flags = re.sub(r"(?<!\S)--\w[\w-]*", r'<span class="flag">\g<0></span>', str(escape(text)))
    return Markup(re.sub(_MOMENT, lambda found: _moment(found[0]), flags))


def _moment(text: str) -> Markup:
    """A recorded moment, which the page's script shows in the reader's own time zone."""
    shown, exact = escape(formats.moment(text)), escape(text)
    return Markup('<time datetime="{}">{}</time>').format(exact, shown)


def _view(run: RunReport, key: str, number_of_runs: int, served: bool) -> RunView:
    drawn = number_of_runs <= RUNS_WITH_FIGURES
    record = run.record
    curves = (
        (
            figures.loss_drawing(run.series, record.best if record else None, key),
            figures.metric_drawing(run.series, key),
            figures.guard_drawing(run.guard, key),
            figures.learning_rate_drawing(run.series, key),
            figures.gradient_drawing(run.series, key),
        )
        if drawn
        else ()
    )
    running = served and record is not None and run.status == facts.RUNNING
    shown = [drawing for drawing in curves if drawing is not None]
    return RunView(
        key=key,
        run=run,
        accuracy=figures.accuracy_drawing(run.benchmarks, key) if drawn else None,
        curves=[] if running else shown,
        histograms=figures.data_drawings(run.data.train if run.data else None, key) if drawn else [],
        forecast=figures.forecast_drawing(record.forecasts if record else (), key) if drawn else None,
        forecast_rows=facts.forecast_rows(run),
        forecast_items=facts.forecast_items(run),
        summary=facts.summary_rows(run),
        cost=facts.cost_rows(run),
        data=facts.data_rows(run),
        environment=facts.environment_rows(run),
        since=record.started if record and running else "",
        live=live_view(run, shown) if running else None,
    )


def _claims(
    runs: Sequence[RunReport], choices: Sequence[quality.Choice], settings: Settings | None
) -> list[tuple[str, str, str]]:
    """Whether fine-tuning helped, on each benchmark by the run that is recommended or else answers best.

    Of a sweep: which setting is recommended.
    """
    if settings:
        chosen = settings.choice.recommended
        return [("Recommended", "same", chosen.name)] if chosen else []
    told: list[tuple[str, str, str]] = []
    for choice in choices:
        trained = [one for one in choice.candidates if not one.is_base]
        best = max(trained, key=lambda one: (one is choice.recommended, one.accuracy))
        rows = [row for run in runs if run.name == best.name for row in run.benchmarks if row.name == choice.benchmark]
        told += claims_of(rows, best.name)
    return told


def _comparison(
    runs: Sequence[RunReport], names: Sequence[str]
) -> dict[str, list[tuple[str, RunReport, Benchmark | None]]]:
    """Benchmark name to (key of the run in the page, run, its row), with a place for every run that lacks it."""
    return {
        name: [
            (f"run{number}", run, next((one for one in run.benchmarks if one.name == name), None))
            for number, run in enumerate(runs, start=1)
        ]
        for name in names
    }


def _script(name: str) -> str:
    """A script of this package, as it stands between its tags."""
    return "\n" + resources.files("vlm_sft.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's name in a content security policy: browsers run no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _clean(page: str) -> str:
    """Replace what is no text in HTML: control characters, and halves of surrogate pairs that JSON may carry."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", page)
