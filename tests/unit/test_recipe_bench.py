"""The recipe benchmark: its trainings, their command lines, continuing, and what it makes of the run folders."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import recipe_runs
from recipe_results import averaged, collect, file_name
from recipe_runs import (
    RECIPES,
    Arm,
    Settings,
    ablation_arms,
    base_folder,
    claim,
    missing,
    recipe_arms,
    run_missing,
    train_command,
)
from tests.processes import MAIN, Warm
from vlm_sft.cli import train
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.recipe.load import overrides_from, read_recipe

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(
    base_model="pocket",
    dataset="demo_charts,demo_text",
    max_train=64,
    max_eval=8,
    seeds=(1, 2),
    learning_rate=2e-3,
    global_batch_size=None,
    launcher=(sys.executable, "-m", "vlm_sft"),
    flash_attn=False,
    work_dir=Path("work"),
)


def test_rows_of_the_recipes() -> None:
    arms = recipe_arms(SETTINGS)
    assert [(arm.kind, arm.recipe, arm.variant) for arm in arms] == [
        *(("recipe", name, "as is") for name in RECIPES),
        *(("recipe", name, "learning_rate 0.002") for name in RECIPES),
        ("first_only", "best", "learning_rate 0.002"),
    ]
    assert arms[-1].dataset == "demo_charts"
    plain = recipe_arms(replace(SETTINGS, learning_rate=None))
    assert [arm.variant for arm in plain] == ["as is"] * 6 and plain[-1].kind == "first_only"
    small_steps = recipe_arms(replace(SETTINGS, global_batch_size=16))[-1]
    assert small_steps.variant == "learning_rate 0.002, global_batch_size 16"
    assert small_steps.values()["global_batch_size"] == 16
    alone = recipe_arms(replace(SETTINGS, dataset="easy_vqa", learning_rate=None))
    assert [arm.kind for arm in alone] == ["recipe"] * 5
    assert len({arm.folder(Path("x"), seed) for arm in arms for seed in (1, 2)}) == 2 * len(arms)


def test_an_ablation_changes_one_thing_at_a_time() -> None:
    reference, *others = ablation_arms(SETTINGS)
    fixed = reference.values()
    assert fixed["learning_rate"] == 2e-3 and fixed["num_train_epochs"] == 6
    changes = [{key for key, value in arm.values().items() if value != fixed[key]} for arm in others]
    assert set.union(*changes) == {
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "weight_decay",
        "num_train_epochs",
        "lora_r",
        "lora_alpha",
        "target_modules",
    }
    assert all(len(changed) == 1 or changed == {"lora_r", "lora_alpha"} for changed in changes)
    assert [arm.values()["learning_rate"] for arm in others[:3]] == [2e-4, 6e-4, 6e-3]
    assert ablation_arms(replace(SETTINGS, learning_rate=None))[0].values()["learning_rate"] == 4e-5


def test_what_a_row_is_compared_with() -> None:
    arms = recipe_arms(SETTINGS)
    partners = [
        next((other for other in reversed(arms[:index]) if arm.is_compared_with(other)), None)
        for index, arm in enumerate(arms)
    ]
    assert partners[:5] == [None, *arms[:4]]
    assert partners[5:10] == [None, *arms[5:9]]
    assert partners[10:] == [arms[9]]


@pytest.mark.parametrize(
    ("recipe", "limit", "questions"),
    [("smoketest", 64, 64), ("smoketest", None, 512), ("best", 64, 64), ("best", None, None)],
)
def test_command_lines_are_those_of_the_program(recipe: str, limit: int | None, questions: int | None) -> None:
    arm = Arm("recipe", recipe, "x", {"learning_rate": 2e-3}, "demo_charts")
    words = train_command(replace(SETTINGS, max_train=limit, max_eval=limit), arm, 2)
    assert words[:4] == [*SETTINGS.launcher, "train"]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(words[4:])
    resolved = read_recipe(ROOT / args.sft_config, overrides_from(args)).recipe
    assert (resolved.lora_r, resolved.lora_alpha, resolved.learning_rate, resolved.seed) == (16, 32, 2e-3, 2)
    assert (resolved.max_train, resolved.max_eval) == (questions, limit)
    assert (args.dataset, args.eval_benchmarks, args.resume) == ("demo_charts", "demo_charts,demo_text", "auto")
    assert str(args.sft_config) == RECIPES[recipe]


def test_scores_are_means_over_seeds_by_question(tmp_path: Path) -> None:
    for seed, scores in ((1, [1.0, 0.0, 0.5]), (2, [1.0, 1.0, 0.0])):
        place = tmp_path / str(seed) / "evaluation" / "tuned" / "b"
        rows = [{"id": str(number), "score": score} for number, score in enumerate(scores)]
        artifacts.write_jsonl(place / "predictions.jsonl", rows if seed == 1 else reversed(rows))
    mean, by_seed = averaged([tmp_path / "1", tmp_path / "2"], "b")
    assert {row["id"]: row["score"] for row in mean} == {"0": 1.0, "1": 0.5, "2": 0.25}
    assert by_seed == pytest.approx([0.5, 2 / 3])


def test_file_names(tmp_path: Path) -> None:
    assert file_name("recipes", SETTINGS) == "recipes-pocket-demo_charts+demo_text.json"
    real = replace(SETTINGS, base_model="Qwen/Qwen2.5-VL-7B-Instruct", dataset=f"chartqa@{tmp_path},textvqa")
    assert file_name("ablation", real) == "ablation-Qwen_Qwen2.5-VL-7B-Instruct-chartqa+textvqa.json"


def test_a_command_that_fails_is_named_with_its_output(tmp_path: Path) -> None:
    recipe_runs.execute([sys.executable, "-S", "-c", "print('done')"], tmp_path / "logs" / "one.log")
    assert (tmp_path / "logs" / "one.log").read_text() == "done\n"
    with pytest.raises(RunError, match=r"two\.log"):
        recipe_runs.execute([sys.executable, "-S", "-c", "raise SystemExit(3)"], tmp_path / "two.log")


def test_a_real_benchmark_is_continued(tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of pocket through the command line, and another row that comes to the same."""

    def execute(command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        assert warm.start(command[command.index("vlm_sft") + 1 :], log, script=MAIN).wait(300) == 0, log.read_text()

    monkeypatch.setattr(recipe_runs, "execute", execute)
    settings = replace(SETTINGS, work_dir=tmp_path / "work", seeds=(1,))
    arms = recipe_arms(settings)[5:7]
    claim(settings)
    assert [arm.recipe for arm, _ in run_missing(settings, arms, 1)] == ["smoketest"]
    assert missing(settings, arms) == [(arms[1], 1)]
    first, unmeasured = collect("recipes", settings, arms)["rows"]
    assert (unmeasured["seeds"], unmeasured["benchmarks"], unmeasured["wall_seconds"]) == ([], {}, None)
    run = arms[0].folder(settings.work_dir, 1)
    shutil.copytree(run, arms[1].folder(settings.work_dir, 1))
    assert list(run_missing(settings, arms, None)) == []
    result = collect("recipes", settings, arms)
    assert result["rows"][0] == first
    for name in ("demo_charts", "demo_text"):
        base = _read(base_folder(settings) / name / "results.json")
        seen = _read(run / "evaluation" / "base" / name / "results.json")
        assert seen["seconds"] == base["seconds"], "the base was answered once"
        facts, scores = result["base"]["benchmarks"][name], first["benchmarks"][name]
        assert facts["n"] == scores["n"] == 8
        assert scores["difference"] == pytest.approx(scores["accuracy"] - facts["accuracy"])
        previous = result["rows"][1]["benchmarks"][name]["previous"]
        assert (previous["recipe"], previous["difference"], previous["p_value"]) == ("smoketest", 0.0, 1.0)
    assert (first["train_questions"], first["questions_seen"], first["steps"]) == (64, 64, 1)
    facts = _read(run / "run.json")
    assert first["wall_seconds"] == pytest.approx(facts["wall_seconds"] - facts["seconds"]["evaluate"], abs=0.01)
    assert first["disk_bytes"]["total"] == sum(facts["bytes"][key] for key in ("adapter", "checkpoints", "logs"))
    assert result["settings"]["base_parameters"] > 1_000_000
    with pytest.raises(RunError, match="holds runs with another max_train"):
        claim(replace(settings, max_train=65))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
