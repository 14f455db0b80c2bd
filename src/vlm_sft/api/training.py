"""Fine-tuning from Python: `vlm-sft train` as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlm_sft.api.finished import Run
from vlm_sft.api.keywords import Recipes, train_options
from vlm_sft.api.process_state import restored
from vlm_sft.api.rows import dataset_argument, is_named
from vlm_sft.common import artifacts
from vlm_sft.evaluate.metrics import Metric
from vlm_sft.evaluate.own_metrics import metric_text, named
from vlm_sft.planning.run_recipe import read_run_recipe
from vlm_sft.train.caller import Caller
from vlm_sft.train.run import train
from vlm_sft.train.run_folder import claim_folder

OUTPUTS = Path("outputs")
METRIC_KEY = "metric_for_best_model"


def free_folder(stem: str) -> Path:
    """The first folder outputs/<stem>-1, -2, … that does not exist."""
    number = 1
    while (OUTPUTS / f"{stem}-{number}").exists():
        number += 1
    return OUTPUTS / f"{stem}-{number}"


def finetune(
    data: Any = "chartqa,textvqa",
    *,
    recipe: Recipes = None,
    base_model: str | None = None,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Sequence[Metric] | Mapping[str, Metric] = (),
    **keywords: Any,
) -> Run:
    """Fine-tune a model, evaluate it against its base, and write a report.

    Args:
        data: a list of dicts (`image`, `question`, `answer`; chat records too), a datasets.Dataset or DatasetDict, a
            pandas or polars frame, a dict of splits with such values, or what `--dataset` takes: paths and names.
            `columns={"image": "img", …}` names your own keys. Images are PIL pictures, paths, encoded bytes or NumPy
            arrays. Without a test split, a part of the images is held out.
        recipe: "smoketest", "1epoch", "2epoch", "5epoch", "best", a JSON or YAML file, a dict of keys, or a `Recipe`.
        base_model: "pocket", a folder or a Hub id.
        output_dir: folder of the run; the next free outputs/run-N by default.
        callbacks: transformers' TrainerCallbacks, called on every step, log, evaluation and checkpoint.
        metrics: further scores of the final evaluation: functions of (prediction, answers), or of these and the row of
            the predictions, that return a number, each under its own name, or a dict of names and functions. They do
            not choose the checkpoint.
        **keywords: keys of the recipe, and the options of `TrainOptions` and `EngineOptions`, with the names and checks
            of the flags of `vlm-sft train`, such as `learning_rate=2e-4`, `eval_benchmarks="none"`, `resume="auto"`.
            `metric` and `metric_for_best_model` also take a function that scores answers to your data from 0 to 1,
            defined at the top of a module or notebook.

    Returns:
        The run.

    Raises:
        VlmSftError: a mistake in recipe, data, model, folder or launch, with the message of the command line.
        GuardError: the training finished, but no checkpoint satisfies the guard; `open_run` opens it.
        InterruptedRunError: a signal (Ctrl-C, the notebook's stop button) ended the training after a checkpoint.

    Examples:
        >>> import vlm_sft
        >>> run = vlm_sft.finetune("demo_charts", base_model="pocket", learning_rate=-1)
        Traceback (most recent call last):
        vlm_sft.common.errors.RecipeError: a mistake in the recipe
          command line: --learning_rate = -1: out of range; allowed: a number above 0 and at most 1
          fix: correct each line; `vlm-sft train --help` describes every key
    """
    folder = Path(output_dir) if output_dir is not None else free_folder("run")
    given = keywords | ({"base_model": base_model} if base_model else {})
    given |= {name: metric_text(given[name]) for name in ("metric", METRIC_KEY) if callable(given.get(name))}
    options = train_options(recipe, "", folder, given)
    caller = Caller(callbacks, named(metrics), f'vlm_sft.finetune(…, output_dir="{folder}", resume="auto")')
    with restored():
        read_run_recipe(options)  # before data is written
        if not is_named(data):
            claim_folder(folder, options.resume, options.overwrite)
        train(replace(options, dataset=dataset_argument(data, folder / artifacts.ROWS_FOLDER)), caller)
    return Run(folder)
