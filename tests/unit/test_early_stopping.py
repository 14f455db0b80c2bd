"""A training ends early by its evaluations alone, at the same step when it is resumed, and says why."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import training
from vlm_sft.cli.main import main
from vlm_sft.planning.fingerprint import differences, recipe_identity
from vlm_sft.recipe.schema import Recipe
from vlm_sft.train.early_stopping import EarlyStop, early_stop

LOSS = Recipe(early_stopping_patience=2)
SCORE = replace(LOSS, metric_for_best_model="exact_match")


def stopped(recipe: Recipe, values: list[float]) -> EarlyStop | None:
    """What a history of evaluations comes to; other lines of the log stand between them."""
    history: list[dict[str, Any]] = []
    for index, value in enumerate(values):
        history += [{"loss": 0.0, "step": 10 * index}, {recipe.best_metric_column: value, "step": 10 * (index + 1)}]
    return early_stop(recipe, history)


@pytest.mark.parametrize(
    ("recipe", "values", "expected"),
    [
        (LOSS, [], None),
        (LOSS, [3, 2, 1], None),
        (LOSS, [3, 2, 2], None),
        (LOSS, [3, 2, 2, 2.5], (2, 20, 2)),
        (LOSS, [3, 2, 2.5, 1, 1.5], None),
        (replace(LOSS, early_stopping_patience=3), [3, 2, 2, 2.5], None),
        (replace(LOSS, early_stopping_patience=None), [1, 2, 3, 4, 5], None),
        (replace(LOSS, early_stopping_threshold=0.5), [3, 2.9, 2.8], (3, 10, 2)),
        (replace(LOSS, early_stopping_threshold=0.5), [3, 2.7, 2.4, 2.2, 1.8], None),
        (LOSS, [2, math.nan, math.inf], (2, 10, 2)),
        (LOSS, [math.nan, math.nan], (None, None, 2)),
        (LOSS, [-math.inf, 1, 0.5], None),
        (replace(LOSS, metric_for_best_model="eval_loss_mine"), [3, 2, 2, 2.5], (2, 20, 2)),
        (SCORE, [0.1, 0.2, 0.3], None),
        (SCORE, [0.3, 0.2, 0.1], (0.3, 10, 2)),
    ],
)
def test_when_a_training_ends(recipe: Recipe, values: list[float], expected: tuple[Any, ...] | None) -> None:
    found = stopped(recipe, values)
    assert (found and (found.best, found.best_step, found.evaluations)) == expected


def test_the_reason_has_the_numbers() -> None:
    found = stopped(replace(LOSS, early_stopping_threshold=0.25), [1.5, 1.4, 1.3])
    assert found is not None
    expected = "stopped early after step 30: eval_loss did not improve on 1.5000 by more than 0.25 (step 10) in 2 "
    assert found.reason == f"{expected}evaluations"


def test_a_resumed_training_stops_where_the_other_does(tmp_path: Path) -> None:
    data = training.prepared(training.samples())
    evaluation = training.prepared(training.samples(2))
    recipe = replace(
        training.RECIPE,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=2,
        early_stopping_threshold=100.0,
    )

    def run(folder: Path, step: int = 0) -> training.TrainingLoop:
        made = training.trainer(data, folder, evaluation=evaluation, recipe=recipe)
        made.run(checkpoint=tmp_path / "whole" / f"checkpoint-{step}" if step else None)
        return made

    whole = run(tmp_path / "whole")
    assert (whole.state.global_step, whole.state.max_steps) == (6, 20)
    assert whole.stopped_early is not None and whole.stopped_early.best_step == 2
    for step in (2, 4, 6):
        again = run(tmp_path / f"from {step}", step)
        assert again.state.global_step == 6 and again.stopped_early == whole.stopped_early
        assert all(torch.equal(value, training.weights(whole)[name]) for name, value in training.weights(again).items())
    more = replace(recipe, early_stopping_patience=3)
    later = training.trainer(data, tmp_path / "later", evaluation=evaluation, recipe=more)
    later.run(checkpoint=tmp_path / "whole" / "checkpoint-6")
    assert later.state.global_step == 8


def test_a_checkpoint_is_written_where_none_was_due(tmp_path: Path) -> None:
    made = training.trainer(
        training.prepared(training.samples()),
        tmp_path,
        evaluation=training.prepared(training.samples(2)),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=4,
        early_stopping_patience=1,
        early_stopping_threshold=100.0,
    )
    made.run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_patience_may_change_in_a_resume_and_older_checkpoints_had_the_defaults() -> None:
    now = {"recipe": recipe_identity(LOSS, 1)}
    assert "early_stopping_patience" not in now["recipe"]
    older = {"recipe": {key: value for key, value in now["recipe"].items() if key != "label_smoothing_factor"}}
    assert differences(older, now) == []
    (line,) = differences(older, {"recipe": now["recipe"] | {"label_smoothing_factor": 0.1}})
    assert "label_smoothing_factor was 0.0 and is 0.1" in line


def test_a_run_says_why_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = f"train --base_model pocket --dataset demo_charts --output_dir {out} --max_steps 9 --max_train 16 "
    command += "--global_batch_size 4 --max_eval 4 --eval_steps 1 --save_steps 1 --early_stopping_patience 1 "
    command += "--early_stopping_threshold 9 --eval_benchmarks demo_charts --report_to none --feature_cache off "
    command += f"--cache_dir {tmp_path / 'cache'} --label_smoothing_factor 0.1 --lr_scheduler_type warmup_stable_decay"
    assert main(command.split()) == 0
    record = json.loads((out / "run.json").read_text())
    reason = record["stopped_early"]["reason"]
    assert record["steps"] == 2 and reason.startswith("stopped early after step 2: eval_loss did not improve on ")
    assert json.loads((out / "results.json").read_text())["stopped_early"] == record["stopped_early"]
    assert reason in capsys.readouterr().out
    assert "stopped early after step 2" in (out / "report.html").read_text()
    assert not (tmp_path / "cache" / "past_runs.jsonl").exists()
