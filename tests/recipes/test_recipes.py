"""All five recipes train through the command line on a small slice; what they leave on disk is what they promise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import tiny_models
from tests.faults.test_messages import rows, write
from vlm_sft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
REAL_ROWS = ROOT.parent / "shared" / "data" / "chartqa_real"
# file, epochs, save limit, loads the best
RECIPES = {
    "sft_config_smoketest": (1, 1, False),
    "sft_config_1epoch": (1, None, False),
    "sft_config": (2, None, False),
    "sft_config_5epoch": (5, 3, True),
    "sft_config_best": (6, 5, True),
}
STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen2_5_vl", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write(folder, list(rows(folder, 26)))


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def recipe_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, base: Path, data: Path, tmp_path: Path) -> None:
    epochs, limit, best = RECIPES[name]
    run = tmp_path / name
    code = main(
        [
            "train",
            "--sft_config",
            str(ROOT / "configs" / f"{name}.json"),
            "--base_model",
            str(base),
            "--dataset",
            str(data),
            "--output_dir",
            str(run),
            "--global_batch_size",
            "8",
            "--eval_benchmarks",
            "none",
            "--lora_r",
            "16",
            "--lora_alpha",
            "32",
            "--target_modules",
            "q_proj,v_proj,o_proj",
            "--flash_attn",
        ]
    )
    assert code == 0
    state = json.loads((run / "run.json").read_text())
    assert state["status"] == "finished"
    assert state["steps"] == epochs * STEPS_PER_EPOCH
    assert state["attention"] == "sdpa"
    assert state["kernels"] == {"dropout": "stepwise"}, "the kernel is for GPUs"
    assert state["engine"]["data_workers"] == recipe_of(name)["dataloader_num_workers"]
    recipe = json.loads((run / "recipe.json").read_text())
    given = recipe_of(name)
    assert {key: recipe[key] for key in given if key != "global_batch_size"} == {
        key: value for key, value in given.items() if key != "global_batch_size"
    } | ({"report_to": recipe["report_to"]} if "report_to" in given else {})
    steps = checkpoint_steps(run)
    # The schedule is clamped to one evaluation and one checkpoint an epoch.
    made = [STEPS_PER_EPOCH * (epoch + 1) for epoch in range(epochs)]
    evaluations = {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
    assert sorted(evaluations) == made
    assert set(steps) <= set(made)
    assert len(steps) == min(limit or len(made), len(made))
    if not best:
        assert steps == made[-len(steps) :]
        return
    winner = min(evaluations, key=lambda step: (evaluations[step], step))
    assert state["best"] == {"step": winner, "metric": "eval_loss", "value": evaluations[winner]}
    assert winner in steps
    kept = load_file(run / f"checkpoint-{winner}" / "adapter_model.safetensors")
    final = load_file(run / "adapter_model.safetensors")
    assert all((kept[key] == final[key]).all() for key in kept) and kept.keys() == final.keys()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_best_is_not_always_last(base: Path, tmp_path: Path) -> None:
    """The validation answers contradict the training ones: the first evaluation is the best, and it is what is kept."""
    lines = rows(tmp_path / "data", 30)
    for index, line in enumerate(lines):
        line["split"] = "validation" if index < 6 else "train"
        line["answer"] = "none" if index < 6 else "7777"
    data = write(tmp_path / "data", list(lines))
    run = tmp_path / "run"
    code = main(
        [
            "train",
            "--sft_config",
            str(ROOT / "configs" / "sft_config_best.json"),
            "--base_model",
            str(base),
            "--dataset",
            str(data),
            "--output_dir",
            str(run),
            "--global_batch_size",
            "8",
            "--eval_benchmarks",
            "none",
            "--learning_rate",
            "0.05",
            "--save_total_limit",
            "1",
            "--dataloader_num_workers",
            "0",
        ]
    )
    assert code == 0
    evaluations = {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
    winner = min(evaluations, key=lambda step: (evaluations[step], step))
    assert winner != max(evaluations), "the plan of this test failed: the last evaluation is the best"
    # The last checkpoint may stay beside the best one: it is what a resume needs.
    assert winner in checkpoint_steps(run)
    kept = load_file(run / f"checkpoint-{winner}" / "adapter_model.safetensors")
    final = load_file(run / "adapter_model.safetensors")
    assert all((kept[key] == final[key]).all() for key in kept)


@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason="the folder with real ChartQA rows is not here")
def test_real_chartqa_rows(base: Path, tmp_path: Path) -> None:
    """Real ChartQA rows train and evaluate through the real processor, and the report is written."""
    folder = tmp_path / "chartqa"
    folder.mkdir()
    for name in ("train", "validation"):
        shutil.copy(REAL_ROWS / f"{name}.parquet", folder)
    run = tmp_path / "run"
    code = main(
        [
            "train",
            "--base_model",
            str(base),
            "--dataset",
            f"chartqa@{folder}",
            "--output_dir",
            str(run),
            "--max_train",
            "24",
            "--max_eval",
            "12",
            "--global_batch_size",
            "8",
            "--num_train_epochs",
            "1",
            "--max_pixels",
            "50176",
        ]
    )
    assert code == 0
    results = json.loads((run / "results.json").read_text())["benchmarks"]["chartqa"]
    assert results["n"] == 12
    assert set(results["splits"]) == {"human", "augmented"}
    assert 0 <= results["tuned"]["accuracy"] <= 1
    facts = json.loads((run / "data.json").read_text())["train"]
    assert facts["samples"] == 24 and facts["images"] < 24
    assert (run / "report.html").is_file()
    rows_written = (run / "evaluation" / "tuned" / "chartqa" / "predictions.jsonl").read_text().splitlines()
    assert len(rows_written) == 12
