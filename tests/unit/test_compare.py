"""`vlm-sft compare`: pairing, tests, verdicts, files."""

import argparse
import json
import random

import pytest
from scipy.stats import binomtest

from tests.wording import line_with
from vlm_sft.cli import compare as verb
from vlm_sft.common import artifacts
from vlm_sft.common.errors import EvaluationError, RunError
from vlm_sft.evaluate.compare import compare_rows, compare_runs, few_line, locate_predictions
from vlm_sft.evaluate.comparison_table import format_markdown, format_table
from vlm_sft.evaluate.statistics import mean_interval, paired_test


def rows_with(scores, per_image=1, **more):
    return [
        {
            "id": f"q{index}",
            "image": f"i{index // per_image}",
            "question": f"what | {index}?",
            "answers": ["yes"],
            "prediction": "yes" if right else "no",
            "score": float(right),
            **more,
        }
        for index, right in enumerate(scores)
    ]


def write_run(folder, benchmark, rows):
    artifacts.write_jsonl(folder / benchmark / artifacts.PREDICTIONS, rows)
    return folder


BASE = [1] * 50 + [0] * 50
BETTER = [1] * 47 + [0] * 3 + [1] * 20 + [0] * 30
SAME = [1] * 48 + [0] * 2 + [1] * 3 + [0] * 47


def test_rows_are_paired_by_id_in_any_order():
    base, tuned = rows_with(BASE), rows_with(BETTER)
    random.Random(0).shuffle(tuned)
    result = compare_rows(base, tuned)
    assert result["n"] == 100
    assert result["difference"] == pytest.approx(0.17)
    assert result["interval"][0] < 0.17 < result["interval"][1]
    assert result["p_value"] == pytest.approx(binomtest(20, 23).pvalue) and result["test"] == "McNemar exact"
    assert result["verdict"] == "better"
    assert result["lost"] == ["q47", "q48", "q49"]
    assert result["gained"] == [f"q{index}" for index in range(50, 70)]
    assert compare_rows(tuned, base)["verdict"] == "worse"
    json.dumps(result, allow_nan=False)


def test_small_difference_is_not_called_one():
    result = compare_rows(rows_with(BASE), rows_with(SAME))
    assert result["verdict"] == "no significant difference"
    assert result["smallest_detectable_difference"] > abs(result["difference"])


def test_repeated_images_count_once():
    base, tuned = rows_with(BASE, per_image=10), rows_with(BETTER, per_image=10)
    result = compare_rows(base, tuned)
    clusters = [row["image"] for row in base]
    by_image = paired_test(BASE, BETTER, clusters)
    assert result["p_value"] == by_image.p_value == 0.5  # the gains sit on two images, the losses on one
    assert result["clusters"] == 10 and result["interval"][0] < 0 < result["interval"][1]
    assert result["verdict"] == "too few to judge"
    alone = compare_rows(rows_with(BASE), rows_with(BETTER))
    assert result["smallest_detectable_difference"] > 2 * alone["smallest_detectable_difference"]


def test_few_changes_on_repeated_images_do_not_count_as_proof():
    """Four gains out of ten: resampling would call it a difference, the exact test knows better."""
    base, tuned = [0] * 10, [1] * 4 + [0] * 6
    clusters = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    rows = [
        [{"id": index, "image": f"i{clusters[index]}", "score": score} for index, score in enumerate(scores)]
        for scores in (base, tuned)
    ]
    result = compare_rows(*rows)
    assert result["p_value"] == 2 / 2**4 and result["interval"][0] <= 0.0
    assert result["verdict"] == "too few to judge"
    assert (result["questions_needed"], result["clusters_needed"]) == (20, 18)
    line = few_line("own", 10, 9, result["difference"], (20, 18))
    assert line_with(line, "own: 10 questions on 9 independent images", "20 on 18", "40 points")
    assert line_with(few_line("own", 10, 9, 0.0, (60, 54)), "60 on 54", "10 points")


