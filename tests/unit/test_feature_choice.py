"""Whether vision features are kept: one rule for the measured decision and for the forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.data.engine_options import EngineOptions
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.distributed.launch import Launch
from vlm_sft.forecast.flops import Adapter, Work
from vlm_sft.forecast.hardware import Rates
from vlm_sft.forecast.memory import feature_bytes
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.shapes import find_published
from vlm_sft.forecast.time import image_seconds
from vlm_sft.model.feature_choice import FeatureCost
from vlm_sft.planning.forecast_inputs import RunData, forecast_inputs
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.run_plan import image_uses
from vlm_sft.planning.training_run import TrainingRun
from vlm_sft.recipe.load import load_recipe
from vlm_sft.recipe.schedule import resolve_schedule

COST = FeatureCost(1e6, 0.1, 0.01, 0.02)


@pytest.mark.parametrize(
    ("missing", "uses", "budget", "free", "objection"),
    [
        (10, 20, "auto", 1e9, ""),  # the tower is spared 10 times, which is more than 20 reads and 10 writes
        (10, 13, "auto", 1e9, "recomputing is faster"),
        (10, 14, "auto", 1e9, ""),
        (10, 10, 10**8, 1e9, ""),  # a budget of the user's is kept to, whether it pays or not
        (10, 20, "auto", 1e7, "10.0 MB do not fit into 5.00 MB"),
        (10, 20, 9 * 10**6, 1e9, "10.0 MB do not fit into 9.00 MB"),
        (0, 10, "auto", 0, ""),  # what is there already is used
    ],
)
def test_the_rule(missing: int, uses: float, budget: int | str, free: float, objection: str) -> None:
    found = COST.objection(10, missing, uses, budget, free)
    assert objection in found and bool(found) == bool(objection)


def samples(count: int, name: str) -> list[Sample]:
    return [
        Sample(f"{name}{index}", "set", "", (ImageRef(f"{name}{index}", name, bytes),), "What?", "it", ("it",))
        for index in range(count)
    ]


@pytest.mark.parametrize(("every", "kept"), [(1, True), (8, False)])
def test_the_forecast_counts_the_looks_of_evaluations(every: int, kept: bool, tmp_path: Path) -> None:
    """One epoch alone does not pay; evaluations that look at as many images again and again do."""
    recipe = load_recipe(
        None, {"num_train_epochs": 1, "global_batch_size": 8, "eval_steps": every, "save_strategy": "no"}
    )
    record: Any = None
    options = TrainOptions(output_dir=tmp_path, engine=EngineOptions(cache_dir=tmp_path))
    run = TrainingRun(options, recipe, [], Launch(0, 0, 1, True, None, "single"), record, None)
    planner = EpochPlanner((GroupLengths(118, (10,), (2,)),) * 64, 8, 2048, 1, 0)
    schedule = resolve_schedule(recipe, planner.steps_per_epoch)
    train, held_out = samples(64, "train"), samples(64, "eval")
    uses = image_uses(schedule, train, held_out, None)
    assert [(len(part), looks) for part, looks in uses] == [(64, 1.0), (64, 8 / every), (0, 8 / every)]
    facts = RunData(
        schedule, 64, planner, [100] * 64, planner, [100] * 64, train, held_out, lambda image: 100, None, 0.02
    )
    shape = find_published("Qwen/Qwen2.5-VL-3B-Instruct").shape
    rates = Rates("cpu", 1e11, 1e10, 1e-6, 64 * 10**9, False, "", 1.3)
    setting = Setting(shape, Adapter(16, ("q_proj",)), 4, False, rates)
    inputs = forecast_inputs(run, facts, None, (), setting, prepared_already=True)
    assert inputs.images.to_encode.count == 128 and inputs.images.keep_features is kept
    assert not inputs.images.keep_benchmark_features, "there is no benchmark"
    for adapter, possible in ((Adapter(16, (), projector_r=8), True), (Adapter(16, (), vision_r=8), False)):
        found = forecast_inputs(run, facts, None, (), replace(setting, adapter=adapter), prepared_already=True)
        assert found.images.keep_features is (kept and possible)
    before = replace(setting, adapter=Adapter(16, (), projector_r=8))
    assert feature_bytes(before, 100) == 100 * 4 * 1280 * 4 and feature_bytes(setting, 100) == 100 * 2048 * 4
    steps = [image_seconds(one, Work(visual=100), kept=True, training=True) for one in (setting, before)]
    assert steps[0] == 0 < steps[1] < image_seconds(before, Work(packs=1, visual=100), kept=False, training=True)
