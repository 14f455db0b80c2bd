"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir

from vlm_sft.report.markdown import table
from vlm_sft.trackers.content import COLUMNS, TABLE, recipe_markdown
from vlm_sft.trackers.tracker import About, Tracker

if TYPE_CHECKING:
    from vlm_sft.trackers.content import Outcome


class TensorBoard(Tracker):
    """Scalars, texts and pictures as TensorBoard reads them; TENSORBOARD_LOGGING_DIR moves them elsewhere."""

    label = "TensorBoard"
    fix = "choose a folder that you may write to"

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self._writer: SummaryWriter | None = None

    def begin(self, known: str | None) -> str:
        """Open an event file; that of a resumed run lies beside the earlier ones, and replaces what they have later."""
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self.place = str(Path(folder).expanduser()) if folder else str(self.about.folder / default_logdir())
        purge = None
        if known and Path(known).is_dir() and Path(known).parent == Path(self.place).parent:
            self.place, purge = known, self.about.step + 1
        self._writer = SummaryWriter(self.place, purge_step=purge)
        self._writer.add_text("recipe", recipe_markdown({**self.about.facts, **self.about.recipe}), self.about.step)
        self._writer.flush()
        return self.place

    def callback(self) -> TensorBoardCallback:
        """Writes with the same writer; at the end of the training it closes the file, and `conclude` opens another."""
        return TensorBoardCallback(self._writer)

    def conclude(self, outcome: Outcome, step: int) -> None:
        """Log scores as scalars, tables as texts, predictions as pictures with their texts below."""
        writer = self._writer
        assert writer is not None, "conclude comes after begin"
        for name, value in outcome.scores.items():
            writer.add_scalar(name, value, step)
        writer.add_text("results", table([TABLE, *outcome.rows]), step)
        writer.add_text("predictions", table([COLUMNS, *(one.values for one in outcome.shown)]), step)
        for number, one in enumerate(outcome.shown, start=1):
            writer.add_image(f"predictions/{number}", np.asarray(one.card), step, dataformats="HWC")

    def close(self, status: str) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def advice(self) -> str:
        """The command that shows it."""
        return f"tensorboard --logdir {Path(self.place).parent}"
