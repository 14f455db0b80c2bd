"""Every kind of mistake in a recipe: its message, and that all of them come at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_sft.common.errors import RecipeError
from vlm_sft.recipe.load import load_recipe
from vlm_sft.recipe.schema import KEYS
from vlm_sft.recipe.validation import ALIASES


def message(path: Path | None, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def complaint(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.json"
    path.write_text(text, encoding="utf-8")
    told = message(path)
    assert str(path) in told
    assert "fix:" in told
    return told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"lora_r": 8,\n "seed": }', "not JSON at line 2 column 10"),
        ("", "not JSON at line 1 column 1"),
        ("[1, 2]", "holds [1, 2], not an object"),
        ('"text"', 'holds "text", not an object'),
        ("[" * 100_000, "not a recipe"),
        ('{"seed": ' + "9" * 5000 + "}", "not a recipe"),
        ('{"seed": 1, "lora_r": 8, "seed": 2}', "seed = 1 and 2: given 2 times"),
        ('{"seed": 1, "seed": 1, "seed": 1}', "seed = 1 and 1 and 1: given 3 times"),
        ('{"lr": 1e-4, "learning_rate": 1e-4}', "is learning_rate, which lr gives too"),
        ('{"lerning_rate": 1e-4}', "lerning_rate = 0.0001: unknown key; did you mean learning_rate?"),
        ('{"evaluation_strateg": "no"}', "did you mean eval_strategy?"),
        ('{"output_dir": "x"}', "it belongs on the command line: --output_dir"),
        ('{"fp16": true}', "float16 training is not offered; use bf16"),
        ('{"zzzz": {"a": 1}}', 'zzzz = {"a": 1}: unknown key; no known key is near to it'),
    ],
)
def test_mistake_in_the_form_of_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"learning_rate": "2e-4"', '"2e-4": wrong type (text); allowed: a number above 0 and at most 1'),
        ('"learning_rate": true', "wrong type (true or false)"),
        ('"learning_rate": null', "null is not allowed"),
        ('"learning_rate": NaN', "learning_rate = NaN: not a finite number"),
        ('"learning_rate": 1e999', "learning_rate = Infinity: not a finite number"),
        ('"learning_rate": -Infinity', "not a finite number"),
        ('"learning_rate": 0', "learning_rate = 0: out of range"),
        ('"learning_rate": 2', "out of range"),
        ('"warmup_ratio": 1.0', "warmup_ratio = 1.0: out of range; allowed: a number at least 0 and below 1"),
        ('"adam_beta2": 1', "out of range"),
        ('"loss_type": "ce"', 'not one of the choices; allowed: one of "nll", "dft"'),
        ('"neftune_noise_alpha": -1', "out of range"),
        ('"label_smoothing_factor": 1', "label_smoothing_factor = 1: out of range"),
        ('"min_lr_ratio": 1.5', "a number at least 0 and at most 1"),
        ('"lr_decay_ratio": 0', "a number above 0 and at most 1"),
        ('"lr_decay_type": "sqrt"', 'not one of the choices; allowed: one of "1-sqrt", '),
        ('"early_stopping_patience": 0', "a whole number at least 1, or null"),
        ('"early_stopping_threshold": -1', "out of range"),
        ('"max_grad_norm": -0.1', "out of range"),
        ('"max_grad_norm": 1' + "0" * 400, "out of range"),
        ('"lora_r": true', "lora_r = true: wrong type (true or false); allowed: a whole number"),
        ('"lora_r": 8.5', "wrong type (a number with a fraction)"),
        ('"lora_r": [8]', "wrong type (a list)"),
        ('"lora_r": {}', "wrong type (an object)"),
        ('"max_steps": 0', "max_steps = 0: out of range; allowed: a whole number at least 1, or -1"),
        ('"max_steps": -2', "out of range"),
        ('"save_total_limit": 0', "save_total_limit = 0: out of range; allowed: a whole number at least 1, or null"),
        ('"seed": 4294967296', "out of range"),
        ('"max_pixels": 128', "out of range"),
        ('"load_best_model_at_end": 1', "load_best_model_at_end = 1: wrong type (a whole number)"),
        ('"load_best_model_at_end": "true"', "wrong type (text); allowed: true or false"),
        ('"bf16": "yes"', 'wrong type (text); allowed: "auto", true or false'),
        ('"eval_strategy": "step"', 'not one of the choices; allowed: one of "steps", "epoch", "no"'),
        ('"eval_strategy": false', "wrong type (true or false)"),
        ('"optim": "adam"', "not one of the choices"),
        ('"metric_for_best_model": "eval_chart_score"', 'not one of the choices; allowed: one of "eval_loss", '),
        ('"metric_for_best_model": "textvqa_accuracy", "eval_strategy": "no"', "this metric is never measured"),
        ('"metric_for_best_model": "exact_match", "greater_is_better": false', "the checkpoint that answers worst"),
        ('"metric_for_best_model": "eval_loss_"', "not one of the choices"),
        ('"metric_for_best_model": "eval_loss_mine", "greater_is_better": true', "the highest loss would be the best"),
        ('"metric_for_best_model": "eval_loss_mine", "eval_strategy": "no"', "this metric is never measured"),
        ('"report_to": ["tensorbord"]', '"tensorbord" is not one of the choices'),
        ('"target_modules": ""', "no name in it"),
        ('"target_modules": ["q_proj", " "]', "an empty name in it"),
        ('"target_modules": ["q_proj", 3]', "not a list of texts"),
        ('"target_modules": 3', "wrong type (a whole number)"),
    ],
)
def test_mistake_in_one_value(tmp_path: Path, text: str, expected: str) -> None:
    told = complaint(tmp_path, "{" + text + "}")
    assert expected in told
    assert told.startswith("a mistake in the recipe\n")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "without evaluations there is no best checkpoint"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "without checkpoints the best one cannot be loaded"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
            "where nothing is saved",
        ),
        ({"load_best_model_at_end": True, "eval_steps": 300, "save_steps": 500}, "eval_steps = 300, save_steps = 500"),
        ({"load_best_model_at_end": True, "eval_steps": 500, "save_steps": 1000}, "on a step that is never saved"),
        ({"load_best_model_at_end": True, "eval_steps": 500, "save_steps": 250}, "make save_steps equal to eval_steps"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "without evaluations nothing says when to stop"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "dft weights the loss of the right token alone"),
        ({"greater_is_better": True}, "the checkpoint with the highest loss would be the best"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "two lengths for one warmup"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "the constant schedule has no warmup"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 10}, "use constant_with_warmup"),
        ({"max_steps": 10, "warmup_steps": 10}, "the training ends before the warmup does"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "the smallest area is above the largest"),
        ({"report_to": ["none", "wandb"]}, "none and a tracker together"),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size = 6, gradient_accumulation_steps = 2: no number of devices",
        ),
        ({"global_batch_size": 64, "per_device_train_batch_size": 65}, "no number of devices gives this global batch"),
        ({"global_batch_size": None}, "no number of devices gives this global batch"),
    ],
)
def test_contradiction(tmp_path: Path, values: dict[str, object], expected: str) -> None:
    told = complaint(tmp_path, json.dumps(values))
    assert expected in told
    assert all(name in told for name in values)


def test_a_contradiction_between_layers_says_where_each_value_is_from(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"eval_steps": 500, "save_steps": 1000}')
    told = message(path, {"load_best_model_at_end": "true"})
    assert "load_best_model_at_end = true (command line)" in told
    assert f"save_steps = 1000 ({path})" in told


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(
        '{"lora_r": 0, "seed": "x", "sed": 1, "weight_decay": NaN, "warmup_ratio": 0.1, "warmup_steps": 3,'
        ' "optim": "adamw_torch", "optim": "adafactor"}'
    )
    told = message(path, {"learning_rate": "fast", "lora_dropout": "1", "sead": "4"})
    assert told.startswith("9 mistakes in the recipe\n")
    for part in (
        "lora_r = 0",
        'seed = "x"',
        "sed = 1",
        "weight_decay = NaN",
        "warmup_steps = 3",
        "optim = ",
        '--learning_rate = "fast"',
        '--lora_dropout = "1"',
        '--sead = "4"',
    ):
        assert told.count(part) == 1, part


def test_a_broken_file_does_not_hide_the_mistakes_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    told = message(tmp_path / "recipe.json", {"lora_r": "zero"})
    assert "2 mistakes" in told and "not JSON at line 1" in told and '--lora_r = "zero"' in told


def test_a_broken_value_is_not_blamed_a_second_time(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"metric_for_best_model": "eval_points", "greater_is_better": true}')
    assert message(path).startswith("a mistake in the recipe")


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("learning_rate", "2e-4x", "wrong type (text)"),
        ("learning_rate", "nan", "not a finite number"),
        ("lora_r", "8.0", "wrong type (text); allowed: a whole number"),
        ("load_best_model_at_end", "maybe", "allowed: true or false"),
        ("bf16", "half", 'allowed: "auto", true or false'),
        ("lora_r", "null", "wrong type (text)"),
        ("target_modules", " , ", "no name in it"),
    ],
)
def test_mistake_on_the_command_line_names_the_flag(flag: str, text: str, expected: str) -> None:
    told = message(None, {flag: text})
    assert f"command line: --{flag} = " in told
    assert expected in told


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "the file does not exist; check its path" in message(tmp_path / "nowhere" / "recipe.json")
    (tmp_path / "sft_config_best.json").write_text("{}")
    assert f"did you mean {tmp_path / 'sft_config_best.json'}?" in message(tmp_path / "sft_config_bst.json")
    assert "cannot be read (Is a directory)" in message(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"optim": "\xe9"}')
    assert "not UTF-8 text (byte 11)" in message(tmp_path / "latin.json")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"lora_r": 4}')
    assert load_recipe(tmp_path / "bom.json").lora_r == 4


def test_long_values_are_shortened(tmp_path: Path) -> None:
    told = complaint(tmp_path, json.dumps({"seed": "x" * 5000}))
    assert len(told) < 400


def test_aliases_lead_to_keys_and_hide_none() -> None:
    assert set(ALIASES.values()) <= set(KEYS)
    assert not set(ALIASES) & set(KEYS)