def test_graded_scores_use_the_same_test():
    base = [{"id": index, "score": 0.3} for index in range(60)]
    tuned = [{"id": index, "score": 0.6 if index % 2 else 0.3} for index in range(60)]
    result = compare_rows(base, tuned)
    assert result["test"] == "sign flips by image"
    assert result["difference"] == pytest.approx(0.15)
    assert result["verdict"] == "better"
    assert len(result["gained"]) == 30 and result["lost"] == []


def test_different_items_are_refused_with_counts_and_examples():
    base, tuned = rows_with([1] * 6), rows_with([1] * 9)[4:]
    with pytest.raises(EvaluationError) as error:
        compare_rows(base, tuned)
    assert line_with(
        str(error.value), "6 and 5 items", "4 only in the first ('q0', 'q1', 'q2', ...)", "('q6', 'q7', 'q8')"
    )


def test_same_ids_with_other_questions_are_refused():
    base, tuned = rows_with([1, 1]), rows_with([1, 1])
    tuned[1]["question"] = "another"
    with pytest.raises(EvaluationError, match=r"1 with another question.*'q1'"):
        compare_rows(base, tuned)


def test_repeated_ids_and_no_rows_are_refused():
    rows = rows_with([1, 1])
    with pytest.raises(EvaluationError, match="1 ids come twice"):
        compare_rows([*rows, rows[0]], rows)
    with pytest.raises(EvaluationError, match="no scores"):
        compare_rows([], [])


def test_folders_of_runs(tmp_path):
    write_run(tmp_path / "run" / "evaluation" / "base", "chartqa", rows_with(BASE))
    write_run(tmp_path / "run" / "evaluation" / "tuned", "chartqa", rows_with(BETTER))
    write_run(tmp_path / "plain", "docvqa", rows_with(BASE))
    tuned = tmp_path / "run" / "evaluation" / "tuned"
    assert locate_predictions(tmp_path / "run") == {"chartqa": tuned / "chartqa" / artifacts.PREDICTIONS}
    assert locate_predictions(tmp_path / "run" / "evaluation" / "base")["chartqa"].parts[-3] == "base"
    assert list(locate_predictions(tmp_path / "plain")) == ["docvqa"]
    with pytest.raises(EvaluationError, match="nowhere holds no predictions"):
        locate_predictions(tmp_path / "nowhere")


def test_a_single_training_run_is_compared_with_its_base(tmp_path):
    run = tmp_path / "run"
    write_run(run / "evaluation" / "base", "chartqa", rows_with(BASE))
    write_run(run / "evaluation" / "tuned", "chartqa", rows_with(BETTER))
    (entry,) = compare_runs([run])["comparisons"]
    assert entry["difference"] == pytest.approx(0.17) and entry["verdict"] == "better"
    with pytest.raises(EvaluationError, match="only one run"):
        compare_runs([run / "evaluation" / "base"])
    with pytest.raises(EvaluationError, match="only one run"):
        compare_runs([run, f"{run}/."], baseline=run)


def test_holm_decides_the_verdicts_of_several_runs(tmp_path):
    base = write_run(tmp_path / "a", "chartqa", rows_with(BASE))
    narrow = [*BASE[:50], *[1] * 7, *[0] * 43]  # seven gained: p = 1 / 64
    runs = [write_run(tmp_path / f"run{number}", "chartqa", rows_with(narrow)) for number in range(4)]
    (alone,) = compare_runs([base, runs[0]])["comparisons"]
    assert alone["p_value"] == alone["p_holm"] == pytest.approx(1 / 64) and alone["verdict"] == "better"
    together = compare_runs([*runs, base], baseline=base)["comparisons"]
    assert [entry["run"] for entry in together] == [str(run) for run in runs]
    assert {entry["p_holm"] for entry in together} == {4 / 64}
    assert {entry["verdict"] for entry in together} == {"no significant difference"}


