"""`--metric`: built-in rules and functions of the user for own data, from training to comparison."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

import vlm_sft as vs
from tests.pictures import COLOURS, png
from tests.unit.test_sources_published import table
from vlm_sft.cli.main import main
from vlm_sft.common.errors import EvaluationError, RecipeError
from vlm_sft.data.sources.spec import parse_datasets
from vlm_sft.evaluate.metrics import BENCHMARKS
from vlm_sft.evaluate.own_metrics import RULES, metric_text, parse_metrics, recorded_sources, rule_of
from vlm_sft.planning.fingerprint import differences
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.validation_plan import check_request, own_rules, plan_validation
from vlm_sft.recipe.load import load_recipe

BY_LENGTH = '''
def length(prediction: str, answers: list[str], row: dict | None) -> float:
    """How near an answer is to the wanted length of its row."""
    assert row["question"] and row["answers"] == answers and "score" not in row
    return 1 / (1 + abs(len(prediction) - row["wanted"]["length"]))


def half(prediction, answers):
    return 0.5


def broken(prediction, answers, row):
    return {}[prediction]


def large(prediction, answers, row):
    return 2
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A working directory with a module of metrics of its own name, and own data."""
    module = f"rules_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(BY_LENGTH)
    rows = []
    for index, colour in enumerate(COLOURS):
        (tmp_path / f"{index}.png").write_bytes(png(colour, (56, 56)))
        split = ("train", "train", "validation", "test")[index % 4]
        row = {"image": f"{index}.png", "question": f"Colour {index}?", "answer": colour, "wanted": {"length": index}}
        rows.append(row | {"id": str(index), "split": split})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_SFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path, module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(out: str, metric: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    flags = ["--base_model", "pocket", "--benchmark", "mine.jsonl", "--output_dir", out, "--metric", metric]
    assert main(["eval", *flags, "--max_new_tokens", "4"]) == 0
    return json.loads(Path(out, "mine/results.json").read_text()), lines(Path(out, "mine/predictions.jsonl"))


def test_own_data_names_its_rule_from_training_to_comparison(
    place: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, module = place
    name = f"{module}:length"
    trained = ["train", "--base_model", "pocket", "--dataset", "mine.jsonl", "--output_dir", "run", "--metric", name]
    trained += ["--metric_for_best_model", name, "--guard", "mine.jsonl:100", "--max_steps", "2", "--eval_steps", "1"]
    trained += ["--save_steps", "1", "--load_best_model_at_end", "true", "--early_stopping_patience", "5"]
    assert main([*trained, "--report_to", "none", "--max_new_tokens", "4", "--warmup_ratio", "0"]) == 0
    told = [row[f"eval_{name}"] for row in lines(folder / "run/metrics.jsonl") if f"eval_{name}" in row]
    assert len(told) == 2 and all(0 < value <= 1 for value in told)
    guard = json.loads((folder / "run/guard.json").read_text())
    assert guard["metric"] == name and [entry["value"] for entry in guard["evaluations"]] == pytest.approx(told)
    row = json.loads((folder / "run/results.json").read_text())["benchmarks"]["mine"]
    manifest = json.loads((folder / "run/checkpoint-1/manifest.json").read_text())
    source = manifest["identity"]["metrics"][name]
    assert row["metric"] == name and len(source) == 64
    (folder / f"{module}.py").write_text(BY_LENGTH + "\n# another version\n")
    now = {"recipe": None, "base_model": "pocket", "metrics": recorded_sources(parse_metrics(name, ["mine"]).values())}
    assert differences(manifest["identity"], now) == [f"--metric {name}: its source is another one"]
    (folder / f"{module}.py").write_text(BY_LENGTH)

    results, rows = evaluated("base", name)
    assert results["metric"] == name and results["metric_sha256"] == source
    apart = [abs(len(one["prediction"]) - one["wanted"]["length"]) for one in rows]
    assert [one["score"] for one in rows] == [1 / (1 + far) for far in apart]
    assert results["accuracy"] == row["base"]["accuracy"]
    again, anew = evaluated("base", "anls")  # nothing is asked again
    assert again["metric"] == "anls" and [one["prediction"] for one in anew] == [one["prediction"] for one in rows]
    assert again["seconds"] == results["seconds"] and "wanted" not in anew[0]
    evaluated("base", name)

    capsys.readouterr()
    assert main(["compare", "base", "run", "--output_dir", "one"]) == 0
    assert json.loads(Path("one/compare.json").read_text())["comparisons"][0]["metric"] == name
    evaluated("other", f"mine={module}:half")
    assert main(["compare", "base", "other"]) == 2
    assert f"different metrics: {name} and {module}:half" in capsys.readouterr().err
    assert main(["compare", "base", "other", "--metric", "exact_match", "--output_dir", "two"]) == 0
    assert json.loads(Path("two/compare.json").read_text())["comparisons"][0]["metric"] == "exact_match"
    path = folder / "other/mine/results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metric": name, "metric_sha256": "another"}))
    assert main(["compare", "base", "other"]) == 2
    assert f"{name} by different versions of its source" in capsys.readouterr().err


