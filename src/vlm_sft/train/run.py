"""One training run, from the options to the results table, readable top to bottom.

recipe -> data -> model -> train -> evaluate -> report. The stages exchange files in the output folder.
"""

from __future__ import annotations

from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import GuardError
from vlm_sft.distributed.collectives import barrier
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.run_forecast import ForecastTracker
from vlm_sft.planning.training_plan import plan_training
from vlm_sft.train.caller import Caller
from vlm_sft.train.final_evaluation import evaluate_run, report_run, sizes
from vlm_sft.train.session import open_run, watched
from vlm_sft.train.setup import build_training


def train(options: TrainOptions, caller: Caller | None = None) -> dict[str, Any]:
    """Run one training.

    Args:
        options: what is trained, and how.
        caller: callbacks and metrics of a Python caller; None for the command line.

    Returns:
        The value of results.json, or {} without a final evaluation.

    Raises:
        VlmSftError: a mistake in the recipe, data, model, folder or launch.
        GuardError: the training finished, but no checkpoint satisfies the guard.
    """
    caller = caller or Caller()
    with open_run(options, caller) as (run, guards):
        with watched(run) as trackers:
            run, plan, validation, tasks = plan_training(run, guards)
            tasks = caller.scored(tasks)
            forecast = ForecastTracker.begin(run, plan, validation, tasks)
            training = build_training(run, plan, validation, forecast, trackers, caller.callbacks)
            with training.running():
                training.loop.run(training.callbacks, run.checkpoint)
            kept = training.finish()
            del training  # frees its weights before the evaluation loads its own
            results = evaluate_run(run, plan, tasks)
            trackers.conclude(run.record.values["steps"])
            run.record.update(bytes=sizes(options.output_dir))
            forecast.finish(plan.engine.root)
            run.record.finish("finished")
        report_run(options.output_dir, results)
        trackers.tell()
        barrier("end")
    if not kept:
        raise GuardError(
            f"no checkpoint of {options.output_dir} satisfies --guard {options.guard} (see {artifacts.GUARD}); "
            "the adapter there is that of the last step",
            "train less or with a lower learning rate, mix in data of the guarded benchmark, or allow more points",
        )
    return results
