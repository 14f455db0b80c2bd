"""What a training would cost, from Python: `vlm-sft plan` as a function."""

from __future__ import annotations

import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlm_sft.api.keywords import Recipes, train_options
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument
from vlm_sft.api.views import Table
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import duration, size
from vlm_sft.common.options import checked_options
from vlm_sft.planning.dry_run import plan as plan_training
from vlm_sft.planning.options import HypotheticalData, PlanOptions, TrainOptions
from vlm_sft.planning.plan_report import PlannedRun, plan_facts, schedule_lines

QUANTITIES = (("time", "time_seconds", "s"), ("memory per process", "peak_bytes", "B"), ("disk", "disk_bytes", "B"))
_DEVICE_NAMES = ("gpus", "gpu_type")
_HYPOTHETICAL_NAMES = tuple(item.name for item in fields(HypotheticalData))


class TrainingForecast(Table):
    """Time, memory and disk of a training, with intervals that should cover 90 % of the outcomes.

    Args:
        planned: the run that was forecast, and not started.
    """

    def __init__(self, planned: PlannedRun) -> None:
        self.planned = planned
        rows, cells = [], [["", "forecast", "90 % interval", "what it is made of"]]
        for label, name, unit in QUANTITIES:
            found, show = getattr(planned.forecast, name), duration if unit == "s" else size
            rows.append({"quantity": label, "value": found.value, "low": found.low, "high": found.high, "unit": unit})
            items = sorted(planned.forecast.items[name].items(), key=lambda item: -item[1])
            made = ", ".join(f"{item} {show(value)}" for item, value in items if value > 0)
            cells.append([label, show(found.value), f"{show(found.low)} to {show(found.high)}", made])
        lines = [f"forecast from: {planned.forecast.basis}", *schedule_lines(planned)]
        super().__init__(rows, cells, [*lines, *(f"assumed: {line}" for line in planned.forecast.assumptions)])

    def to_dict(self) -> dict[str, Any]:
        """What `vlm-sft plan --output` writes: recipe, schedule, counts, histograms of tokens, forecast."""
        return plan_facts(self.planned)


def plan(
    data: Any = None,
    *,
    recipe: Recipes = None,
    base_model: str | None = None,
    output_dir: str | Path = "outputs/planned",
    **keywords: Any,
) -> TrainingForecast:
    """Forecast a training on this machine without starting it.

    Args:
        data: as of `finetune`; None with `questions`, which stands for data that does not exist yet.
        recipe, base_model: as of `finetune`.
        output_dir: where the run would go; only the free space of its disk is read.
        **keywords: as of `finetune`; the devices, `gpus` and `gpu_type`; and for data that does not exist `questions`,
            `images`, `image_size` ((width, height) in pixels), `question_tokens`, `answer_tokens`.

    Returns:
        A table of time, memory and disk.

    Raises:
        ForecastError: memory or disk surely do not suffice.
        VlmSftError: a mistake in recipe, data, model or options.

    Examples:
        >>> import vlm_sft
        >>> forecast = vlm_sft.plan(questions=1000, base_model="pocket", recipe="1epoch")
        hypothetical data: ...
        >>> forecast[0]["quantity"], forecast[0]["unit"]
        ('time', 's')
    """
    device = {name: keywords.pop(name) for name in _DEVICE_NAMES if name in keywords}
    imagined = {name: keywords.pop(name) for name in _HYPOTHETICAL_NAMES if name in keywords}
    if (data is None) == ("questions" not in imagined):
        what = "neither data nor questions" if data is None else "data, and questions in its place"
        raise RunError(f"plan is given {what}", "pass data, or questions=N for data that does not exist yet")
    if imagined and data is not None:
        raise RunError(f"{', '.join(imagined)} without questions", "leave it out, or pass questions=N and no data")
    made = keywords | ({"base_model": base_model} if base_model else {})
    with restored(), tempfile.TemporaryDirectory(prefix="vlm_sft_rows") as folder:
        train = train_options(recipe, "", output_dir, made)
        if data is not None:
            train = replace(train, dataset=dataset_argument(data, Path(folder) / "rows"))
        hypothetical = checked_options(HypotheticalData, imagined) if imagined else None
        if hypothetical is not None:
            train = replace(train, dataset=TrainOptions.dataset)
        options = checked_options(PlanOptions, device, train=train, hypothetical=hypothetical)
        return TrainingForecast(plan_training(options))