def test_score_takes_a_rule_and_a_function(place: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, module = place
    row = {"id": 1, "prediction": "4th", "answers": ["5th"], "question": "?", "wanted": {"length": 3}}
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    for rule, score in (("anls", 2 / 3), ("relaxed_accuracy", 0.0), (f"{module}:length", 1.0), (f"{module}:half", 0.5)):
        assert main(["score", "--metric", rule, "--predictions", "p.jsonl", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["metric"], result["accuracy"]) == (rule, pytest.approx(score))
    assert vs.score(None, "p.jsonl", metric=f"{module}:length")[0]["accuracy"] == 1.0
    assert vs.score(None, ["12"], ["12.5"], metric="relaxed_accuracy")["relaxed_accuracy"]["accuracy"] == 1.0
    assert vs.score(None, ["a"], ["A"], metric=first_letter)[0]["accuracy"] == 1.0
    with pytest.raises(EvaluationError, match="either a benchmark or a metric"):
        vs.score("chartqa", ["a"], ["a"], metric="anls")
    for function, words in (("broken", ["KeyError", "'4th'", "line 13", " on 1"]), ("large", ["gave 2", " on 1"])):
        assert main(["score", "--metric", f"{module}:{function}", "--predictions", "p.jsonl"]) == 2
        told = capsys.readouterr().err
        assert all(word in told for word in words), told

    (folder / f"{module}.py").write_text(BY_LENGTH.replace("0.5", "0.25"))
    assert vs.score(None, "p.jsonl", metric=f"{module}:half")[0]["accuracy"] == 0.25


def first_letter(prediction: str, answers: Sequence[str], row: dict[str, Any] | None = None) -> float:
    return float(prediction[:1].lower() == answers[0][:1].lower())


def test_functions_of_python_are_named_by_their_module() -> None:
    assert metric_text(first_letter) == f"{__name__}:first_letter" and metric_text("anls") == "anls"
    with pytest.raises(EvaluationError, match="no name in a module"):
        metric_text(lambda prediction, answers: 1.0)


@pytest.mark.parametrize(
    ("text", "own", "words"),
    [
        ("anls", [], ["no own data"]),
        ("chartqa=anls", ["mine"], ["'chartqa' is no own data set", "NAME=RULE of mine"]),
        ("anls,squad_f1", ["mine"], ["one entry too many"]),
        ("mine=anls,mine=squad_f1", ["mine"], ["one entry too many"]),
        ("anl", ["mine"], ["no rule 'anl'", "did you mean anls?"]),
        ("no_such_module_here:f", ["mine"], ["importing no_such_module_here failed", "no_such_module_here.py below"]),
        ("json:nothing", ["mine"], ["has no such function", "def metric(prediction: str"]),
        ("json:decoder", ["mine"], ["not a function of two or three"]),
    ],
)
def test_mistakes_in_the_flag(text: str, own: list[str], words: list[str]) -> None:
    with pytest.raises(EvaluationError) as told:
        parse_metrics(text, own)
    assert all(word in str(told.value) for word in words), told.value


def test_a_module_that_fails_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_rules_of_mine.py").write_text("import json\n\n1 / 0\n")
    (tmp_path / "bad_syntax_of_mine.py").write_text("def f(:\n")
    with pytest.raises(EvaluationError, match=r"ZeroDivisionError: division by zero \(.*bad_rules_of_mine.py line 3\)"):
        rule_of("bad_rules_of_mine:f")
    with pytest.raises(EvaluationError, match=r"SyntaxError: .*bad_syntax_of_mine.py, line 1"):
        rule_of("bad_syntax_of_mine:f")
    assert str(tmp_path) not in sys.path


def test_a_rule_that_cannot_score_the_data_is_refused_before_a_question_is_asked(
    place: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base_model", "pocket", "--benchmark", "mine.jsonl", "--output_dir", "out"]
    assert main(["eval", *flags, "--metric", "vqa_accuracy"]) == 2
    told = capsys.readouterr().err
    assert "mine.jsonl line 4: 'answers' holds 1, but mine needs exactly 10" in told
    assert main(["eval", *flags, "--metric", f"{place[1]}:broken"]) == 2
    told = capsys.readouterr().err
    assert "on 'mine/3'" in told and "KeyError: 'white'" in told
    assert not Path("out/mine").exists()


def test_the_metric_that_chooses_belongs_to_the_data(place: tuple[Path, str]) -> None:
    specs = parse_datasets("mine.jsonl,demo_charts")
    options = TrainOptions(output_dir=Path("unused"), metric="squad_f1")
    assert own_rules(options, specs)["mine"].metric_name == "squad_f1" and set(RULES) >= {"squad_f1", "anls"}
    assert check_request(load_recipe(None, {"metric_for_best_model": "squad_f1"}), specs, options) == []
    with pytest.raises(RecipeError, match="squad_f1, demo_charts_relaxed_accuracy; --metric"):
        check_request(load_recipe(None, {"metric_for_best_model": "exact_match"}), specs, options)
    with pytest.raises(RecipeError, match="metric_for_best_model mine:f is of no benchmark"):
        check_request(load_recipe(None, {"metric_for_best_model": "mine:f"}), specs, options)


@pytest.mark.parametrize(
    ("name", "split", "row"),
    [
        ("ai2d", "test", {"question": "What?", "options": ["a fox", "a hare"], "answer": "1"}),
        ("docvqa", "validation", {"question": "Who?", "answers": ["ITC"], "question_types": ["form"]}),
    ],
)
def test_a_benchmark_that_is_not_trained_on_chooses_and_guards(
    place: tuple[Path, str], name: str, split: str, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Most published benchmarks have questions for a test only, so they cannot be in --dataset."""
    there = f"{name}@{table(place[0] / name, split, [row] * 4)}"
    specs, metric = parse_datasets("mine.jsonl"), BENCHMARKS[name].metric_name
    recipe = load_recipe(None, {"metric_for_best_model": metric, "load_best_model_at_end": True})
    for options in (
        TrainOptions(output_dir=Path("unused"), eval_benchmarks=there, eval_samples=3),
        TrainOptions(output_dir=Path("unused"), guard=f"{there}:2", eval_samples=3),
    ):
        plan, left_out = plan_validation(recipe, specs, check_request(recipe, specs, options), options)
        assert plan is not None and [task.name for task in plan.tasks] == ["mine", name] and not left_out
        assert [len(task.samples) for task in plan.tasks] == [2, 3] and plan.metric == metric
        assert ("test questions only" in capsys.readouterr().err) is (split == "test")
    with pytest.raises(RecipeError, match="in --dataset mine@mine.jsonl, --eval_benchmarks or --guard"):
        check_request(recipe, specs, TrainOptions(output_dir=Path("unused")))


def test_a_training_is_chosen_by_ai2d(place: tuple[Path, str]) -> None:
    row = {"question": "What?", "options": ["a fox", "a hare"], "answer": "1"}
    there = f"ai2d@{table(place[0] / 'ai2d', 'test', [row] * 4)}"
    flags = ["--base_model", "pocket", "--dataset", "mine.jsonl", "--output_dir", "run", "--report_to", "none"]
    flags += ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    flags += ["--eval_benchmarks", there, "--metric_for_best_model", "ai2d_accuracy", "--guard", f"{there}:100"]
    assert main(["train", *flags, "--warmup_ratio", "0", "--max_new_tokens", "4"]) == 0
    (told,) = [row["eval_ai2d_accuracy"] for row in lines(Path("run/metrics.jsonl")) if "eval_ai2d_accuracy" in row]
    guard = json.loads(Path("run/guard.json").read_text())
    assert guard["metric"] == "ai2d_accuracy" and guard["evaluations"][0]["value"] == told
    assert guard["evaluations"][0]["guards"][0]["benchmark"] == "ai2d" and guard["best_step"] == 1


def test_multiple_choice_of_own_records_finds_its_options(place: tuple[Path, str]) -> None:
    from vlm_sft.evaluate.tasks import load_tasks

    folder, _ = place
    row = {"image": "0.png", "question": "Which?\nA. red\nB. blue", "answer": "B", "options": ["red", "blue"]}
    Path("quiz.jsonl").write_text(json.dumps(row | {"split": "test"}) + "\n")
    (task,), _ = load_tasks(parse_datasets("quiz.jsonl"), None, own_rules=parse_metrics("multiple_choice", ["quiz"]))
    sample = task.samples[0]
    assert task.benchmark.score("blue", sample.answers, sample.metadata["record"]) == 1.0
    Path("quiz.jsonl").write_text(json.dumps(row | {"split": "test", "options": "red, blue"}) + "\n")
    with pytest.raises(EvaluationError, match="quiz.jsonl line 1: 'options' is text, not a list of texts"):
        load_tasks(parse_datasets("quiz.jsonl"), None, own_rules=parse_metrics("multiple_choice", ["quiz"]))


def test_a_sweep_compares_by_a_rule_of_own_data_and_scores_by_it(place: tuple[Path, str]) -> None:
    from vlm_sft.cli.parser import build_parser
    from vlm_sft.cli.sweep import sweep_options
    from vlm_sft.search.sweep import Sweep
    from vlm_sft.search.trials import WAITING, SweepTrial

    base = ["sweep", "--dataset", "mine.jsonl", "--grid", "lora_r=4,8"]
    for metric, scored_by in (("anls", "anls"), ("eval_loss", None)):
        swept = Sweep(sweep_options(build_parser().parse_args([*base, "--metric", metric])))
        words = swept.words(swept.settings[0], SweepTrial("one", "one", 1, WAITING), "")
        flags = dict(zip(words, words[1:], strict=False))
        assert flags["--metric_for_best_model"] == metric and flags.get("--metric") == scored_by
