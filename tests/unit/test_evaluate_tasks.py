"""What an evaluation asks, its limits, and the guard argument."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pictures import png
from vlm_sft.common.errors import DataError, EvaluationError, RecipeError
from vlm_sft.data.encode import Encoder
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.evaluate.guard import Guard, judge, parse_guards, tradeoff
from vlm_sft.evaluate.metrics import BENCHMARKS
from vlm_sft.evaluate.own_metrics import RULE_NAMES
from vlm_sft.evaluate.tasks import dataset_text, load_tasks, names_of, parse_token_limits, too_short, with_limits
from vlm_sft.model.load import find_base
from vlm_sft.recipe.load import load_recipe
from vlm_sft.recipe.metric_names import EVALUATION_METRICS


def test_metric_names_of_recipes_are_those_of_the_benchmarks() -> None:
    published = [benchmark.metric_name for benchmark in BENCHMARKS.values()]
    assert EVALUATION_METRICS == ("eval_loss", *dict.fromkeys([*published, *RULE_NAMES]))


@pytest.mark.parametrize("name", ["easy_vqa", "demo_charts", "demo_text"])
def test_every_answer_that_the_package_brings_along_has_room_on_pocket(name: str) -> None:
    if name == "easy_vqa":
        pytest.importorskip("easy_vqa")
    base = find_base("pocket")
    plain = Encoder(base.processor, base.prompt).chat.plain
    tasks, _ = load_tasks(parse_datasets(name), None, None)
    assert too_short(with_limits(tasks, base.prompt, plain, {})) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("12", {"chartqa": 12, "easy_vqa": 12}),
        ("chartqa=64", {"chartqa": 64}),
        ("chartqa=64, easy_vqa=2", {"chartqa": 64, "easy_vqa": 2}),
    ],
)
def test_token_limits(text: str | None, expected: dict[str, int]) -> None:
    assert parse_token_limits(text, ["chartqa", "easy_vqa"]) == expected


def test_all_mistakes_of_token_limits_come_together() -> None:
    with pytest.raises(EvaluationError) as caught:
        parse_token_limits("textvqa=3,chartqa=0,7", ["chartqa", "easy_vqa"])
    told = str(caught.value)
    for part in ("'textvqa' is not evaluated", "'chartqa=0' is not a positive number", "'7' names no benchmark"):
        assert part in told
    with pytest.raises(EvaluationError, match="not a positive number"):
        parse_token_limits("", ["chartqa"])


def test_dataset_text_round_trips_without_weights(tmp_path: Path) -> None:
    own = tmp_path / "mine.jsonl"
    own.write_text("")
    text = f"demo:2,label@{own}:3,{tmp_path}"
    specs = parse_datasets(text)
    again = parse_datasets(dataset_text(specs))
    assert [(spec.name, spec.path) for spec in again] == [(spec.name, spec.path) for spec in specs]
    assert names_of(again) == ["demo_charts", "demo_text", "label", specs[2].name]


def test_a_broken_image_is_drawn_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"image": name, "question": name, "answer": "x"} for name in ("good.png", "bad.png")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,), left_out = load_tasks(parse_datasets(str(tmp_path)), None)
    assert [sample.question for sample in task.samples] == ["good.png"]
    assert (task.samples[0].images[0].width, task.samples[0].images[0].height) == (12, 8)
    assert [item.reason for item in left_out] == ["image cannot be read"]


def test_guards() -> None:
    assert parse_guards("textvqa:2.0,demo:0.5") == [
        Guard("textvqa", "textvqa", 0.02),
        Guard("demo_charts", "demo_charts", 0.005),
        Guard("demo_text", "demo_text", 0.005),
    ]
    with pytest.raises(EvaluationError) as caught:
        parse_guards("textvqa,easy_vqa:x,chartqa:1,chartqa:2,demo:-1")
    told = str(caught.value)
    for part in ("'textvqa' does not", "'easy_vqa:x' does not", "'demo:-1' does not", "'chartqa' is named twice"):
        assert part in told
    with pytest.raises(DataError, match="did you mean textvqa"):
        parse_guards("textqa:2")


def rows(scores: list[float]) -> list[dict[str, object]]:
    return [{"id": index, "image": f"i{index // 2}", "score": score} for index, score in enumerate(scores)]


def test_a_loss_on_too_few_images_is_called_so_and_disqualifies_nothing() -> None:
    guard = Guard("own", "own", 0.0)
    few = judge(guard, rows([1.0] * 8), rows([0.0] * 8))  # four images, everything lost: p = 1/16
    assert few["p_value"] == pytest.approx(1 / 16) and few["qualifies"] and few["too_few"]
    enough = judge(guard, rows([1.0] * 10), rows([0.0] * 10))
    assert enough["p_value"] == pytest.approx(1 / 32) and not enough["qualifies"] and not enough["too_few"]
    entries = [{"step": step, "value": 0.5, "guards": [few], "qualifies": True} for step in (1, 2)]
    assert tradeoff("eval_loss", entries, 2).count("too few to judge") == 1


def test_a_large_loss_disqualifies_and_a_small_or_unsure_one_does_not() -> None:
    guard = Guard("textvqa", "textvqa", 0.02)
    base = rows([1.0] * 150 + [0.0] * 50)
    forgot = judge(guard, base, rows([1.0] * 110 + [0.0] * 90))
    assert not forgot["qualifies"]
    assert forgot["lost_points"] == pytest.approx(20.0)
    assert forgot["p_value"] < 0.001
    within = judge(guard, base, rows([1.0] * 147 + [0.0] * 53))
    assert within["qualifies"]
    unsure = judge(guard, base, rows([1.0] * 145 + [0.0] * 55))  # 2.5 points: more than allowed, not shown to be
    assert unsure["qualifies"]
    assert unsure["p_value"] > 0.05
    gained = judge(guard, base, rows([1.0] * 200))
    assert gained["qualifies"]
    assert gained["lost_points"] == pytest.approx(-25.0)
    entries = [
        {"step": 10, "value": 0.5, "guards": [within], "qualifies": True},
        {"step": 20, "value": 0.7, "guards": [forgot], "qualifies": False},
    ]
    table = tradeoff("exact_match", entries, 10).splitlines()
    assert "best" in table[2]
    assert "lost too much" in table[3]
    assert "55.0 (+20.0, 0.000)" in table[3]


@pytest.mark.parametrize(
    ("changes", "guard", "samples", "expected"),
    [
        ({"metric_for_best_model": "textvqa_accuracy"}, None, None, "is of no benchmark in --dataset demo_charts"),
        ({"metric_for_best_model": "eval_loss_demo_charts"}, None, None, "of no data set beside others"),
        ({}, "textvqa:1", None, "load_best_model_at_end is false"),
        ({"eval_strategy": "no"}, None, 5, "--eval_samples needs evaluations"),
        ({}, None, 0, "--eval_samples 0 is below 1"),
    ],
)
def test_requests_that_cannot_be_met(
    changes: dict[str, object], guard: str | None, samples: int | None, expected: str
) -> None:
    from vlm_sft.planning.options import TrainOptions
    from vlm_sft.planning.validation_plan import check_request

    recipe = load_recipe(None, changes)
    options = TrainOptions(output_dir=Path("unused"), guard=guard, eval_samples=samples)
    with pytest.raises(RecipeError, match=expected):
        check_request(recipe, parse_datasets("demo_charts"), options)
