"""MLflow: files in the run's folder unless MLFLOW_TRACKING_URI names a store."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.integrations import MLflowCallback

from vlm_sft.trackers.content import COLUMNS, TABLE, recipe_texts
from vlm_sft.trackers.tracker import FAILED, FINISHED, INTERRUPTED, PROJECT, About, Tracker, set_quietly

if TYPE_CHECKING:
    from vlm_sft.trackers.content import Outcome

FOLDER = "mlruns"
_STATES = {FINISHED: "FINISHED", FAILED: "FAILED", INTERRUPTED: "KILLED"}
_LONGEST = 500  # characters of a parameter, which every version takes; recipe.json among the artifacts has it whole


class MLflow(Tracker):
    """An MLflow run; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID, … are honoured."""

    label = "MLflow"
    fix = "look at MLFLOW_TRACKING_URI"

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self._mlflow: Any = None
        self._store = os.environ.get("MLFLOW_TRACKING_URI") or (about.folder / FOLDER).resolve().as_uri()

    def begin(self, known: str | None) -> str:
        """Open a run, or the one of the training that is resumed."""
        set_quietly("MLFLOW_DISABLE_TELEMETRY", "true")
        set_quietly("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse a folder without it
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(self._store)
        if "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        params = {f"recipe.{key}": value[:_LONGEST] for key, value in recipe_texts(self.about.recipe).items()}
        tags = dict(self.about.facts)
        if known is not None and ("MLFLOW_RUN_ID" in os.environ or not self._fits(known, params)):
            tags["resumed_from"], known = known, None
        run = mlflow.start_run(run_id=known, run_name=None if known else self.about.name, tags=tags)
        self.place = self._store
        if known is None:
            mlflow.log_params(params)
        mlflow.log_dict(dict(self.about.recipe), "recipe.json")
        return str(run.info.run_id)

    def callback(self) -> MLflowCallback:
        """Logs into the open run."""
        return MLflowCallback()

    def conclude(self, outcome: Outcome, step: int) -> None:
        """Log scores as metrics, two tables, results.json, and the predictions as pictures with their texts below."""
        scores = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in outcome.scores.items()}
        self._mlflow.log_metrics(scores, step=step)
        self._mlflow.log_artifact(str(outcome.path))
        self._log_table("results_table", TABLE, outcome.rows)
        self._log_table("predictions", COLUMNS, [one.values for one in outcome.shown])
        for number, one in enumerate(outcome.shown, start=1):
            self._mlflow.log_image(one.card, f"predictions/{number}.png")

    def close(self, status: str) -> None:
        """End the run."""
        if self._mlflow is not None and self._mlflow.active_run() is not None:
            self._mlflow.flush_async_logging()
            self._mlflow.end_run(_STATES[status])

    def advice(self) -> str:
        """Its address, or the command that shows a folder."""
        if not self.place.startswith("file:"):
            return self.place
        return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {shlex.quote(self.place)}"

    def _fits(self, run_id: str, params: dict[str, str]) -> bool:
        """Whether the store has this run with these parameters, which MLflow does not let anybody change."""
        try:
            run = self._mlflow.get_run(run_id)
        except self._mlflow.exceptions.MlflowException:
            return False
        return run.info.lifecycle_stage == "active" and params.items() <= run.data.params.items()

    def _log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table as an artifact of its own: MLflow adds rows to one that is there, which a resumed run has."""
        run_id = self._mlflow.active_run().info.run_id
        there = {item.path for item in self._mlflow.MlflowClient().list_artifacts(run_id)}
        file = f"{name}.json" if f"{name}.json" not in there else f"{name}-{int(time.time())}.json"
        self._mlflow.log_table({column: [row[i] for row in rows] for i, column in enumerate(columns)}, file)
