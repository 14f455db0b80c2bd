"""An evaluation from the cache gives the answers of one without, and the next model finds the images prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_sft.cli.main import main

QUESTIONS = 24


def evaluate(folder: Path, name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """The predictions of pocket, and what run.json says about the caches."""
    command = ["eval", "--base_model", "pocket", "--benchmark", "demo_charts", "--limit", str(QUESTIONS)]
    assert main([*command, "--output_dir", str(folder / name), *arguments]) == 0
    engine = json.loads((folder / name / "run.json").read_text())["engine"]
    return (folder / name / "demo_charts" / "predictions.jsonl").read_text(), engine


def test_cached_answers_are_the_same_and_images_are_looked_at_once(tmp_path: Path) -> None:
    cache = ("--cache_dir", str(tmp_path / "cache"))
    plain, without = evaluate(tmp_path, "plain", *cache, "--prepared_cache", "off", "--feature_cache", "off")
    assert not without["feature_cache"]["evaluation"]["used"]
    assert without["processed_images"] == 0
    first, filled = evaluate(tmp_path, "first", *cache)
    images = len({json.loads(line)["image"] for line in plain.splitlines()})
    assert filled["feature_cache"]["evaluation"]["computed"] == filled["processed_images"] == images
    second, found = evaluate(tmp_path, "second", *cache)
    assert (found["feature_cache"]["evaluation"]["computed"], found["processed_images"]) == (0, 0)
    assert found["feature_cache"]["evaluation"]["used"]
    assert plain == first == second


def test_a_wrong_switch_is_told(tmp_path: Path, capsys: Any) -> None:
    command = ["eval", "--base_model", "pocket", "--benchmark", "demo_charts", "--output_dir", str(tmp_path)]
    assert main([*command, "--prepared_cache", "maybe"]) == 2
    assert "--prepared_cache 'maybe': neither on nor off" in capsys.readouterr().err
