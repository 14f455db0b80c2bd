"""The guides show what was recorded: every table, figure and default is made again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

import recipe_documents
from recipe_documents import COMPARISON, DOCS, GUIDE, documents, fact, figures, fill, results, with_facts
from recipe_figures import draw, shown_data
from recipe_results import MEASURED
from vlm_sft.common.errors import RunError
from vlm_sft.recipe.schema import KEYS

AGAIN = "run python bench/recipes.py --tables"
ROW = {
    "arm": "recipe",
    "recipe": "1epoch",
    "variant": "as is",
    "overrides": {},
    "dataset": "a,b",
    "epochs": 1.0,
    "learning_rate": 2e-4,
    "seeds": [1, 2],
    "questions_seen": 700,
    "steps": 11,
    "wall_seconds": 61.2,
    "evaluate_seconds": 4.0,
    "peak_bytes": 2**30,
    "disk_bytes": {"adapter": 1, "checkpoints": 2048, "logs": 3},
    "device": "CPU",
    "benchmarks": {
        "a": {
            "accuracy": 0.25,
            "interval": [0.2, 0.3],
            "by_seed": [0.24, 0.26],
            "difference": 0.05,
            "difference_interval": [0.01, 0.09],
            "p_value": 0.01,
            "verdict": "better",
            "previous": {"difference": -0.01, "interval": [-0.02, 0.0], "verdict": "no significant difference"},
        }
    },
}
EMPTY = {
    "recipe": "best",
    "epochs": 6.0,
    "seeds": [],
    "benchmarks": {},
    "questions_seen": None,
    "wall_seconds": None,
    "peak_bytes": None,
    "disk_bytes": None,
    "device": None,
}
RESULT = {
    "made": "2026-01-02T03:04:05+00:00",
    "note": "a slow day",
    "git": {"hash": "abcdef123456", "dirty": False},
    "settings": {
        "base_model": "pocket",
        "dataset": "a,b",
        "benchmarks": ["a"],
        "max_train": 700,
        "max_eval": None,
        "seeds": [1, 2],
        "lora": {"r": 16, "alpha": 32, "target_modules": ["q_proj"]},
    },
    "base": {"benchmarks": {"a": {"n": 80, "metric": "m", "synthetic": True, "accuracy": 0.2, "interval": [0.1, 0.3]}}},
    "rows": [ROW, ROW | EMPTY],
}


def test_documents_are_those_of_the_recorded_results() -> None:
    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} and the recorded results differ: {AGAIN}"


def test_figures_show_the_recorded_numbers_and_nothing_else_is_there() -> None:
    for path, data in figures().items():
        assert shown_data(path) == data, f"{path.name} and the recorded results differ: {AGAIN}"
        assert f"]({path.relative_to(DOCS)})" in COMPARISON.read_text(encoding="utf-8")
    assert set(figures()) == set((DOCS / "figures").glob("quality_time-*.svg"))


def test_the_package_holds_the_same_results() -> None:
    recorded = {path.name: path.read_bytes() for path in results("recipes")}
    assert {path.name: path.read_bytes() for path in MEASURED.glob("*.json")} == recorded, AGAIN


def test_recorded_accuracies_are_means_over_seeds_and_stand_in_the_page() -> None:
    page = COMPARISON.read_text(encoding="utf-8")
    for result in results("recipes").values():
        for row in result["rows"]:
            assert set(row["seeds"]) <= set(result["settings"]["seeds"])
            for found in row["benchmarks"].values():
                assert len(found["by_seed"]) == len(row["seeds"])
                assert found["accuracy"] == pytest.approx(fmean(found["by_seed"]), abs=1e-9)
                assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
                assert f"| {100 * fmean(found['by_seed']):.1f} % [" in page


def test_another_number_in_a_record_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_documents, "RESULTS", tmp_path)
    (tmp_path / "recipes-pocket-a.json").write_text(json.dumps(RESULT))
    before = documents()[COMPARISON]
    changed = json.loads(json.dumps(RESULT))
    changed["rows"][0]["benchmarks"]["a"]["accuracy"] = 0.26
    (tmp_path / "recipes-pocket-a.json").write_text(json.dumps(changed))
    lines = [
        pair
        for pair in zip(before.splitlines(), documents()[COMPARISON].splitlines(), strict=True)
        if pair[0] != pair[1]
    ]
    assert lines == [
        (
            "| 1epoch | as is | 1 | 0.0002 | 2 | 25.0 % [20.0, 30.0] | +5.0 [+1.0, +9.0] better | -1.0 [-2.0, +0.0] |",
            "| 1epoch | as is | 1 | 0.0002 | 2 | 26.0 % [20.0, 30.0] | +5.0 [+1.0, +9.0] better | -1.0 [-2.0, +0.0] |",
        )
    ]


def test_tables_of_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_documents, "RESULTS", tmp_path)
    (tmp_path / "recipes-pocket-a.json").write_text(json.dumps(RESULT))
    page = documents()[COMPARISON]
    assert "| base |  |  |  |  | 20.0 % [10.0, 30.0] |  |  |" in page
    assert "| best | as is | 6 | 0.0002 | 0 | not run |  |  |" in page
    assert "| 1epoch | as is | 700 | 11 | 1 min 01 s | 4.0 s | 1.07 GB | 1 B | 2.05 kB | 3 B |" in page
    assert "training on 700 questions, evaluation on all questions" in page
    assert "commit abcdef1, 2026-01-02. Note: a slow day." in page
    ((path, data),) = figures().items()
    assert data == {"benchmarks": {"a": {"base": 20.0, "points": [["as is", "1epoch", 61.2, 25.0, 20.0, 30.0]]}}}
    drawn = tmp_path / path.name
    drawn.write_text(draw(data), encoding="utf-8")
    assert shown_data(drawn) == data
    assert draw(data) == draw(data)


def test_every_key_has_its_section_with_range_and_symptoms() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name, key in KEYS.items():
        section = text.partition(f"### `{name}`\n")[2].partition("\n#")[0]
        assert fact(key) in section, f"{name}: {AGAIN}"
        assert "- Recommended: " in section, name
        assert any(word in section for word in ("Too ", "Wrong value: ")), name


def test_a_key_without_a_section_is_named() -> None:
    text = GUIDE.read_text(encoding="utf-8").replace("### `lora_r`\n", "### `lora_rank`\n")
    with pytest.raises(RunError, match="without a section: lora_r; sections without a key: lora_rank"):
        with_facts(text)
    with pytest.raises(RunError, match="no marks <!-- costs: begin --> and"):
        fill("text", {"costs": "table"})
