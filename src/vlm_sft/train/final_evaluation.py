"""After the training: base against adapter on the benchmarks, sizes, report."""

from __future__ import annotations

import gc
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common import artifacts
from vlm_sft.common.console import is_main_process, say
from vlm_sft.common.record import folder_bytes
from vlm_sft.data.cache.encoded import DataCache
from vlm_sft.distributed.collectives import barrier
from vlm_sft.distributed.launch import Launch
from vlm_sft.evaluate.evaluator import Evaluator, results_table
from vlm_sft.evaluate.loading import open_backend
from vlm_sft.evaluate.pictures import save_pictures
from vlm_sft.evaluate.provenance import identity_of
from vlm_sft.evaluate.tasks import Task
from vlm_sft.model.load import Base
from vlm_sft.model.parts import ALL
from vlm_sft.model.saved_adapter import changes_nothing
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.report.html import write_report
from vlm_sft.report.markdown import results_table as format_results
from vlm_sft.report.markdown import results_tones
from vlm_sft.report.predictions import read_predictions, showcase
from vlm_sft.train.model_card import write_card


def evaluate_run(run: TrainingRun, plan: Plan, tasks: list[Task]) -> dict[str, Any]:
    """Answer the benchmarks with the base and with the saved adapter, and compare.

    Returns:
        The value of results.json on rank 0; {} on other ranks, and without benchmarks.
    """
    if not tasks:
        return {}
    options = run.options
    base = plan.base
    barrier("save the model")
    folder = options.output_dir / artifacts.EVALUATION_FOLDER
    with run.record.timed("evaluate"):
        if ALL in run.recipe.train:
            place = str(options.output_dir)
            caches = [
                _answer(run, plan, tasks, base, None, ("base",)),
                _answer(run, plan, tasks, replace(base, name=place, path=place), None, ("tuned",)),
            ]
        else:
            caches = [_answer(run, plan, tasks, base, options.output_dir, ("base", "tuned"))]
        plan.engine.describe([plan.cache, *caches])
        run.record.update(engine=plan.engine.facts)
    if not is_main_process():
        return {}
    save_pictures(tasks, folder)
    results = results_table(tasks, folder)
    for name, found in run.record.values["overlap"].items():
        results["benchmarks"][name] |= found
    if stopped := run.record.values.get("stopped_early"):
        results["stopped_early"] = stopped
    artifacts.write_json(options.output_dir / artifacts.RESULTS, results)
    return results


def _answer(
    run: TrainingRun, plan: Plan, tasks: list[Task], base: Base, adapter: Path | None, sides: tuple[str, ...]
) -> DataCache:
    """Answer the benchmarks with one model, for each side: "base" is the model without its adapter."""
    launch = run.launch
    _free_memory(launch)
    asked = [sample for task in tasks for sample in task.samples]
    backend, cache = open_backend(base, adapter, launch, run.options.shard_weights, plan.engine, asked)
    model = backend.model
    tokens = run.answer_tokens(backend.blockwise)
    # A resumed run may have evaluated an earlier adapter: its predictions are replaced.
    evaluator = Evaluator(backend, tokens, launch.rank, launch.world_size, replace=True)
    for task in tasks:
        for side in sides:
            tuned = adapter if side == "tuned" else None
            with model.disable_adapter() if adapter is not None and tuned is None else nullcontext():
                folder = run.options.output_dir / artifacts.EVALUATION_FOLDER / side / task.name
                identity = identity_of(base, tuned)
                evaluator.run(task, folder, f"{task.name}: {side}", identity)
    return cache


def _free_memory(launch: Launch) -> None:
    """Free the models and engines before this one, and let models be loaded whole again.

    ZeRO-3 partitions them while its config is alive.
    """
    gc.collect()
    if launch.deepspeed is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if not launch.cpu:
        torch.cuda.empty_cache()


def _example(folder: Path) -> tuple[str, str]:
    """A picture of the evaluation and a question about it, as words of a command line."""
    for one in showcase(read_predictions(folder, [])):
        if one.image is not None and one.image.is_file():
            return shlex.quote(str(one.image)), shlex.quote(one.question)
    return "IMAGE", '"QUESTION"'


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of what the run left on disk."""
    return {
        "adapter": folder_bytes(
            [folder / artifacts.ADAPTER_WEIGHTS, folder / artifacts.ADAPTER_CONFIG, *folder.glob("model*.safetensors")]
        ),
        "checkpoints": folder_bytes(list(folder.glob("checkpoint-*"))),
        "logs": folder_bytes([folder / name for name in (artifacts.METRICS, *artifacts.TRACKER_FOLDERS)]),
    }


def report_run(folder: Path, results: dict[str, Any]) -> None:
    """Print the table, write the report, say what is where and what to do next."""
    if not is_main_process():
        return
    if results:
        say("")
        say(format_results(results), results_tones(results))
    write_card(folder, folder)
    report = write_report([folder], folder / artifacts.REPORT)
    say("")
    full = artifacts.holds_full_model(folder)
    say(f"{'model' if full else 'adapter'}, metrics and predictions: {folder}")
    say(f"report: {report}")
    if not full and changes_nothing(folder):
        say("next: train again, with more steps or a higher --learning_rate: this adapter changes nothing")
        return
    place = shlex.quote(str(folder))
    model = f"--base_model {place}" if full else f"--adapter {place}"
    picture, question = _example(folder)
    say(f"next: open the report; try it: vlm-sft ask {picture} {question} {model}")
    say(f"      in a browser, on your pictures: vlm-sft demo {model}")
    if not full:
        say(f"      one folder for other programs: vlm-sft export {model} --merge --output_dir {place}-merged")
