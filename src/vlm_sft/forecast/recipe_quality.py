"""The measured quality of each recipe: in the user's own runs, or in our recorded benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import RESULTS, RUN, read_json
from vlm_sft.common.errors import RunError
from vlm_sft.recipe.builtin import RECIPES

RECORDED = Path(__file__).parent / "measured"
AS_IS = "as is"
WIDE = 0.10  # half an interval beyond which a quality says too little to choose by, in accuracy


@dataclass(frozen=True, slots=True)
class Quality:
    """A measured quality.

    Attributes:
        value: mean accuracy over the benchmarks, 0 to 1.
        low, high: its 95 % interval.
        source: where it was measured, for a person.
        questions: on how many; 0 where that is not recorded.
    """

    value: float
    low: float
    high: float
    source: str
    questions: int = 0

    @property
    def half_width(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    @property
    def too_few(self) -> bool:
        """Whether it was measured on too few questions to choose by."""
        return self.half_width > WIDE + 1e-9

    @property
    def questions_needed(self) -> int:
        """About how many questions would suffice to choose by it."""
        return math.ceil(self.questions * (self.half_width / WIDE) ** 2)

    @property
    def text(self) -> str:
        """The value with its interval, as text."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def combined(accuracies: Sequence[tuple[float, float, float]], source: str, questions: int = 0) -> Quality:
    """The mean over benchmarks with its interval, the benchmarks taken for independent.

    Args:
        accuracies: (value, low, high) of each.
        source: where they come from.
        questions: of all of them.
    """
    count = len(accuracies)
    value = sum(one[0] for one in accuracies) / count
    down = math.sqrt(sum((one[0] - one[1]) ** 2 for one in accuracies)) / count
    up = math.sqrt(sum((one[2] - one[0]) ** 2 for one in accuracies)) / count
    return Quality(value, value - down, value + up, source, questions)


def qualities(
    runs: Path | None, base_model: str, datasets: Sequence[str], recorded: Path = RECORDED
) -> tuple[dict[str, Quality], str]:
    """The quality of each recipe: from the user's runs, else from the recorded benchmark.

    Args:
        runs: folder of the user's run folders; None for none.
        base_model: that will be trained.
        datasets: names of the data sets that it will be trained on.
        recorded: folder of the recorded benchmark.

    Returns:
        Qualities by recipe, and a line that says where they come from.
    """
    own = own_runs(runs, base_model, datasets) if runs is not None else {}
    few = {name: quality for name, quality in own.items() if quality.too_few}
    judged = {name: quality for name, quality in own.items() if name not in few}
    note = _too_few_line(few) if few else ""
    if judged:
        return judged, f"quality: measured in {len(judged)} of your recipes' runs in {runs}{note}"
    found, line = _recorded_qualities(recorded, base_model, datasets)
    return found, line + note


def _too_few_line(few: Mapping[str, Quality]) -> str:
    """Which of the user's runs have too few questions to choose by, and how many would suffice."""
    named = ", ".join(f"{name} {quality.text}" for name, quality in few.items())
    needed = max(quality.questions_needed for quality in few.values())
    how_many = f"; about {needed:,} questions would do" if needed else ""
    return f"\nyour runs with too few questions to judge are left aside: {named}{how_many}"


def _recorded_qualities(recorded: Path, base_model: str, datasets: Sequence[str]) -> tuple[dict[str, Quality], str]:
    """What the recorded benchmark says, and a line that says which one it is."""
    found = _recorded(recorded, base_model, datasets)
    if found is None:
        return {}, "quality: not measured for any set-up here; recipes are ordered by their epochs"
    file, exact = found
    rows = {
        row["recipe"]: quality
        for row in file["rows"]
        if row.get("arm") == "recipe" and row.get("variant") == AS_IS and (quality := _row_quality(row)) is not None
    }
    settings = file["settings"]
    what = f"{settings['base_model']} on {settings['dataset']}"
    if not rows:
        return {}, f"quality: the recorded benchmark ({what}) was not run; recipes are ordered by their epochs"
    note = "" if exact else "; your model and data are others, so take the order, not the numbers"
    return rows, f"quality: recorded benchmark of {what}, {file.get('made', '')}{note}"


