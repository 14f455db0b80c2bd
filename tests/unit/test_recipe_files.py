"""The five recipes carry exactly the published values, and the schema's defaults are those of sft_config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_sft.recipe.load import load_recipe, read_recipe
from vlm_sft.recipe.schema import KEYS, Recipe

CONFIGS = Path(__file__).parents[2] / "configs"

COLUMNS = (
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "dataloader_num_workers",
)
TABLE = {
    "sft_config_smoketest.json": (1, 2e-4, "linear", 0.03, 0.0, 500, 500, 1, False, 0),
    "sft_config_1epoch.json": (1, 2e-4, "linear", 0.03, 0.0, 500, 500, None, False, 0),
    "sft_config.json": (2, 1e-4, "linear", 0.03, 0.0, 500, 1000, None, False, 0),
    "sft_config_5epoch.json": (5, 5e-5, "cosine", 0.05, 0.01, 500, 500, 3, True, 0),
    "sft_config_best.json": (6, 4e-5, "cosine", 0.06, 0.01, 250, 250, 5, True, 2),
}
SHARED = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "max_grad_norm": 0.3,
    "optim": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "bf16": "auto",
    "gradient_checkpointing": "auto",
    "metric_for_best_model": "eval_loss",
    "seed": 42,
    "global_batch_size": 64,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj", "o_proj"],
}


@pytest.mark.parametrize("name", TABLE)
def test_file_holds_exactly_the_published_values(name: str) -> None:
    expected = dict(zip(COLUMNS, TABLE[name], strict=True)) | SHARED
    if "smoketest" in name:
        expected |= {"max_train": 512, "max_eval": 128}
    assert json.loads((CONFIGS / name).read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize("name", TABLE)
def test_file_loads_without_notes_and_keeps_its_values(name: str) -> None:
    loaded = read_recipe(CONFIGS / name)
    given = json.loads((CONFIGS / name).read_text(encoding="utf-8"))
    assert loaded.notes == []
    assert loaded.recipe.to_dict() == {key.name: key.default for key in KEYS.values()} | given | {
        "report_to": ["tensorboard"],
        "train": ["language"],
    }


def test_there_are_no_other_recipe_files() -> None:
    assert {path.name for path in CONFIGS.glob("sft_config*.json")} == set(TABLE)


def test_defaults_are_those_of_the_classic_recipe() -> None:
    assert load_recipe(None) == load_recipe(CONFIGS / "sft_config.json") == Recipe()


def test_every_key_is_documented() -> None:
    for key in KEYS.values():
        assert len(key.help) > 8, key.name
        assert key.allowed and key.metavar, key.name
        if key.kind == "whole number":
            assert key.range is not None, key.name
    assert KEYS["learning_rate"].allowed == "a number above 0 and at most 1"
    assert KEYS["max_steps"].allowed == "a whole number at least 1, or -1"
    assert KEYS["seed"].allowed == "a whole number at least 0 and at most 4294967295"
    assert KEYS["save_total_limit"].allowed.endswith("or null")


def test_the_room_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "import vlm_sft.recipe.load, vlm_sft.recipe.validation, vlm_sft.recipe.schema\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
