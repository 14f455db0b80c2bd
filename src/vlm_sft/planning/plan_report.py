"""A run that is planned and not started: what is known of it, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.formats import plural
from vlm_sft.data.audit import histogram
from vlm_sft.forecast.calibration import Calibration
from vlm_sft.forecast.estimate import RunForecast
from vlm_sft.forecast.inputs import ForecastInputs
from vlm_sft.planning.forecast_inputs import RunData
from vlm_sft.planning.run_plan import few_steps
from vlm_sft.planning.training_run import TrainingRun


@dataclass(frozen=True)
class PlannedRun:
    """A run that is forecast and not started.

    Attributes:
        run: the run that it would be.
        data: its questions and images.
        inputs, calibration: what the forecast follows from.
        forecast: what it would take.
    """

    run: TrainingRun
    data: RunData
    inputs: ForecastInputs
    calibration: Calibration
    forecast: RunForecast


def schedule_lines(planned: PlannedRun) -> list[str]:
    """Schedule, questions, images and tokens of a plan."""
    data, schedule = planned.data, planned.data.schedule
    evaluations, saves = schedule.evaluation_steps(), schedule.save_steps_list()
    visual, epoch = sorted(filter(None, data.visual)), planned.inputs.passes.epoch
    tokens = sorted(size for group in data.planner.lengths for size in group.questions)
    lines = [
        f"schedule: {plural(schedule.total_steps, 'step')} of {data.planner.global_batch_size} questions "
        f"({schedule.steps_per_epoch:,} per epoch), warmup {schedule.warmup_steps}, {len(evaluations):,} evaluations, "
        f"{len(saves):,} checkpoints of which {planned.inputs.output.saving.kept:,} are kept",
        _data_line(data),
        ("tokens of an image: " + _spread(visual) + "; " if visual else "tokens ")
        + "of a question with its answer: "
        + _spread(tokens),
        f"epoch: {epoch.total.packs:,.0f} packs, {epoch.total.tokens:,.0f} tokens, the largest "
        f"{epoch.largest.tokens:,.0f}",
    ]
    few = few_steps(planned.run.recipe, schedule, data.planner)
    return [*lines, *(f"note: {note}" for note in (*schedule.notes, *([few] if few else [])))]


def _data_line(data: RunData) -> str:
    """Questions, images and text rows of an epoch."""
    groups = list(zip(data.planner.lengths, data.visual, strict=True))
    text = sum(len(group.questions) for group, visual in groups if not visual)
    questions, images = data.planner.questions_per_epoch - text, data.distinct_images
    seen = f"{questions:,} questions on {images:,} images ({questions / images:.2f} each)" if images else ""
    return "data: " + ", ".join(filter(None, [seen, f"{text:,} text rows" if text else ""]))


def _spread(values: Sequence[int]) -> str:
    """Smallest, quartiles and largest."""
    marks = [values[min(len(values) - 1, round(share * (len(values) - 1)))] for share in (0, 0.25, 0.5, 0.75, 1)]
    return " / ".join(f"{value:,}" for value in marks)


def plan_facts(planned: PlannedRun) -> dict[str, Any]:
    """A plan as JSON values: what `--output` writes."""
    schedule, data = planned.data.schedule, planned.data
    return {
        "schema": 1,
        "recipe": planned.run.recipe.to_dict(),
        "schedule": {
            "steps": schedule.total_steps,
            "steps_per_epoch": schedule.steps_per_epoch,
            "warmup_steps": schedule.warmup_steps,
            "evaluations": len(schedule.evaluation_steps()),
            "checkpoints": len(schedule.save_steps_list()),
        },
        "questions": data.planner.questions_per_epoch,
        "images": data.distinct_images,
        "histograms": {
            "image_tokens": histogram([count for count in data.visual if count]),
            "question_tokens": histogram([size for group in data.planner.lengths for size in group.questions]),
        },
        "passes": planned.run.passes.to_dict() if planned.run.passes else None,
        "flops": planned.inputs.flops,
        "forecast": planned.forecast.to_dict(),
    }


def write_plan(planned: PlannedRun, path: Path) -> Path:
    """Write a plan as JSON."""
    return artifacts.write_json(path, plan_facts(planned))
