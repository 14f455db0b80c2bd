"""The result file of the recipe benchmark: what the run folders came to, row by row.

The accuracy of a row is the mean over its seeds; its interval is clustered by image, with the mean over the seeds as a
question's score. Differences are paired by question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS, ROOT, origin, write_record
from recipe_runs import LORA, NOTES, RECIPES, Arm, Settings, base_folder, finished
from vlm_sft.common import artifacts
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.evaluate import statistics
from vlm_sft.evaluate.compare import compare_rows

MEASURED = ROOT / "src" / "vlm_sft" / "forecast" / "measured"  # package data: what `vlm-sft recommend` reads
Predictions = list[dict[str, Any]]  # one benchmark's, each score the mean over the seeds
COMPARED = ("difference", "interval", "p_value", "verdict")
OWN_FACTS = ("device", "world_size", "parallel", "dtype", "versions", "git")
UNMEASURED = (
    "train_questions",
    "questions_seen",
    "steps",
    "wall_seconds",
    "seconds",
    "evaluate_seconds",
    "peak_bytes",
    "disk_bytes",
    *OWN_FACTS,
)


def file_name(kind: str, settings: Settings) -> str:
    """Name of the result file, e.g. recipes-pocket-demo_charts+demo_text.json."""
    data = "+".join(spec.name for spec in parse_datasets(settings.dataset))
    return re.sub(r"[^\w.+-]+", "_", f"{kind}-{settings.base_model}-{data}") + ".json"


def write(kind: str, settings: Settings, arms: Sequence[Arm], note: str | None) -> Path:
    """Write the result file with a note for its readers, and the recipes' also where the package reads it."""
    result, name = collect(kind, settings, arms) | {"note": note}, file_name(kind, settings)
    path = write_record(RESULTS / name, result, covered, settings.work_dir)
    if kind == "recipes" and path.parent == RESULTS:
        artifacts.write_json(MEASURED / name, result)
    return path


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: trainings of each row, the questions they saw, and those of each benchmark."""
    found: dict[str, float] = {}
    for row in result["rows"]:
        name = f"{row['arm']} {row['recipe']} ({row['variant']})"
        found[name] = len(row["seeds"])
        found[f"{name}, questions"] = row.get("questions_seen") or 0
    return found | {f"questions of {name}": one["n"] for name, one in result["base"]["benchmarks"].items()}


def collect(kind: str, settings: Settings, arms: Sequence[Arm]) -> dict[str, Any]:
    """Read the runs into the value of a result file.

    Args:
        kind: "recipes" or "ablation".
        settings: of the benchmark.
        arms: its rows; those without a finished run are there too, and say so.
    """
    base = base_folder(settings)
    scored = (
        {name: artifacts.read_json(base / name / artifacts.RESULTS) for name in settings.benchmarks}
        if finished(base)
        else {}
    )
    runs = [
        [(seed, folder) for seed in settings.seeds if finished(folder := arm.folder(settings.work_dir, seed))]
        for arm in arms
    ]
    rows = [_row(settings, arm, runs[index], _partner(index, arms, runs)) for index, arm in enumerate(arms)]
    counts = [artifacts.read_json(folder / artifacts.RUN)["lora"] for one in runs for _, folder in one]
    return origin() | {
        "kind": kind,
        "settings": {
            "base_model": settings.base_model,
            "base_parameters": counts[0]["total_parameters"] - counts[0]["trainable_parameters"] if counts else None,
            "dataset": settings.dataset,
            "benchmarks": settings.benchmarks,
            "max_train": settings.max_train,
            "max_eval": settings.max_eval,
            "seeds": list(settings.seeds),
            "lora": {
                "r": LORA["lora_r"],
                "alpha": LORA["lora_alpha"],
                "target_modules": str(LORA["target_modules"]).split(","),
            },
        },
        "base": {
            "benchmarks": {
                name: {key: result[key] for key in ("n", "metric", "synthetic", "accuracy", "interval", "seconds")}
                for name, result in scored.items()
            }
        },
        "rows": rows,
    }


Finished = list[tuple[int, Path]]  # seed and folder


def _partner(index: int, arms: Sequence[Arm], runs: Sequence[Finished]) -> tuple[Arm, Finished] | None:
    """What a row is compared with besides the base, where that was run."""
    for other in range(index - 1, -1, -1):
        if runs[other] and arms[index].is_compared_with(arms[other]):
            return arms[other], runs[other]
    return None


def _row(settings: Settings, arm: Arm, runs: Finished, partner: tuple[Arm, Finished] | None) -> dict[str, Any]:
    """One row of the result file."""
    values = arm.values()
    row = {
        "arm": arm.kind,
        "recipe": arm.recipe,
        "recipe_file": RECIPES[arm.recipe],
        "variant": arm.variant,
        "overrides": arm.overrides,
        "dataset": arm.dataset,
        "epochs": values["num_train_epochs"],
        "learning_rate": values["learning_rate"],
        "seeds": [seed for seed, _ in runs],
        "benchmarks": {},
        "interrupted_runs": 0,
        **dict.fromkeys(UNMEASURED),
    }
    if not runs:
        return row
    folders = [folder for _, folder in runs]
    for name in settings.benchmarks:
        row["benchmarks"][name] = _benchmark(settings, name, folders, partner)
    return row | _costs(folders)


def _benchmark(
    settings: Settings, name: str, folders: Sequence[Path], partner: tuple[Arm, Finished] | None
) -> dict[str, Any]:
    """Accuracy on one benchmark, against the base and against the partner."""
    facts = artifacts.read_json(base_folder(settings) / name / artifacts.RESULTS)
    before = list(artifacts.read_jsonl(base_folder(settings) / name / artifacts.PREDICTIONS))
    answers, by_seed = averaged(folders, name)
    scores, images = [row["score"] for row in answers], [statistics.cluster_of(row) for row in answers]
    compared = compare_rows(before, answers)
    previous = None
    if partner:
        arm, runs = partner
        found = compare_rows(averaged([folder for _, folder in runs], name)[0], answers)
        previous = {"recipe": arm.recipe, "variant": arm.variant, **{key: found[key] for key in COMPARED}}
    return {
        "n": len(answers),
        "metric": facts["metric"],
        "synthetic": facts["synthetic"],
        "accuracy": fmean(scores),
        "interval": list(statistics.mean_interval(scores, images)),
        "by_seed": by_seed,
        "difference": compared["difference"],
        "difference_interval": compared["interval"],
        "p_value": compared["p_value"],
        "verdict": compared["verdict"],
        "previous": previous,
    }


def averaged(folders: Sequence[Path], name: str) -> tuple[Predictions, list[float]]:
    """The predictions of several runs on one benchmark as one: each question's score is its mean over the runs.

    Args:
        folders: of the runs.
        name: of the benchmark.

    Returns:
        The predictions of the first run with the mean scores, and the accuracy of each run.
    """
    place = Path(artifacts.EVALUATION_FOLDER) / "tuned" / name / artifacts.PREDICTIONS
    runs = [{row["id"]: row for row in artifacts.read_jsonl(folder / place)} for folder in folders]
    assert all(run.keys() == runs[0].keys() for run in runs), "the runs of one benchmark answer the same questions"
    mean = [row | {"score": fmean(run[key]["score"] for run in runs)} for key, row in runs[0].items()]
    return mean, [fmean(row["score"] for row in run.values()) for run in runs]


def _costs(folders: Sequence[Path]) -> dict[str, Any]:
    """Time, memory and disk of the runs of a row; an interrupted run has no time of its own."""
    runs = [artifacts.read_json(folder / artifacts.RUN) for folder in folders]
    interrupted = [bool(artifacts.read_json(folder / NOTES)["interruptions"]) for folder in folders]
    whole = [run for run, broken in zip(runs, interrupted, strict=True) if not broken]
    first = runs[0]

    def mean(numbers: list[float]) -> float | None:
        return round(fmean(numbers), 3) if numbers else None

    disk = {key: max(run["bytes"][key] for run in runs) for key in ("adapter", "checkpoints", "logs")}
    return {
        "train_questions": artifacts.read_json(folders[0] / artifacts.DATA)["train"]["samples"],
        "questions_seen": first["questions_seen"],
        "steps": first["steps"],
        "wall_seconds": mean([run["wall_seconds"] - run["seconds"]["evaluate"] for run in whole]),
        "seconds": {stage: mean([run["seconds"][stage] for run in whole]) for stage in ("data", "load", "train")},
        "evaluate_seconds": mean([run["seconds"]["evaluate"] for run in whole]),
        "interrupted_runs": sum(interrupted),
        "peak_bytes": max(run["peak_memory_bytes"] for run in runs),
        "disk_bytes": disk | {"total": sum(disk.values())},
        **{key: first[key] for key in OWN_FACTS},
    }
