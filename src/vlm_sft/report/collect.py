"""Reads the artifacts of run folders into dataclasses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.report.evaluation import answers_of, benchmark_folders, one_model
from vlm_sft.report.fields import Fields, finite
from vlm_sft.report.predictions import read_predictions
from vlm_sft.report.records import (
    PLOTTABLE,
    QUANTITIES,
    Benchmark,
    Best,
    DataFacts,
    DataPart,
    Forecast,
    GuardStep,
    Histogram,
    LeftOutRow,
    RunRecord,
    RunReport,
    Score,
    SplitScore,
)

SCHEMA = 1


def collect_runs(folders: Sequence[Path]) -> list[RunReport]:
    """Read the artifacts of every run folder; a folder given twice is read once.

    Raises:
        RunError: a folder does not exist or holds no artifact of a run; all such folders are named together.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    mistakes = [mistake for folder in unique if (mistake := _not_a_run(folder))]
    if mistakes or not unique:
        raise RunError(
            "; ".join(mistakes) or "no run folder was given",
            f"pass the --output_dir of a training run: a folder with {artifacts.RUN}",
        )
    return [_collect(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist"
    traces = (artifacts.RUN, artifacts.RECIPE, artifacts.DATA, artifacts.METRICS, artifacts.RESULTS)
    return "" if any((folder / name).exists() for name in traces) else f"{folder} holds no run"


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [[part for part in folder.resolve().parts if part != folder.resolve().anchor] for folder in folders]
    names = [str(folder) for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _collect(folder: Path, name: str) -> RunReport:
    report = RunReport(folder, name)
    problems = report.problems
    if (fields := _read_object(folder / artifacts.RUN, problems)) is not None:
        report.record = _parse_run(fields)
    if (fields := _read_object(folder / artifacts.RECIPE, problems)) is not None:
        report.recipe = fields.plain()
    if (fields := _read_object(folder / artifacts.DATA, problems)) is not None:
        report.data = _parse_data(fields)
    if (fields := _read_object(folder / artifacts.RESULTS, problems)) is not None:
        report.benchmarks = _parse_benchmarks(fields)
    rows = _read_lines(folder / artifacts.LEFT_OUT, problems)
    report.left_out = tuple(LeftOutRow(row.text("id"), row.text("reason"), row.text("detail")) for row in rows)
    report.series = _read_series(folder / artifacts.METRICS, problems)
    if (fields := _read_object(folder / artifacts.GUARD, problems)) is not None:
        report.guard = tuple(_parse_guard(fields))
    report.predictions = read_predictions(folder, problems)
    _read_evaluation(report)
    for file in (artifacts.RECIPE, artifacts.DATA, artifacts.RESULTS, artifacts.ADAPTER_WEIGHTS):
        if (folder / file).is_file():
            with (folder / file).open("rb") as stream:
                report.checksums[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return report


def _read_evaluation(report: RunReport) -> None:
    """What `vlm-sft eval` wrote, where the folder is not that of a training."""
    folders = [] if report.benchmarks or report.predictions or report.recipe else benchmark_folders(report.folder)
    tuned = bool(report.record and report.record.adapter)
    for folder in folders:
        if (fields := _read_object(folder / artifacts.RESULTS, report.problems)) is not None:
            report.benchmarks += (one_model(folder.name, fields, tuned),)
        report.predictions += tuple(answers_of(folder, tuned, report.problems))
    report.is_evaluation = bool(folders)


def _read_object(path: Path, problems: list[str]) -> Fields | None:
    if not path.exists():
        return None
    try:
        value = artifacts.read_json(path)
    except RunError as error:
        problems.append(error.what)
        return None
    fields = Fields(value, path.name, problems)
    if (schema := fields.whole("schema")) is not None and schema > SCHEMA:
        problems.append(f"{path.name} has schema {schema}, this program knows {SCHEMA}: newer fields are not shown")
    return fields


def _read_lines(path: Path, problems: list[str]) -> list[Fields]:
    rows: list[Fields] = []
    if path.exists():
        try:
            for number, row in enumerate(artifacts.read_jsonl(path), start=1):
                rows.append(Fields(row, f"{path.name} row {number}", problems))
        except (RunError, OSError, UnicodeDecodeError) as error:
            problems.append(f"{path.name}: {getattr(error, 'what', error)}")
    return rows


def _read_series(path: Path, problems: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Every numeric column of metrics.jsonl by step; a step logged twice (after a resume) keeps its last value."""
    columns: dict[str, dict[int, float]] = {}
    for row in _read_lines(path, problems):
        step = row.whole("step")
        for key, value in row.values().items():
            number = finite(value)
            if key != "step" and step is not None and number is not None and max(abs(step), abs(number)) < PLOTTABLE:
                columns.setdefault(key, {})[step] = number
    return {key: sorted(column.items()) for key, column in columns.items()}


def _parse_run(fields: Fields) -> RunRecord:
    best, lora, git = fields.inside("best"), fields.inside("lora"), fields.inside("git")
    best_step = best.whole("step")
    forecast = fields.inside("forecast")
    return RunRecord(
        status=fields.text("status"),
        command=fields.texts("command"),
        started=fields.text("started"),
        finished=fields.text("finished"),
        wall_seconds=fields.number("wall_seconds"),
        seconds=fields.numbers("seconds"),
        output_dir=fields.text("output_dir"),
        base_model=fields.text("base_model"),
        adapter=fields.text("adapter"),
        datasets=fields.texts("datasets"),
        device=fields.text("device"),
        world_size=fields.whole("world_size"),
        parallel=fields.text("parallel"),
        attention=fields.text("attention"),
        dtype=fields.text("dtype"),
        lora=lora.plain(),
        trainable_parameters=lora.whole("trainable_parameters"),
        total_parameters=lora.whole("total_parameters"),
        steps=fields.whole("steps"),
        loss_shares=fields.numbers("loss_shares"),
        planned_steps=fields.inside("schedule").whole("steps"),
        questions_seen=fields.whole("questions_seen"),
        best=None if best_step is None else Best(best_step, best.text("metric"), best.number("value")),
        stopped_early=fields.inside("stopped_early").text("reason"),
        bytes=fields.numbers("bytes"),
        peak_memory_bytes=fields.whole("peak_memory_bytes"),
        versions=fields.inside("versions").plain(),
        git_hash=git.text("hash"),
        git_dirty=git.flag("dirty"),
        notes=fields.texts("notes"),
        forecasts=tuple(_parse_forecast(forecast)),
        forecast_basis=forecast.text("basis"),
        forecast_assumptions=forecast.texts("assumptions"),
    )


def _parse_forecast(fields: Fields) -> Iterator[Forecast]:
    items, actual = fields.inside("items"), fields.inside("actual")
    for quantity in QUANTITIES:
        if not fields.given(quantity):
            continue
        inner = fields.inside(quantity)
        low, high = inner.number("low"), inner.number("high")
        yield Forecast(
            quantity,
            inner.number("value"),
            None if low is None or high is None else (low, high),
            actual.number(quantity),
            items.numbers(quantity),
        )


def _parse_guard(fields: Fields) -> Iterator[GuardStep]:
    for evaluation in fields.entries("evaluations"):
        step = evaluation.whole("step")
        for guard in evaluation.entries("guards"):
            base, score, allowed = (guard.number(key) for key in ("base", "score", "allowed_points"))
            if step is None or base is None or score is None or allowed is None or abs(step) >= PLOTTABLE:
                continue
            if max(abs(base), abs(score), abs(allowed)) < PLOTTABLE:
                kept = guard.flag("qualifies")
                yield GuardStep(step, guard.text("benchmark"), base, score, base - allowed / 100, kept is not False)


def _parse_data(fields: Fields) -> DataFacts:
    parts = {key: _parse_data_part(fields.inside(key)) if fields.given(key) else None for key in ("train", "eval")}
    return DataFacts(parts["train"], parts["eval"], fields.numbers("left_out"))


def _parse_data_part(fields: Fields) -> DataPart:
    return DataPart(
        samples=fields.whole("samples"),
        images=fields.whole("images"),
        supervised_tokens=fields.whole("supervised_tokens"),
        image_tokens=fields.whole("image_tokens"),
        prompt_tokens=fields.whole("prompt_tokens"),
        questions_per_image=fields.numbers("questions_per_image"),
        by_dataset=fields.numbers("by_dataset"),
        synthetic=fields.texts("synthetic"),
        token_histograms={
            name: found
            for name, inner in fields.inside("token_histograms").objects()
            if (found := _parse_histogram(inner)) is not None
        },
    )


def _parse_histogram(fields: Fields) -> Histogram | None:
    """A histogram that can be drawn: rising edges, one more than the counts."""
    edges, counts = fields.series("edges"), fields.series("counts")
    rising = all(low < high for low, high in pairwise(edges))
    if not counts or len(edges) != len(counts) + 1 or not rising or max(map(abs, edges + counts)) >= PLOTTABLE:
        return None
    return Histogram(edges, counts)


def parse_results(results: dict[str, Any], problems: list[str] | None = None) -> tuple[Benchmark, ...]:
    """Read the content of results.json.

    Args:
        results: the parsed file.
        problems: receives a message for every value of a wrong type.
    """
    return _parse_benchmarks(Fields(results, artifacts.RESULTS, [] if problems is None else problems))


def _parse_benchmarks(fields: Fields) -> tuple[Benchmark, ...]:
    return tuple(_parse_benchmark(name, inner) for name, inner in fields.inside("benchmarks").objects())


def _parse_benchmark(name: str, fields: Fields) -> Benchmark:
    splits = fields.inside("splits").objects()
    return Benchmark(
        name=name,
        n=fields.whole("n"),
        metric=fields.text("metric"),
        synthetic=bool(fields.flag("synthetic")),
        base=_parse_score(fields, "base"),
        tuned=_parse_score(fields, "tuned"),
        difference=fields.number("difference"),
        difference_interval=fields.interval("difference_interval"),
        p_value=fields.number("p_value"),
        verdict=fields.text("verdict"),
        splits=tuple(
            SplitScore(split, one.whole("n"), one.number("base"), one.number("tuned")) for split, one in splits
        ),
        clusters=fields.whole("clusters"),
        needed=_parse_needed(fields),
        also_chose=fields.whole("also_chose") or 0,
        also_trained=fields.whole("also_trained") or 0,
        max_new_tokens=fields.whole("max_new_tokens"),
        answer_tokens=fields.whole("answer_tokens"),
    )


def _parse_needed(fields: Fields) -> tuple[int, int] | None:
    questions, clusters = fields.whole("questions_needed"), fields.whole("clusters_needed")
    return None if questions is None or clusters is None else (questions, clusters)


def _parse_score(fields: Fields, side: str) -> Score | None:
    if not fields.given(side):
        return None
    inner = fields.inside(side)
    return Score(inner.number("accuracy"), inner.interval("interval"), inner.number("seconds"), inner.whole("cut") or 0)


def benchmark_names(runs: Iterable[RunReport]) -> list[str]:
    """Names of all benchmarks of the runs, in the order of their first appearance."""
    return list(dict.fromkeys(benchmark.name for run in runs for benchmark in run.benchmarks))
