"""Weights & Biases: online for who is logged in, else offline in the run's folder."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import WandbCallback

from vlm_sft.trackers.card import same_size
from vlm_sft.trackers.content import COLUMNS, TABLE
from vlm_sft.trackers.tracker import FINISHED, PROJECT, About, Tracker, set_quietly

if TYPE_CHECKING:
    from vlm_sft.trackers.content import Outcome


class WeightsAndBiases(Tracker):
    """A W&B run; the variables of wandb (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, …) are honoured."""

    label = "Weights & Biases"
    fix = "look at the network and at `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self._run: Any = None

    def begin(self, known: str | None) -> str:
        """Open a run: as WANDB_MODE says, else online with a login and offline without (wandb would ask for one)."""
        folder = str(self.about.folder.resolve())
        set_quietly("WANDB_ERROR_REPORTING", "false")  # reports of wandb's own errors go to its maker's server
        set_quietly("WANDB_QUIET", "true")
        set_quietly("WANDB_DATA_DIR", os.path.join(folder, "wandb"))  # tables wait there until they are uploaded
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or (None if _logged_in(wandb) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", self.about.name),
            dir=os.environ.get("WANDB_DIR", folder),
            mode=mode,
            id=os.environ.get("WANDB_RUN_ID", known),
            resume="allow" if known else None,
            config={"recipe": dict(self.about.recipe), **self.about.facts},
        )
        self.place = self._run.url or str(Path(self._run.dir).parent)
        return str(self._run.id)

    def callback(self) -> WandbCallback:
        """Logs into the open run."""
        return WandbCallback()

    def conclude(self, outcome: Outcome, step: int) -> None:
        """Log scores into the summary, two tables, and the predictions as pictures with their texts below.

        Pictures inside a table would lie apart from an offline run's folder.
        """
        import wandb

        self._run.summary.update(outcome.scores)
        self._run.log(
            {
                "results": wandb.Table(columns=list(TABLE), data=[list(row) for row in outcome.rows]),
                "predictions": wandb.Table(columns=list(COLUMNS), data=[list(one.values) for one in outcome.shown]),
                "pictures": [wandb.Image(card) for card in same_size([one.card for one in outcome.shown])],
            }
        )

    def close(self, status: str) -> None:
        """Finish the run; one that did not end well is marked as failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == FINISHED else 1)

    def advice(self) -> str:
        """Its address, or the command that uploads it."""
        return self.place if "://" in self.place else f"wandb sync {self.place}"


def _logged_in(wandb: Any) -> bool:
    """Whether wandb finds a key without asking for one; it may have its server check the one that it finds."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)
