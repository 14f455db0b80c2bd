"""What a training would cost, from Python: `vlm-sft plan` as a function."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_sft.api.keywords import Recipes, train_options
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument
from vlm_sft.api.views import Table
from vlm_sft.common.errors import RunError
from vlm_sft.common.formats import duration, size
from vlm_sft.common.idle import given_names, refuse_idle
from vlm_sft.common.options import checked_options
from vlm_sft.forecast.recommend import PRIORITIES
from vlm_sft.planning.dry_run import plan as plan_training
from vlm_sft.planning.options import PLAN_IDLE, HypotheticalData, PlanOptions, TrainOptions
from vlm_sft.planning.plan_report import PlannedRun, plan_facts, schedule_lines
from vlm_sft.planning.recommendation import Advice, advise

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


class RecipeAdvice(Table):
    """The recipes with their forecasts, and which one to take.

    Args:
        advice: what was found.

    Attributes:
        chosen: the name of the recipe to take; None where none is affordable.
        reasons: why.
        command: the command line that starts it; "" without one.
    """

    def __init__(self, advice: Advice) -> None:
        choice = advice.recommendation
        self.chosen, self.reasons, self.command = choice.chosen, tuple(choice.reasons), advice.launch
        rows = [
            {
                "recipe": one.name,
                "chosen": one.name == choice.chosen,
                "epochs": one.epochs,
                "seconds": one.seconds,
                "high_seconds": one.high_seconds,
                "peak_bytes": one.peak_bytes,
                "disk_bytes": one.disk_bytes,
                "accuracy": one.quality.value if one.quality else None,
            }
            for one in advice.candidates
        ]
        super().__init__(rows, notes=[f"recommended: {choice.chosen or 'nothing is affordable'}", *choice.reasons])


def recommend(
    data: Any = None,
    *,
    hours: float,
    disk: float | None = None,
    priority: str = "balanced",
    runs: str | Path | None = None,
    configs: str | Path | None = None,
    base_model: str | None = None,
    **keywords: Any,
) -> RecipeAdvice:
    """Forecast all recipes of the package on your data and machine, and recommend one for the time that you have.

    Args:
        data: as of `plan`.
        hours: what the training may take.
        disk: what it may write, in gigabytes (10^9 bytes); None for no limit.
        priority: "quality", "balanced" or "speed": the best affordable recipe, the cheapest that is not significantly
            worse, or the cheapest.
        runs: folder of your own runs: their quality counts first.
        configs: folder of the five recipes; None for `configs`, else the package's.
        base_model, **keywords: as of `plan`.

    Returns:
        A table of the recipes; `chosen`, `reasons` and `command` say what to take.

    Raises:
        VlmSftError: a mistake in the numbers, data, model or options.
    """
    if priority not in PRIORITIES:
        raise RunError(f"--priority {priority} is not one of {', '.join(PRIORITIES)}", "choose one of them")
    with _plan_options(data, None, base_model, "outputs/planned", keywords) as options:
        place, own = (Path(folder) if folder is not None else None for folder in (configs, runs))
        return RecipeAdvice(advise(options, hours, disk, priority, own, place))


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
    with _plan_options(data, recipe, base_model, output_dir, keywords) as options:
        return TrainingForecast(plan_training(options))


@contextmanager
def _plan_options(
    data: Any, recipe: Recipes, base_model: str | None, output_dir: str | Path, keywords: dict[str, Any]
) -> Iterator[PlanOptions]:
    """What is forecast, in a process that is afterwards as it was; arguments as of `plan`."""
    device = {name: keywords.pop(name) for name in _DEVICE_NAMES if name in keywords}
    imagined = {name: keywords.pop(name) for name in _HYPOTHETICAL_NAMES if name in keywords}
    if (data is None) == ("questions" not in imagined):
        what = "neither data nor questions" if data is None else "data, and questions in its place"
        raise RunError(f"plan is given {what}", "pass data, or questions=N for data that does not exist yet")
    refuse_idle(SimpleNamespace(questions=imagined.get("questions")), PLAN_IDLE, given_names(keywords | imagined))
    made = keywords | ({"base_model": base_model} if base_model else {})
    with restored(), tempfile.TemporaryDirectory(prefix="vlm_sft_rows") as folder:
        train = train_options(recipe, "", output_dir, made)
        if data is not None:
            train = replace(train, dataset=dataset_argument(data, Path(folder) / "rows"))
        hypothetical = checked_options(HypotheticalData, imagined) if imagined else None
        if hypothetical is not None:
            train = replace(train, dataset=TrainOptions.dataset)
        options = checked_options(PlanOptions, device, train=train, hypothetical=hypothetical)
        yield options
