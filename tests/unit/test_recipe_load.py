"""Layers of a recipe: file, flags, aliases, and what wins over what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from vlm_sft.common.errors import RecipeError
from vlm_sft.recipe.load import add_recipe_arguments, load_recipe, overrides_from, read_recipe
from vlm_sft.recipe.schedule import effective_global_batch_size
from vlm_sft.recipe.schema import KEYS, Recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(**values: object) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return write_recipe


def parse(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_recipe_arguments(parser)
    return overrides_from(parser.parse_args(argv))


def test_flags_are_parsed_and_win_over_the_file(write) -> None:
    flags = parse(
        "--learning_rate",
        "3e-4",
        "--max_steps",
        "-1",
        "--target_modules",
        "q_proj, k_proj,",
        "--bf16",
        "--gradient_checkpointing",
        "false",
        "--save_total_limit",
        "null",
        "--report_to",
        "none",
        "--load_best_model_at_end",
        "no",
        "--lora_r=8",
    )
    recipe = load_recipe(write(learning_rate=1e-5, lora_r=4, save_total_limit=2, seed=7), flags)
    assert recipe.learning_rate == 3e-4
    assert recipe.max_steps == -1
    assert recipe.target_modules == ("q_proj", "k_proj")
    assert recipe.bf16 is True
    assert recipe.gradient_checkpointing is False
    assert recipe.save_total_limit is None
    assert recipe.report_to == ("none",)
    assert recipe.load_best_model_at_end is False
    assert (recipe.lora_r, recipe.seed) == (8, 7)


def test_flags_that_are_not_given_leave_nothing() -> None:
    assert parse() == {}
    parser = argparse.ArgumentParser()
    parser.add_argument("--base_model", default="pocket")
    add_recipe_arguments(parser)
    assert overrides_from(parser.parse_args(["--seed", "3"])) == {"seed": "3"}


def test_every_key_has_a_flag_with_default_and_unit_in_its_help() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=4000))
    add_recipe_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "--learning_rate NUMBER highest learning rate [per optimizer step] (default: 0.0001) --vision_l" in text
    for key in KEYS.values():
        unit = f" [{key.unit}]" if key.unit else ""
        assert f"{key.help}{unit} (default: {key.default_text})" in text, key.name


def test_the_default_text_of_every_flag_gives_the_default() -> None:
    defaults = {key.name: key.default_text for key in KEYS.values()}
    assert load_recipe(None, defaults | {"warmup_ratio": "0.03"}) == Recipe()


def test_typed_overrides_are_checked_like_a_file() -> None:
    assert load_recipe(None, {"target_modules": ["a", "b"], "lora_r": 4}).target_modules == ("a", "b")
    with pytest.raises(RecipeError, match=r"--lora_r = 4\.5: wrong type"):
        load_recipe(None, {"lora_r": 4.5})


def test_aliases_are_mapped_and_noted(write) -> None:
    path = write(evaluation_strategy="epoch", lora_rank=4, num_epochs=3, lr=1e-3, lora_target_modules="q_proj")
    loaded = read_recipe(path)
    assert loaded.recipe.eval_strategy == "epoch"
    assert (loaded.recipe.lora_r, loaded.recipe.num_train_epochs) == (4, 3.0)
    assert loaded.recipe.learning_rate == 1e-3
    assert loaded.recipe.target_modules == ("q_proj",)
    assert f"lora_rank ({path}) is read as lora_r" in loaded.notes
    assert len(loaded.notes) == 5


def test_dictionary_round_trip_of_every_kind_of_batch_and_warmup(write) -> None:
    for values in (
        {},
        {"warmup_steps": 20},
        {"lr_scheduler_type": "constant"},
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "global_batch_size": 32},
        {"load_best_model_at_end": True, "eval_steps": 30, "report_to": ["wandb", "tensorboard"]},
        {"max_pixels": 50000, "bf16": False, "max_steps": 4},
    ):
        recipe = load_recipe(write(**values))
        stored = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
        assert load_recipe(write(**stored)) == recipe
        assert list(stored) == list(KEYS)


def test_warmup_of_the_later_layer_wins(write) -> None:
    assert load_recipe(write(warmup_steps=10)).warmup_ratio == 0.0
    loaded = read_recipe(write(warmup_ratio=0.1), {"warmup_steps": "10"})
    assert (loaded.recipe.warmup_ratio, loaded.recipe.warmup_steps) == (0.0, 10)
    assert "warmup_ratio 0.1" in loaded.notes[0]
    recipe = load_recipe(write(warmup_steps=10), {"warmup_ratio": "0.1"})
    assert (recipe.warmup_ratio, recipe.warmup_steps) == (0.1, 0)
    assert load_recipe(write(warmup_ratio=0.1), {"lr_scheduler_type": "constant"}).warmup_ratio == 0.0


def test_best_model_takes_the_missing_half_along(write) -> None:
    recipe = load_recipe(write(load_best_model_at_end=True, eval_steps=40))
    assert (recipe.eval_steps, recipe.save_steps) == (40, 40)
    loaded = read_recipe(CONFIGS / "sft_config_best.json", {"save_steps": "20"})
    assert (loaded.recipe.eval_steps, loaded.recipe.save_steps) == (20, 20)
    assert "eval_steps 250" in loaded.notes[0] and "becomes 20" in loaded.notes[0]
    loaded = read_recipe(CONFIGS / "sft_config_best.json", {"eval_strategy": "epoch"})
    assert loaded.recipe.save_strategy == "epoch"
    assert len(loaded.notes) == 1


def test_global_batch_size_does_not_depend_on_the_devices() -> None:
    for devices in (1, 2, 8):
        assert effective_global_batch_size(Recipe(), devices) == 64
    recipe = load_recipe(CONFIGS / "sft_config_best.json", {"per_device_train_batch_size": "2"})
    assert effective_global_batch_size(recipe, 8) == 64


def test_classic_batch_keys_mean_what_they_mean_elsewhere(write) -> None:
    recipe = load_recipe(write(per_device_train_batch_size=4, gradient_accumulation_steps=3))
    assert recipe.global_batch_size is None
    assert [effective_global_batch_size(recipe, n) for n in (1, 2, 8)] == [12, 24, 96]
    loaded = read_recipe(write(per_device_train_batch_size=4))
    assert effective_global_batch_size(loaded.recipe, 2) == 8
    assert "gradient_accumulation_steps is 1" in loaded.notes[0]
    loaded = read_recipe(write(gradient_accumulation_steps=2))
    assert effective_global_batch_size(loaded.recipe, 2) == 32


def test_classic_pair_of_the_command_line_replaces_the_global_batch_of_the_file() -> None:
    flags = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "2"}
    loaded = read_recipe(CONFIGS / "sft_config.json", flags)
    assert effective_global_batch_size(loaded.recipe, 2) == 16
    assert "global_batch_size 64" in loaded.notes[0]


def test_global_batch_of_the_command_line_replaces_the_classic_pair_of_the_file(write) -> None:
    path = write(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    recipe = load_recipe(path, {"global_batch_size": "32"})
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (4, None)
    assert effective_global_batch_size(recipe, 8) == 32


def test_all_three_batch_keys_must_agree_on_the_devices_at_hand(write) -> None:
    path = write(global_batch_size=64, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    recipe = load_recipe(path)
    assert effective_global_batch_size(recipe, 2) == 64
    with pytest.raises(RecipeError, match=r"is 64, but .* 8 x .* 4 x 1 devices is 32"):
        effective_global_batch_size(recipe, 1)


def test_best_is_greatest_is_derived_from_the_name() -> None:
    assert Recipe().best_is_greatest is False
    assert Recipe(metric_for_best_model="eval_accuracy").best_is_greatest is True
    assert Recipe(metric_for_best_model="eval_accuracy", greater_is_better=False).best_is_greatest is False


COMMENTED = """{
  // one pass, gently
  "learning_rate": 2e-4, /* as in the paper:
     https://example.org/a */
  "num_train_epochs": 1,
  "report_to": "none", // "tensorboard"
  "target_modules": ["q_proj", "v_proj"]
}
"""
YAML = """# one pass, gently
learning_rate: 2e-4
num_train_epochs: 1
report_to: none   # tensorboard
target_modules: [q_proj, v_proj]
"""


@pytest.mark.parametrize(
    ("name", "text"), [("r.json", COMMENTED), ("r.jsonc", COMMENTED), ("r.yaml", YAML), ("r.yml", YAML)]
)
def test_comments_and_yaml_give_the_recipe_of_plain_json(name: str, text: str, tmp_path: Path, write) -> None:
    (tmp_path / name).write_text(text)
    values = {"learning_rate": 2e-4, "num_train_epochs": 1, "report_to": "none", "target_modules": ["q_proj", "v_proj"]}
    assert load_recipe(tmp_path / name) == load_recipe(write(**values))


def test_yaml_means_what_json_means(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: false\nmax_train: null\n")
    recipe = load_recipe(path)
    assert (recipe.eval_strategy, recipe.save_strategy, recipe.max_train) == ("no", "no", None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.yaml", "seed: 1\nseed: 2\n", ["seed = 1 and 2", "given 2 times"]),
        ("r.yaml", "seed: 1\n  lora_r: 2\n", ["not YAML at line 2 column 9"]),
        ("r.yaml", "a: &a [1]\nseed: *a\n", ["not YAML at line 2", "alias"]),
        ("r.yaml", "seed: !!python/object/apply:os.getcwd []\n", ["not YAML at line 1", "python/object"]),
        ("r.yaml", "learning_rat: 1\n", ["unknown key", "did you mean learning_rate?"]),
        ("r.yaml", "lora_r: '8'\nbf16: yes\n", ['lora_r = "8"', 'bf16 = "yes"']),
        ("r.yaml", "- 1\n", ["not an object"]),
        ("r.json", '{"seed": 1, // here\n "lora_r": }', ["not JSON at line 2 column 12"]),
        ("r.json", '{"seed": "http://x"}', ['seed = "http://x"']),
        ("r.json", '{"seed": 1 /* open }', ["not JSON at line 1 column 12"]),
    ],
)
def test_mistakes_in_them_are_told_by_place(name: str, text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError) as told:
        load_recipe(tmp_path / name)
    assert all(word in str(told.value) for word in words), told.value


def test_a_missing_yaml_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(YAML)
    with pytest.raises(RecipeError, match="did you mean .*mine.yaml"):
        load_recipe(tmp_path / "mime.yaml")
