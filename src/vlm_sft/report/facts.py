"""The facts of a run as label and text, for the tables of a report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from vlm_sft.common import formats
from vlm_sft.report.records import DataPart, RunReport

Rows = list[tuple[str, str]]
RUNNING = "running"
WALL_SO_FAR = "Wall time so far"  # a page that follows the run counts it on


def summary_rows(run: RunReport) -> Rows:
    """What was trained, on what, with which recipe and when."""
    record = run.record
    if record is None:
        return []
    best = record.best
    return _present(
        [
            ("Recipe", record.recipe_name),
            ("Base model", record.base_model),
            ("Adapter", record.adapter),
            ("Data", ", ".join(record.datasets)),
            ("Evaluation loss", _mixture(run)),
            ("Steps", formats.count(record.steps)),
            ("Best checkpoint", f"step {best.step:,} ({best.metric} {formats.number(best.value)})" if best else ""),
            ("Stopped early", record.stopped_early),
            ("Started", record.started),
            ("Finished", record.finished),
            (WALL_SO_FAR if run.status == RUNNING else "Wall time", formats.duration(record.wall_seconds)),
        ]
    )


def _mixture(run: RunReport) -> str:
    """What several data sets count in the evaluation loss; "" of a single one."""
    shares = run.record.loss_shares if run.record else {}
    asked = run.data.eval.by_dataset if run.data and run.data.eval else {}
    total = sum(share for name, share in shares.items() if name in asked)
    if len(asked) < 2 or not total:
        return ""
    told = ", ".join(f"{name} {formats.percent(share / total)}" for name, share in shares.items() if name in asked)
    return f"data sets count as in the training loss: {told}"


def cost_rows(run: RunReport) -> Rows:
    """Time, memory and disk."""
    record = run.record
    if record is None:
        return []
    train_seconds = record.seconds.get("train")
    speed = record.questions_seen / train_seconds if record.questions_seen and train_seconds else None
    return _present(
        [
            (WALL_SO_FAR if run.status == RUNNING else "Wall time", formats.duration(record.wall_seconds)),
            *((f"Time: {name}", formats.duration(value)) for name, value in record.seconds.items()),
            ("Questions seen", formats.count(record.questions_seen)),
            ("Training speed", "" if speed is None else f"{formats.number(speed)} questions/s"),
            ("Peak memory", formats.size(record.peak_memory_bytes)),
            *((f"Disk: {name}", formats.size(value)) for name, value in record.bytes.items()),
        ]
    )


def forecast_rows(run: RunReport) -> list[tuple[str, ...]]:
    """Quantity, forecast, range, actual, relative error, whether the actual value lies within the range."""
    if run.record is None:
        return []
    return [
        (
            one.label,
            one.text(one.value),
            formats.NOTHING if one.interval is None else " to ".join(one.text(end) for end in one.interval),
            one.text(one.actual),
            formats.typeset(formats.relative(one.error)),
            {True: "within", False: "outside", None: formats.NOTHING}[one.held],
        )
        for one in run.record.forecasts
    ]


def forecast_items(run: RunReport) -> Rows:
    """What the forecasts are made of."""
    if run.record is None:
        return []
    return [
        (f"{one.label}: {name}", one.text(value)) for one in run.record.forecasts for name, value in one.items.items()
    ]


def parameter_differences(runs: Sequence[RunReport]) -> tuple[list[str], list[tuple[str, list[str]]], int]:
    """What was set differently between runs.

    Returns:
        The names of the parameters that differ; (run name, its values); how many recipe keys are the same in all.
    """
    settings = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    differing = [key for key in keys if len({values.get(key, formats.NOTHING) for values in settings}) > 1]
    rows = [
        (run.name, [values.get(key, formats.NOTHING) for key in differing])
        for run, values in zip(runs, settings, strict=True)
    ]
    return differing, rows, len(keys) - len(differing)


def _settings(run: RunReport) -> dict[str, str]:
    record = run.record
    about = (
        {}
        if record is None
        else {
            "base model": record.base_model,
            "data": ", ".join(record.datasets),
            "device": record.device,
            "processes": formats.count(record.world_size),
            "parallel": record.parallel,
            "data type": record.dtype,
        }
    )
    return {**about, **run.recipe}


def environment_rows(run: RunReport) -> Rows:
    """Device, parallelism, adapter, versions and hashes."""
    record = run.record
    rows: Rows = []
    if record is not None:
        state = {True: " with uncommitted changes", False: "", None: ""}[record.git_dirty]
        rows = [
            ("Command", shlex.join(record.command)),
            ("Device", record.device),
            ("Processes", formats.count(record.world_size)),
            ("Parallel", record.parallel),
            ("Attention", record.attention),
            ("Data type", record.dtype),
            ("Trained parameters", _trained(record.trainable_parameters, record.total_parameters)),
            *(
                (f"LoRA: {key}", value)
                for key, value in record.lora.items()
                if not key.endswith("_parameters") and key != "modules"
            ),
            ("Git commit", record.git_hash and record.git_hash + state),
            *((f"Version: {name}", version) for name, version in sorted(record.versions.items())),
        ]
    return _present([*rows, *((f"SHA-256: {name}", digest) for name, digest in run.checksums.items())])


def _trained(trainable: int | None, total: int | None) -> str:
    if not trainable or not total:
        return formats.count(trainable)
    return f"{trainable:,} of {total:,} ({100 * trainable / total:.2g} %)"


def data_rows(run: RunReport) -> list[tuple[str, str, str]]:
    """Label, training part, evaluation part."""
    if run.data is None:
        return []
    columns: list[tuple[str, Callable[[DataPart], str]]] = [
        ("Questions", lambda part: formats.count(part.samples)),
        ("Images", lambda part: formats.count(part.images)),
        ("Questions per image", _sharing),
        ("Answer tokens (supervised)", lambda part: formats.count(part.supervised_tokens)),
        ("Image tokens", lambda part: formats.count(part.image_tokens)),
        ("Prompt tokens", lambda part: formats.count(part.prompt_tokens)),
        ("Questions by data set", _by_dataset),
    ]
    parts = (run.data.train, run.data.eval)
    rows = [(label, *(formats.NOTHING if part is None else show(part) for part in parts)) for label, show in columns]
    return [(label, train, evaluation) for label, train, evaluation in rows]


def _sharing(part: DataPart) -> str:
    """Mean number of questions an image, and how many images carry 1, 2, … of them."""
    if not part.questions_per_image or not part.samples or not part.images:
        return formats.NOTHING
    counts = sorted(((_whole(key), value) for key, value in part.questions_per_image.items()), key=lambda pair: pair[0])
    listed = [f"{k:,} on {formats.count(n)}" for k, n in counts[:6]]
    if len(counts) > 6:
        listed.append(f"more on {formats.count(sum(n for _, n in counts[6:]))}")
    shown = sum(k * (n or 0) for k, n in counts)
    return f"mean {shown / part.images:.2f} ({', '.join(listed)})"


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _by_dataset(part: DataPart) -> str:
    return (
        ", ".join(
            f"{name}{' (synthetic)' if name in part.synthetic else ''} {formats.count(value)}"
            for name, value in part.by_dataset.items()
        )
        or formats.NOTHING
    )


def _present(rows: Rows) -> Rows:
    """Leave out what is not known."""
    return [(label, text) for label, text in rows if text and text != formats.NOTHING]