def own_runs(folder: Path, base_model: str, datasets: Sequence[str]) -> dict[str, Quality]:
    """The newest finished run of each recipe with this base and data.

    Raises:
        RunError: the folder does not exist.
    """
    if not folder.is_dir():
        raise RunError(f"--runs {folder}: there is no such folder", "pass the folder that holds your run folders")
    newest: dict[str, tuple[str, Quality]] = {}
    for path in sorted(folder.glob(f"*/{RUN}")):
        try:
            run, results = read_json(path), read_json(path.parent / RESULTS)
            accuracies = [
                (row["tuned"]["accuracy"], *row["tuned"]["interval"]) for row in results["benchmarks"].values()
            ]
        except (RunError, KeyError, TypeError):
            continue
        stem = Path(str(run.get("recipe_file"))).stem
        name = RECIPES.get(stem, stem if stem in RECIPES.values() else None)
        same = run.get("base_model") == base_model and sorted(run.get("datasets", ())) == sorted(datasets)
        if name is None or not same or run.get("status") != "finished" or not accuracies:
            continue
        if name not in newest or str(run["finished"]) > newest[name][0]:
            questions = sum(row.get("n") or 0 for row in results["benchmarks"].values())
            newest[name] = (str(run["finished"]), combined(accuracies, f"your run {path.parent.name}", questions))
    return {name: quality for name, (_, quality) in newest.items()}


def _recorded(folder: Path, base_model: str, datasets: Sequence[str]) -> tuple[Mapping[str, Any], bool] | None:
    """The recorded benchmark nearest to a set-up: same base and data, else same base, else any."""
    files = []
    for path in sorted(folder.glob("recipes-*.json")):
        try:
            file = read_json(path)
            settings = file["settings"]
            same_data = sorted(settings["dataset"].split(",")) == sorted(datasets)
            files.append(((settings["base_model"] == base_model) * 2 + same_data, file))
        except (RunError, KeyError, TypeError, AttributeError):
            continue
    if not files:
        return None
    score, file = max(files, key=lambda item: item[0])
    return file, score == 3


def _row_quality(row: Mapping[str, Any]) -> Quality | None:
    """The quality of one row of the benchmark; None where it was not run."""
    try:
        accuracies = [(one["accuracy"], *one["interval"]) for one in row["benchmarks"].values()]
    except (KeyError, TypeError):
        return None
    return combined(accuracies, "recorded benchmark") if accuracies else None


@dataclass(frozen=True, slots=True)
class GuideRow:
    """One line of the guide that this toolkit's recipes began with.

    Attributes:
        low_hours, high_hours: budgets that it is for.
        recipe: what it advises; for_quality: the same for the priority "quality".
    """

    low_hours: float
    high_hours: float
    recipe: str
    for_quality: str


# Qwen2.5-VL-7B, 50,000 samples, 8 GPUs.
GUIDE = (GuideRow(0, 8, "1epoch", "1epoch"), GuideRow(8, 16, "2epoch", "2epoch"), GuideRow(16, 24, "5epoch", "best"))
GUIDE_BASE, GUIDE_QUESTIONS, GUIDE_GPUS = "Qwen/Qwen2.5-VL-7B-Instruct", 50_000, 8


def guide_comparison(seconds: Mapping[str, float]) -> list[str]:
    """The guide's hours beside our forecast, one line a recipe.

    Args:
        seconds: forecast time of each recipe on the guide's set-up.
    """
    lines = [f"the guide's set-up ({GUIDE_BASE}, {GUIDE_QUESTIONS:,} questions, {GUIDE_GPUS} GPUs):"]
    for row in GUIDE:
        for name in dict.fromkeys((row.recipe, row.for_quality)):
            planned = (
                f"under {row.high_hours:g} h" if not row.low_hours else f"{row.low_hours:g} to {row.high_hours:g} h"
            )
            ours = f"{seconds[name] / 3600:.2f} h" if name in seconds else "not forecast"
            lines.append(f"  {name}: the guide plans {planned}, our forecast is {ours}")
    return lines
