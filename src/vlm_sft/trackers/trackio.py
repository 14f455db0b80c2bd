"""Trackio: a database in the run's folder unless TRACKIO_DIR or a Space is given."""

from __future__ import annotations

import os
import shlex
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers.integrations import TrackioCallback

from vlm_sft.trackers.content import COLUMNS, TABLE
from vlm_sft.trackers.tracker import PROJECT, About, Tracker, set_quietly

if TYPE_CHECKING:
    from vlm_sft.trackers.content import Outcome

FOLDER = "trackio"
_ELSEWHERE = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio(Tracker):
    """A Trackio run; TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL are honoured."""

    label = "Trackio"
    fix = "look at TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL"

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self._callback: _Integration | None = None

    def begin(self, known: str | None) -> str:
        """Choose the folder; the run itself is opened by the integration, which goes on with one of the same name."""
        if not any(name in os.environ for name in _ELSEWHERE):
            set_quietly("TRACKIO_DIR", str((self.about.folder / FOLDER).resolve()))
        import trackio.utils

        sent_to = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self.place = sent_to or str(trackio.utils.TRACKIO_DIR)
        self._callback = _Integration(self.about, known or self.about.name)
        return self._callback.name

    def callback(self) -> TrackioCallback:
        """Opens the run when the training begins, and leaves it open after its end."""
        assert self._callback is not None, "callback comes after begin"
        return self._callback

    def conclude(self, outcome: Outcome, step: int) -> None:
        """Log scores and two tables; that of the predictions has the pictures in its first column."""
        import trackio

        pictured = [
            [trackio.Image(one.picture) if one.picture is not None else "", *one.values] for one in outcome.shown
        ]
        trackio.log(
            {
                **outcome.scores,
                "results": trackio.Table(columns=list(TABLE), data=[list(row) for row in outcome.rows]),
                "predictions": trackio.Table(columns=["picture", *COLUMNS], data=pictured),
            }
        )

    def close(self, status: str) -> None:
        """Finish the run."""
        if self._callback is not None:
            self._callback.close()

    def advice(self) -> str:
        """The Space or server, or the command that shows a folder."""
        if any(name in os.environ for name in _ELSEWHERE[1:]):
            return self.place
        return f"TRACKIO_DIR={shlex.quote(self.place)} trackio show --project {PROJECT}"


class _Integration(TrackioCallback):
    """That of transformers, under our names, with the recipe, and open until the results are in it too.

    Args:
        about: the run.
        name: under which it is opened, or opened again.
    """

    def __init__(self, about: About, name: str) -> None:
        super().__init__()
        self.about, self.name = about, name
        self._ended: tuple[Any, Any, Any] | None = None

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Open the run."""
        args.project, args.run_name = PROJECT, self.name
        super().setup(args, state, model, **kwargs)
        recipe = {f"recipe.{key}": value for key, value in self.about.recipe.items()}
        self._trackio.config.update({**recipe, **self.about.facts}, allow_val_change=True)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        """Leave it open."""
        self._ended = (args, state, control)

    def close(self) -> None:
        """What the integration does at the end of a training; one that was cut off is finished without a snapshot."""
        if self._ended is not None:
            # The model's tags are all that it would be asked for; holding the model would cost its memory.
            super().on_train_end(*self._ended, SimpleNamespace())
        elif self._initialized:
            self._trackio.finish()
