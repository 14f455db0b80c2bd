"""A sweep from Python: `vlm-sft sweep` as a function."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlm_sft.api.finished import Run
from vlm_sft.api.keywords import Recipes, train_options
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument
from vlm_sft.api.training import free_folder
from vlm_sft.api.views import ReportPage, Table
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.common.options import checked_options
from vlm_sft.search.page import standing_cells
from vlm_sft.search.request import DECIDED, SweepOptions, entries_of, grid_values, read_grid
from vlm_sft.search.state import SweepState
from vlm_sft.search.sweep import sweep as run_sweep
from vlm_sft.search.sweep import varied_settings
from vlm_sft.search.trials import FINISHED

_NAMES = {item.name for item in fields(SweepOptions)} - {"train", "grid", "ranges"}


class SweepResult(Table):
    """The settings of a sweep, the best first, with their paired differences to it; of a dry run the forecast.

    Args:
        folder: of the sweep.
        state: what it recorded.
    """

    def __init__(self, folder: Path, state: SweepState) -> None:
        self.folder = folder
        self.values = dict(state.values)
        judged = state.judgement
        if judged is None:
            header, *body = state.outlook
            super().__init__([dict(zip(header, row, strict=True)) for row in body])
        else:
            rows = [{name: one for name, one in vars(standing).items()} for standing in judged.standings]
            super().__init__(rows, standing_cells(judged), [*judged.reasons, f"next: {state.values['next']}"])
        self._trials = [one.name for one in state.trials if one.status == FINISHED]

    @property
    def recommended(self) -> dict[str, str]:
        """The setting to take, by key, as the flags have it: `finetune(data, **sweep.recommended)`; {} of a dry run."""
        return dict(self.values.get("recommended", {}))

    @property
    def trials(self) -> list[Run]:
        """The trainings that came to their end."""
        return [Run(self.folder / artifacts.TRIALS_FOLDER / name) for name in self._trials]

    def report(self) -> ReportPage:
        """The page with all trials, shown in a notebook."""
        return ReportPage(self.folder / artifacts.SWEEP_PAGE)


def sweep(
    data: Any = "chartqa,textvqa",
    *,
    grid: Mapping[str, Any] | None = None,
    ranges: Mapping[str, Any] | None = None,
    recipe: Recipes = None,
    base_model: str | None = None,
    output_dir: str | Path | None = None,
    **keywords: Any,
) -> SweepResult:
    """Train settings of a recipe side by side on the same data, and say which one to take.

    Args:
        data: as of `finetune`.
        grid: values by recipe key: `{"learning_rate": [1e-4, 2e-4], "lora_r": [8, 16]}`; `dataset` takes names.
        ranges: what Optuna searches (`search="optuna"`): `{"learning_rate": (1e-5, 1e-3, "log")}`.
        recipe, base_model: as of `finetune`.
        output_dir: folder of the sweep; the next free outputs/sweep-N by default. The same call with the folder of a
            sweep that was stopped goes on with it.
        **keywords: the options of `vlm-sft sweep`: `seeds`, `metric`, `search`, `trials`, `prune`, `budget` ("4h"),
            `gpus`, `parallel`, `dry_run`, …; and those of `finetune`. Trials are processes of their own.

    Returns:
        A table of the settings, with `recommended`; of a dry run of the forecasts.

    Raises:
        VlmSftError: a mistake in what is asked for, or no setting came to its end.
        InterruptedRunError: the notebook's stop button or a signal; the same call goes on.

    Examples:
        >>> import vlm_sft
        >>> vlm_sft.sweep("demo_charts", base_model="pocket", grid={"lora_r": [8, 0]})
        Traceback (most recent call last):
        vlm_sft.common.errors.RecipeError: the setting lora_r=0 cannot be trained: a mistake in the recipe
          command line: --lora_r = "0": out of range; allowed: a whole number at least 1 and at most 4096
          fix: correct each line; `vlm-sft train --help` describes every key
    """
    folder = Path(output_dir) if output_dir is not None else free_folder("sweep")
    asked = {name: keywords.pop(name) for name in _NAMES & keywords.keys()}
    if decided := sorted(keywords.keys() & set(DECIDED)):
        raise RunError(f"{', '.join(decided)} has no effect here", "leave it out: the sweep decides it for its trials")
    given = keywords | ({"base_model": base_model} if base_model else {})
    values = {key: grid_values(text) for key, text in read_grid(entries_of(grid or {}, "grid"), "grid").items()}
    searched = read_grid(entries_of(ranges or {}, "range"), "range")
    train = train_options(recipe, data if isinstance(data, str) else "", folder, given)
    options = checked_options(SweepOptions, asked, train=train, grid=values, ranges=searched)
    with restored(), tempfile.TemporaryDirectory(prefix="vlm_sft_rows") as aside:
        varied_settings(options)  # before data is written
        if not isinstance(data, str):
            place = Path(aside) if options.dry_run else folder  # a dry run leaves nothing behind
            dataset = dataset_argument(data, place / artifacts.ROWS_FOLDER)
            options = replace(options, train=replace(train, dataset=dataset))
        return SweepResult(folder, run_sweep(options))
