"""`vlm-sft score`: the numbers, the bad lines, the streams, the memory."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wording import line_with
from vlm_sft.cli import score
from vlm_sft.common.errors import EvaluationError, RunError
from vlm_sft.evaluate.scoring import score_file, score_item, summarise
from vlm_sft.evaluate.statistics import mean_interval

CHART_LINES = [
    {"id": 1, "prediction": "21", "answers": ["20"], "split": "human"},
    {"id": "b", "prediction": "no", "answers": ["Yes"], "split": "human"},
    {"id": 3, "prediction": "1990", "answers": ["2015"], "split": "augmented"},
    {"id": "vier", "prediction": " Yes ", "answers": ["yes"]},
]


def write_lines(path: Path, lines) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def run_score(*flags) -> int:
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    return score.run(parser.parse_args([str(flag) for flag in flags]))


def test_json_on_stdout_and_scores_by_item(tmp_path, capsys):
    predictions = write_lines(tmp_path / "p.jsonl", CHART_LINES)
    per_item = tmp_path / "deep" / "scores.jsonl"
    assert run_score("--benchmark", "chartqa", "--predictions", predictions, "--per_item", per_item, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["metric"]) == ("chartqa", "chartqa_relaxed_accuracy")
    assert (result["n"], result["accuracy"]) == (4, 0.75)
    assert result["interval"] == pytest.approx(mean_interval([1.0, 1.0, 1.0, 0.0]))
    assert {name: (part["n"], part["accuracy"]) for name, part in result["splits"].items()} == {
        "augmented": (1, 1.0),
        "human": (2, 0.5),
    }
    assert result["secondary"] == {"strict_year_accuracy": 0.5, "exact_match": 0.25}
    assert (result["skipped"], result["duplicate_ids"]) == (0, 0)
    assert [json.loads(line) for line in per_item.read_text().splitlines()] == [
        {"id": 1, "score": 1.0},
        {"id": "b", "score": 0.0},
        {"id": 3, "score": 1.0},
        {"id": "vier", "score": 1.0},
    ]
    assert sorted(path.name for path in per_item.parent.iterdir()) == ["scores.jsonl"]


def test_table_for_people(tmp_path, capsys):
    run_score("--benchmark", "chartqa", "--predictions", write_lines(tmp_path / "p.jsonl", CHART_LINES))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["chartqa_relaxed_accuracy", "n"],
        ["all", "4"],
        ["split", "augmented"],
        ["split", "human"],
    ]
    assert "75.0 %" in lines[1] and "strict_year_accuracy" in lines[4]


def test_graded_scores(tmp_path):
    answers = ["stop"] * 3 + ["go"] * 7
    lines = [{"id": index, "prediction": text, "answers": answers} for index, text in enumerate(["Stop.", "go", "x"])]
    result = score_file("textvqa", write_lines(tmp_path / "p.jsonl", lines))
    assert result["accuracy"] == pytest.approx(1.9 / 3)
    assert result["interval"] == pytest.approx(mean_interval([0.9, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": 1, "prediction": ', "is not JSON: Expecting value (column "),
        ("[1]", "is a list, not a JSON object"),
        ('{"prediction": "a", "answers": ["a"]}', "has no 'id'"),
        ('{"id": 1}', "has no 'prediction' and no 'answers'"),
        ('{"id": null, "prediction": "a", "answers": ["a"]}', "'id' is null, not text or an integer"),
        ('{"id": 1.5, "prediction": "a", "answers": ["a"]}', "'id' is a number, not text or an integer"),
        ('{"id": true, "prediction": "a", "answers": ["a"]}', "'id' is true or false, not text or an integer"),
        ('{"id": 1, "prediction": 62, "answers": ["62"]}', "'prediction' is a number, not text; put it in quotes"),
        ('{"id": 1, "prediction": null, "answers": ["62"]}', "'prediction' is null, not text"),
        ('{"id": 1, "prediction": "a", "answers": "a"}', "'answers' is text, not a list of texts"),
        ('{"id": 1, "prediction": "a", "answers": []}', "'answers' is empty"),
        ('{"id": 1, "prediction": "a", "answers": ["a", 5]}', "answer 2 of 'answers' is a number, not text"),
        ('{"id": 1, "prediction": "a", "answers": ["a"], "split": 3}', "'split' is a number, not text"),
        ("[" * 100_000, "is not JSON that can be read"),
        ('{"id": ' + "9" * 5000 + ', "prediction": "a", "answers": ["a"]}', "is not JSON that can be read"),
    ],
)
def test_bad_line_is_named_with_its_reason(tmp_path, line, reason):
    predictions = write_lines(tmp_path / "p.jsonl", [CHART_LINES[0], "", line])
    with pytest.raises(EvaluationError) as error:
        score_file("chartqa", predictions)
    assert str(predictions) in str(error.value) and line_with(str(error.value), "line 3: ", reason)
    assert error.value.exit_code == 2


def test_wrong_number_of_answers(tmp_path):
    predictions = write_lines(tmp_path / "p.jsonl", [{"id": 1, "prediction": "a", "answers": ["a"] * 9}])
    with pytest.raises(EvaluationError, match="line 1: 'answers' .*9.*textvqa.*10"):
        score_file("textvqa", predictions)


def test_bytes_that_are_not_utf8(tmp_path):
    predictions = tmp_path / "p.jsonl"
    predictions.write_bytes(json.dumps(CHART_LINES[0]).encode() + b'\n{"id": 1, "prediction": "\xff"}\n')
    with pytest.raises(EvaluationError, match=r"line 2: is not UTF-8 \(byte 26\)"):
        score_file("chartqa", predictions)


def test_many_bad_lines_are_counted_and_nothing_is_written(tmp_path):
    predictions = write_lines(tmp_path / "p.jsonl", [CHART_LINES[0], *["oops"] * 25])
    with pytest.raises(EvaluationError) as error:
        score_file("chartqa", predictions, tmp_path / "scores.jsonl")
    text = str(error.value)
    assert "25 lines cannot be scored" in text and "... and 5 more" in text
    assert text.count("  line ") == 20
    assert "line 21:" in text and "line 22:" not in text
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_skip_bad_lines_scores_the_others_and_says_so(tmp_path, capsys):
    predictions = write_lines(tmp_path / "p.jsonl", ["oops", *CHART_LINES, '{"id": 9}'])
    assert run_score("--benchmark", "chartqa", "--predictions", predictions, "--json", "--skip_bad_lines") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["n"], result["accuracy"], result["skipped"]) == (4, 0.75, 2)
    assert "line 1: is not JSON" in captured.err and "line 6: has no 'prediction'" in captured.err


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_empty_file(tmp_path, lines):
    with pytest.raises(EvaluationError, match="is empty"):
        score_file("chartqa", write_lines(tmp_path / "p.jsonl", lines))


def test_only_bad_lines_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(EvaluationError, match="line 1: is not JSON"):
        score_file("chartqa", write_lines(tmp_path / "p.jsonl", ["oops"]), skip_bad_lines=True)


def test_windows_line_ends_byte_order_mark_and_line_separators(tmp_path):
    predictions = tmp_path / "p.jsonl"
    line = json.dumps({"id": "\u2028", "prediction": "a\u2028", "answers": ["a"]}, ensure_ascii=False)
    predictions.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}".encode())
    result = score_file("exact_match", predictions, tmp_path / "scores.jsonl")
    assert (result["n"], result["accuracy"], result["duplicate_ids"]) == (2, 1.0, 1)
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0]) == {"id": "\u2028", "score": 1.0}


def test_duplicate_ids_are_told_and_1_is_not_the_text_1(tmp_path, capsys):
    line = {"prediction": "a", "answers": ["a"]}
    lines = [{"id": 1, **line}, {"id": "1", **line}, {"id": 1, **line}]
    assert score_file("exact_match", write_lines(tmp_path / "p.jsonl", lines))["duplicate_ids"] == 1
    assert line_with(capsys.readouterr().err, "1 items repeat an earlier id")


def test_predictions_that_cannot_be_read(tmp_path):
    with pytest.raises(EvaluationError, match="missing.jsonl.*No such file"):
        score_file("chartqa", tmp_path / "missing.jsonl")
    with pytest.raises(EvaluationError, match="cannot read .*Is a directory"):
        score_file("chartqa", tmp_path)


def test_per_item_never_overwrites_the_predictions_or_a_folder(tmp_path):
    predictions = write_lines(tmp_path / "p.jsonl", CHART_LINES)
    before = predictions.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(predictions)
    for target in (predictions, tmp_path / "link.jsonl", tmp_path, predictions / "scores.jsonl"):
        with pytest.raises(RunError, match="cannot write"):
            score_file("chartqa", predictions, target)
    assert predictions.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl", "p.jsonl"]


MEASURE = """
import json, resource, sys
from vlm_sft.evaluate.scoring import score_file
result = score_file("textvqa", sys.argv[1], sys.argv[2])
print(json.dumps([result["n"], result["accuracy"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_memory_does_not_grow_with_the_lines(tmp_path):
    measured = []
    for count in (1_000, 200_000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as stream:
            for index in range(count):
                answers = [f"word {index % 50}"] * (index % 5) + ["other"] * (10 - index % 5)
                item = {"id": f"item-{index}", "prediction": f"Word, {index % 50}", "answers": answers}
                stream.write(json.dumps(item) + "\n")
        command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "scores.jsonl")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        measured.append(json.loads(done.stdout))
    (_, _, small), (n, accuracy, large) = measured
    assert n == 200_000
    assert accuracy == pytest.approx((0 + 0.3 + 0.6 + 0.9 + 1) / 5)
    assert (large - small) * 1024 < 30_000_000  # the file itself is over 30 MB
    assert source.stat().st_size > 30_000_000


ROWS = [
    {"id": 1, "image": "p", "prediction": "a", "answers": ["a"], "split": "human", "question_type": "colour"},
    {"id": 2, "image": "p", "prediction": "a", "answers": ["a"], "split": "human", "question_type": "count"},
    {"id": 3, "image": "q", "prediction": "b", "answers": ["a"], "split": "augmented", "question_type": "count"},
    {"id": 4, "image": None, "prediction": "a", "answers": ["a"], "split": "", "score": 0.0},
]


def test_summarise_groups_and_clusters():
    result = summarise("chartqa", iter(ROWS))
    assert (result["n"], result["accuracy"]) == (4, 0.75)  # a recorded score is not trusted
    assert result["interval"] == pytest.approx(mean_interval([1, 1, 0, 1], ["p", "p", "q", "r"]))
    assert result["splits"]["human"] == {"n": 2, "accuracy": 1.0, "interval": list(mean_interval([1.0]))}
    assert {name: part["n"] for name, part in result["by_question_type"].items()} == {"colour": 1, "count": 2}
    assert result["secondary"]["exact_match"] == 0.75
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("benchmark", "rows", "message"),
    [
        ("chartqa", [], "nothing to score"),
        ("nope", ROWS, "no benchmark 'nope'"),
        ("textvqa", ROWS, "item 1 'answers' holds 1"),
        ("chartqa", [{"id": 7, "prediction": "x"}], "item 7 has no 'answers'"),
        ("chartqa", ["row"], "item 'row' is text"),
    ],
)
def test_summarise_refuses(benchmark, rows, message):
    with pytest.raises(EvaluationError, match=message):
        summarise(benchmark, rows)


def test_score_item_takes_the_recorded_score_only_where_no_rule_is_known():
    assert score_item("chartqa", {"id": 1, "prediction": "a", "answers": ["a"], "score": 0.0}) == 1.0
    assert score_item("my_own", {"id": 1, "score": 0.25}) == 0.25
    for value in (None, True, "1", float("nan")):
        with pytest.raises(EvaluationError, match="item 1 has no 'score'"):
            score_item("my_own", {"id": 1, "score": value})