def test_scores_are_computed_by_the_rule_not_believed(tmp_path):
    base = write_run(tmp_path / "a", "chartqa", rows_with(BASE))
    boastful = write_run(tmp_path / "b", "chartqa", [row | {"score": 1.0} for row in rows_with(BASE)])
    (entry,) = compare_runs([base, boastful])["comparisons"]
    assert entry["difference"] == 0.0
    assert (entry["accuracy"], entry["accuracy_interval"]) == (0.5, list(mean_interval([1.0] * 50 + [0.0] * 50)))


def test_mistakes_of_all_pairs_are_told_together(tmp_path):
    base = write_run(write_run(tmp_path / "a", "chartqa", rows_with(BASE)), "easy_vqa", rows_with(BASE))
    other = write_run(write_run(tmp_path / "b", "chartqa", rows_with(BASE[:90])), "easy_vqa", rows_with(BASE[:80]))
    with pytest.raises(EvaluationError) as error:
        compare_runs([base, other])
    for name, items, alone in (("chartqa: ", "100 and 90 items", "10 only"), ("easy_vqa: ", "100 and 80", "20 only")):
        assert name in str(error.value) and line_with(str(error.value), items, alone)


def test_benchmarks_of_one_side_only_are_named(tmp_path):
    base = write_run(write_run(tmp_path / "a", "chartqa", rows_with(BASE)), "docvqa", rows_with(BASE))
    other = write_run(tmp_path / "b", "chartqa", rows_with(BASE))
    result = compare_runs([base, other])
    assert result["not_compared"] == [{"benchmark": "docvqa", "missing_in": str(other)}]
    assert line_with(format_table(result), "not compared: ", "docvqa", other)
    with pytest.raises(EvaluationError, match="evaluated no benchmark"):
        compare_runs([write_run(tmp_path / "c", "easy_vqa", rows_with(BASE)), other])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", EvaluationError, "is empty"),
        ('{"score": 1}\n', EvaluationError, "a row has no id"),
        ("[1]\n", EvaluationError, "a row has no id"),
        ('{"id": 1, "prediction": "a", "answers": ["a"]}\n' * 2, EvaluationError, "id 1 comes twice"),
        ('{"id": 1, "prediction": 5, "answers": ["a"]}\n', EvaluationError, "item 1 'prediction' is a number"),
        ('oops\n{"id": 1}\n', RunError, "line 1 is not JSON"),
    ],
)
def test_damaged_predictions(tmp_path, text, error, message):
    base = write_run(tmp_path / "a", "chartqa", rows_with(BASE))
    artifacts.write_text_atomic(tmp_path / "b" / "chartqa" / artifacts.PREDICTIONS, text)
    with pytest.raises(error, match=message):
        compare_runs([base, tmp_path / "b"])


def test_command_writes_both_files_and_prints_the_table(tmp_path, capsys):
    base = write_run(tmp_path / "a", "chartqa", rows_with(BASE))
    tuned = write_run(tmp_path / "b", "chartqa", rows_with(BETTER))
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    arguments = [str(tuned), "--baseline", str(base), "--output_dir", str(tmp_path / "out")]
    assert verb.run(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert f"baseline: {base}" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| chartqa"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["chartqa", "100", str(tuned)]
    assert cells[3] == "50.0 [40.4, 59.6]"
    assert cells[5].startswith("+17.0 [+")
    assert cells[8] == "better"
    written = artifacts.read_json(tmp_path / "out" / artifacts.COMPARE_JSON)
    (entry,) = written["comparisons"]
    assert entry["lost"][0] == {
        "id": "q47",
        "image": "i47",
        "question": "what | 47?",
        "answers": ["yes"],
        "baseline_prediction": "yes",
        "prediction": "no",
        "baseline_score": 1.0,
        "score": 0.0,
    }
    markdown = (tmp_path / "out" / artifacts.COMPARE_MARKDOWN).read_text()
    assert markdown == format_markdown(written)
    assert "### Score fell (right → wrong): 3" in markdown
    assert "### Score rose (wrong → right): 20" in markdown and "... and 10 more in compare.json" in markdown
    assert "what \\| 47?" in markdown
