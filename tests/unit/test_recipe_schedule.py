"""The schedule that a recipe comes to on data of any size."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from tests.wording import line_with
from vlm_sft.recipe.load import load_recipe
from vlm_sft.recipe.schedule import rate_factor, resolve_schedule
from vlm_sft.recipe.schema import DECAYS, SCHEDULERS, Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_large_data_set_keeps_the_recipe_as_it_is() -> None:
    schedule = resolve_schedule(load_recipe(CONFIGS / "sft_config.json"), 1100)
    assert (schedule.total_steps, schedule.eval_steps, schedule.save_steps) == (2200, 500, 1000)
    assert schedule.warmup_steps == 66
    assert schedule.evaluation_steps() == [500, 1000, 1500, 2000, 2200]
    assert schedule.save_steps_list() == [1000, 2000, 2200]
    assert schedule.notes == []


def test_a_small_data_set_is_clamped_and_noted() -> None:
    schedule = resolve_schedule(load_recipe(CONFIGS / "sft_config_smoketest.json"), 8)
    assert (schedule.eval_steps, schedule.save_steps, schedule.total_steps) == (8, 8, 8)
    assert schedule.evaluation_steps() == schedule.save_steps_list() == [8]
    (note,) = schedule.notes
    assert line_with(note, "an epoch", "8 steps", "eval_steps 500", "save_steps 500", "every 8 steps")


def test_only_what_is_too_long_is_clamped() -> None:
    schedule = resolve_schedule(load_recipe(CONFIGS / "sft_config.json"), 700)
    assert (schedule.eval_steps, schedule.save_steps) == (500, 700)
    assert len(schedule.notes) == 1


def test_max_steps_ends_the_training_early() -> None:
    schedule = resolve_schedule(load_recipe(CONFIGS / "sft_config_best.json", {"max_steps": "10"}), 300)
    assert schedule.total_steps == 10
    assert schedule.evaluation_steps() == schedule.save_steps_list() == [10]
    assert line_with(schedule.notes[0], "max_steps 10 ", "0.0333 epochs")
    assert line_with(schedule.notes[1], "the training", "10 steps")


def test_strategies_epoch_and_no() -> None:
    schedule = resolve_schedule(Recipe(eval_strategy="epoch", save_strategy="no", num_train_epochs=2.5), 10)
    assert schedule.total_steps == 25
    assert schedule.evaluation_steps() == [10, 20, 25]
    assert schedule.save_steps_list() == []
    assert schedule.notes == []


@pytest.mark.parametrize(("epochs", "steps", "total"), [(0.1, 30, 3), (0.7, 10, 7), (1.01, 10, 11), (0.001, 5, 1)])
def test_fractional_epochs_are_rounded_up_once(epochs: float, steps: int, total: int) -> None:
    assert resolve_schedule(Recipe(num_train_epochs=epochs), steps).total_steps == total


def test_warmup_in_steps_is_held_within_the_training() -> None:
    assert resolve_schedule(Recipe(warmup_ratio=0.0, warmup_steps=7), 100).warmup_steps == 7
    schedule = resolve_schedule(Recipe(warmup_ratio=0.0, warmup_steps=70, num_train_epochs=1), 20)
    assert schedule.warmup_steps == 10
    assert line_with("\n".join(schedule.notes), "warmup", "70", "20", "10 steps")


def test_every_evaluation_of_the_best_recipe_can_be_loaded() -> None:
    for steps_per_epoch in (1, 3, 100, 249, 250, 251, 900):
        schedule = resolve_schedule(load_recipe(CONFIGS / "sft_config_best.json"), steps_per_epoch)
        assert schedule.evaluation_steps() == schedule.save_steps_list()


RECIPES = st.builds(
    Recipe,
    num_train_epochs=st.floats(0.05, 8),
    max_steps=st.one_of(st.just(-1), st.integers(1, 400)),
    warmup_ratio=st.floats(0, 0.99),
    warmup_steps=st.one_of(st.just(0), st.integers(1, 500)),
    eval_strategy=st.sampled_from(["steps", "epoch"]),
    save_strategy=st.sampled_from(["steps", "epoch"]),
    eval_steps=st.integers(1, 700),
    save_steps=st.integers(1, 700),
    load_best_model_at_end=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(RECIPES, st.integers(1, 200))
def test_schedule_properties(recipe: Recipe, steps_per_epoch: int) -> None:
    schedule = resolve_schedule(recipe, steps_per_epoch)
    total = schedule.total_steps
    if recipe.max_steps > 0:
        assert total == recipe.max_steps
    else:
        assert abs(total - recipe.num_train_epochs * steps_per_epoch) <= 1
    assert 0 <= schedule.warmup_steps <= total // 2
    for kind in SCHEDULERS:
        rates = [rate_factor(kind, schedule.warmup_steps, total, step) for step in range(total)]
        assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    for steps in (schedule.evaluation_steps(), schedule.save_steps_list()):
        assert steps[-1] == total
        assert all(1 <= early < late for early, late in pairwise(steps))
        for epoch in range(math.ceil(total / steps_per_epoch)):
            first, last = epoch * steps_per_epoch + 1, min((epoch + 1) * steps_per_epoch, total)
            assert any(first <= step <= last for step in steps)
    if recipe.load_best_model_at_end:
        assert schedule.save_steps % schedule.eval_steps == 0
        assert set(schedule.evaluation_steps()) <= set(schedule.save_steps_list())
    for name, strategy in (("eval_steps", recipe.eval_strategy), ("save_steps", recipe.save_strategy)):
        resolved, asked = getattr(schedule, name), getattr(recipe, name)
        assert 1 <= resolved <= min(steps_per_epoch, total)
        if strategy == "steps" and resolved != asked:
            assert schedule.notes


@pytest.mark.parametrize("decay_type", DECAYS)
@pytest.mark.parametrize(("kind", "lowest"), [("cosine_with_min_lr", 0.2), ("warmup_stable_decay", 0.2), ("cosine", 0)])
def test_schedules_behind_the_warmup_are_those_of_transformers(kind: str, lowest: float, decay_type: str) -> None:
    total, warmup, fall = 40, 5, 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    told = {
        "cosine": {},
        "cosine_with_min_lr": {"min_lr_rate": lowest},
        "warmup_stable_decay": {"num_decay_steps": fall, "min_lr_ratio": lowest, "decay_type": decay_type},
    }[kind]
    theirs = get_scheduler(kind, optimizer, warmup, total, told).lr_lambdas[0]
    how = {"lowest": lowest, "decay_ratio": fall / total, "decay_type": decay_type}
    for step in range(warmup, total + 1):
        assert rate_factor(kind, warmup, total, step, **how) == pytest.approx(theirs(step), abs=1e-12)
    assert rate_factor(kind, warmup, total, 0, **how) == 1 / 6


def test_a_stable_phase_falls_only_at_its_end() -> None:
    how = {"lowest": 0.1, "decay_ratio": 0.25, "decay_type": "linear"}
    rates = [rate_factor("warmup_stable_decay", 2, 8, step, **how) for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.55])
    whole = [rate_factor("warmup_stable_decay", 4, 8, step, decay_ratio=1.0, decay_type="linear") for step in range(8)]
    assert whole[4:] == pytest.approx([1, 0.75, 0.5, 0.25])
