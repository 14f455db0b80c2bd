"""sweep.json: what a sweep was asked for, its trials, and what it found; kept up to date, so that it can go on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.common.record import command_line, now
from vlm_sft.search.judgement import Judgement
from vlm_sft.search.request import SweepSetting
from vlm_sft.search.trials import FINISHED, PRUNED, SKIPPED, WAITING, SweepTrial

SCHEMA = 1


class SweepState:
    """The record of a sweep.

    Args:
        folder: of the sweep.
        asked: what must not change between two starts, as JSON values.
        pruning: whether trials that were stopped early stay so.

    Raises:
        RunError: the folder holds a training, or another sweep; what differs is named.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], pruning: bool) -> None:
        self.path = folder / artifacts.SWEEP
        earlier = artifacts.read_json(self.path) if self.path.is_file() else {}
        if not earlier and (folder / artifacts.RUN).is_file():
            raise RunError(f"{folder} holds a training, not a sweep", "choose another --output_dir")
        if earlier and earlier.get("asked") != asked:
            raise RunError(
                f"{folder} holds another sweep: {'; '.join(_differences(earlier.get('asked') or {}, asked))}",
                "choose another --output_dir, or repeat the command that began this one; values of --grid and --seeds "
                "may change",
            )
        names = [item.name for item in fields(SweepTrial)]
        trials = [SweepTrial(**{name: one[name] for name in names}) for one in earlier.get("trials", ())]
        # What failed is tried again.
        known = (FINISHED, WAITING, *((PRUNED, SKIPPED) if pruning else ()))
        self._earlier = {one.name: one for one in trials if one.status in known}
        self.values: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "command": command_line(),
            "started": earlier.get("started", now()),
            "finished": None,
            "asked": asked,
        }
        self.trials: list[SweepTrial] = []
        self.judgement: Judgement | None = None
        self.outlook: list[list[str]] = []  # the table of the forecast; it is not written

    def trial(self, setting: SweepSetting, seed: int) -> SweepTrial:
        """The trial of a setting and a seed: as an earlier start left it, or a new one."""
        name = f"{setting.name}_seed-{seed}"
        found = next((one for one in self.trials if one.name == name), None)
        if found is None:
            found = self._earlier.get(name, SweepTrial(name, setting.label, seed, WAITING))
            self.trials.append(found)
        return found

    def write(self, **facts: Any) -> None:
        """Add facts, and write all of it."""
        self.values |= facts
        artifacts.write_json(self.path, {**self.values, "trials": [one.to_dict() for one in self.trials]})


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two sweeps, in words."""
    told = []
    for key in sorted(before.keys() | after.keys()):
        one, other = before.get(key), after.get(key)
        if one == other:
            continue
        if isinstance(one, list) and isinstance(other, list):
            gone, new = ([word for word in a if word not in b] for a, b in ((one, other), (other, one)))
            told.append(f"{key}: {' '.join(gone) or 'nothing'} became {' '.join(new) or 'nothing'}")
        else:
            told.append(f"{key}: {one} became {other}")
    return told
