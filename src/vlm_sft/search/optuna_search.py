"""Settings chosen by Optuna, from the trials before them; its study lies in the sweep's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import RunError, quoted
from vlm_sft.planning.options import TrainOptions, flag_text
from vlm_sft.recipe.schema import KEYS
from vlm_sft.search.request import SweepOptions, SweepSetting, checked_setting

JOURNAL = "optuna.log"


def range_ends(key: str, text: str) -> tuple[float, float, bool]:
    """Read LOW:HIGH or LOW:HIGH:log.

    Raises:
        RunError: it is no range, or the key is no number.
    """
    low, _, rest = text.partition(":")
    high, _, scale = rest.partition(":")
    number = key in KEYS and KEYS[key].kind in ("number", "whole number")
    read = int if number and KEYS[key].kind == "whole number" else float
    try:
        ends = read(low), read(high)
        if not number or scale not in ("", "log") or not ends[0] < ends[1] or (scale and ends[0] <= 0):
            raise ValueError
    except ValueError:
        raise RunError(
            f"--range {key}={quoted(text)} is no range of numbers",
            "write LOW:HIGH, or LOW:HIGH:log for magnitudes, e.g. --range learning_rate=1e-5:1e-3:log; other keys have "
            "--grid",
        ) from None
    return *ends, bool(scale)


def corners(options: SweepOptions) -> list[SweepSetting]:
    """The settings with the lowest and with the highest ends of all ranges: what a trial takes lies between."""
    ends = {key: range_ends(key, text) for key, text in options.ranges.items()}
    first = {key: values[0] for key, values in options.grid.items()}
    last = {key: values[-1] for key, values in options.grid.items()}
    low = {key: flag_text(one[0]) for key, one in ends.items()}
    high = {key: flag_text(one[1]) for key, one in ends.items()}
    return [checked_setting(options.train, low | first), checked_setting(options.train, high | last)]


class OptunaSearch:
    """A study of Optuna: a tree-structured Parzen estimator (Bergstra et al. 2011), seeded for each trial.

    Args:
        options: the sweep; `ranges` are searched, values of `grid` chosen from.
        greater: whether more of the metric is better.
        seed: of the sampler.

    Raises:
        RunError: Optuna is not installed.
    """

    def __init__(self, options: SweepOptions, greater: bool, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise RunError("--search optuna needs the package optuna", 'pip install "vlm-sft[optuna]"') from error
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._options, self._seed = optuna, options, seed
        folder: Path = options.train.output_dir
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        direction = optuna.study.StudyDirection.MAXIMIZE if greater else optuna.study.StudyDirection.MINIMIZE
        self._study = optuna.create_study(study_name="sweep", storage=storage, direction=direction, load_if_exists=True)

    def asked(self, count: int) -> Iterator[tuple[int, SweepSetting]]:
        """Settings one after the other with their numbers, those of an earlier start first; each has to be told."""
        states = self._optuna.trial.TrialState
        for one in self._study.get_trials(deepcopy=False)[:count]:
            if one.params.keys() == self._distributions.keys():
                yield one.number, self._setting(one.params)
            elif one.state == states.RUNNING:  # the process ended while it was asked
                self._study.tell(one.number, state=states.FAIL)
        while (number := len(self._study.get_trials(deepcopy=False))) < count:
            self._study.sampler = self._optuna.samplers.TPESampler(seed=self._seed + number)
            trial = self._study.ask(self._distributions)
            yield trial.number, self._setting(trial.params)

    def tell(self, number: int, value: float | None, pruned: bool) -> None:
        """The metric of a setting, the mean over its seeds; None for one without."""
        states = self._optuna.trial.TrialState
        if value is not None:
            self._study.tell(number, value, skip_if_finished=True)
        else:
            self._study.tell(number, state=states.PRUNED if pruned else states.FAIL, skip_if_finished=True)

    @property
    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        found: dict[str, Any] = {key: kinds.CategoricalDistribution(one) for key, one in self._options.grid.items()}
        for key, text in self._options.ranges.items():
            low, high, log = range_ends(key, text)
            whole = isinstance(low, int)
            found[key] = (kinds.IntDistribution if whole else kinds.FloatDistribution)(low, high, log=log)
        return found

    def _setting(self, params: Mapping[str, Any]) -> SweepSetting:
        train: TrainOptions = self._options.train
        return checked_setting(train, {key: flag_text(params[key]) for key in self._distributions})
