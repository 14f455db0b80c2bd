"""`vlm-sft sweep`: settings, the median rule, the winner's luck, what is recommended, and budgets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import ForecastError, RecipeError, RunError
from vlm_sft.distributed.launch import launch_words
from vlm_sft.evaluate.selection import score_of_chosen
from vlm_sft.forecast.estimate import Estimate
from vlm_sft.planning.options import TrainOptions
from vlm_sft.search.judgement import Measured, judge, paired_by_seed
from vlm_sft.search.median import too_poor
from vlm_sft.search.outlook import Outlook, total, within_budget
from vlm_sft.search.request import SweepOptions, SweepSetting, duration_seconds, grid_values, read_grid, settings_of
from vlm_sft.search.trial_queue import VISIBLE, environments
from vlm_sft.search.trials import start_process

METRIC = "demo_charts_relaxed_accuracy"


def options(**grid: str) -> SweepOptions:
    train = TrainOptions(output_dir=Path("outputs/none"), base_model="pocket", dataset="demo_charts")
    return SweepOptions(train, {key: grid_values(text) for key, text in grid.items()}, {})


def test_a_grid_is_every_combination_written_in_one_way() -> None:
    settings = settings_of(options(learning_rate="1e-4,0.0001,2e-4", lora_r="8,16"))
    assert [one.label for one in settings] == [
        "learning_rate=0.0001, lora_r=8",
        "learning_rate=0.0001, lora_r=16",
        "learning_rate=0.0002, lora_r=8",
        "learning_rate=0.0002, lora_r=16",
    ]
    assert settings[0].name == "learning_rate-0.0001_lora_r-8"


def test_values_with_commas_and_paths_have_folders_of_their_own() -> None:
    settings = settings_of(
        options(dataset="demo_charts;demo_charts,demo_text:0.2", target_modules="q_proj;q_proj,v_proj")
    )
    assert len(settings) == 4 and len({one.name for one in settings}) == 4
    assert all("/" not in one.name and "," not in one.name for one in settings)
    applied = settings[-1].applied(options().train)
    assert applied.dataset == "demo_charts,demo_text:0.2" and applied.overrides["target_modules"] == "q_proj,v_proj"


def test_what_cannot_be_varied_is_told_together() -> None:
    with pytest.raises(RunError) as told:
        read_grid(["learning_rat=1", "seed=1,2", "lora_r", "lr=1e-4", "learning_rate=2e-4"], "grid")
    text = str(told.value)
    assert "did you mean learning_rate?" in text and "--seeds repeats every setting" in text
    assert "'lora_r' has no values" in text and "learning_rate comes twice" in text
    with pytest.raises(RecipeError, match="the setting lora_r=0 cannot be trained"):
        settings_of(options(lora_r="8,0"))


@pytest.mark.parametrize(("text", "seconds"), [("90min", 5400), ("4h", 14_400), ("1.5 d", 129_600), ("30s", 30)])
def test_a_budget_has_a_unit(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds
    with pytest.raises(RunError, match="no duration"):
        duration_seconds(text.rstrip("smindh "))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--grid", "learning_rate=1e-4,-1"], "learning_rate=-1"),
        (["--grid", "lora_r=8,16", "--resume"], "--resume has no effect here"),
        ([], "--grid learning_rate=1e-4,2e-4"),
        (["--range", "learning_rate=1e-5:1e-3"], "--range is for --search optuna"),
        (["--search", "optuna", "--range", "learning_rate=1e-3:1e-5:log"], "is no range of numbers"),
        (["--grid", "lora_r=8,16", "--eval_strategy", "no", "--metric", "eval_loss"], "eval_strategy is no"),
        (["--grid", "dataset=demo_charts;demo_text", "--metric", "eval_loss"], "name a benchmark's metric"),
        (["--grid", "lora_r=8,16", "--seeds", "0"], "--seeds 0 is below 1"),
        (["--grid", "lora_r=,"], "--grid lora_r=',' has no values"),
        (["--grid", "lora_r=8,16", "--parallel", "0"], "--parallel 0 is below 1"),
        (["--grid", "lora_r=8,16", "--metric", "chartqa/relaxed_accuracy"], "chartqa_relaxed_accuracy"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--base_model", "pocket", "--dataset", "demo_charts", "--max_train", "8", "--max_eval", "4"]
    assert main(["sweep", *common, "--output_dir", str(tmp_path / "sweep"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sweep" / artifacts.TRIALS_FOLDER).exists()


def test_the_median_rule_is_that_of_vizier() -> None:
    finished = [[(0.25, 0.125), (0.5, 0.375), (1.0, 1.0)], [(0.25, 0.5), (0.5, 0.75), (1.0, 0.5)], [(0.5, 0.25)]]
    # Running means up to half of the training: 0.25, 0.625, 0.25; their median is 0.25.
    poor = too_poor([(0.25, 0.1), (0.5, 0.24)], finished, True, 3, 0.3)
    assert "50 %" in poor and "0.24" in poor and "3 finished" in poor
    assert not too_poor([(0.25, 0.25), (0.5, 0.1)], finished, True, 3, 0.3)  # its best counts; equal is not worse
    assert not too_poor([(0.25, 0.1)], finished, True, 2, 0.3)  # too early
    assert not too_poor([(0.5, 0.1)], finished, True, 4, 0.3)  # too few finished
    assert not too_poor([(0.5, 0.1), (1.0, 0.1)], finished, True, 3, 0.3)  # at its end anyway
    losses = [[(share, 2 - value) for share, value in curve] for curve in finished]
    assert too_poor([(0.5, 1.8)], losses, False, 3, 0.3) and not too_poor([(0.5, 1.75)], losses, False, 3, 0.3)


def test_the_luck_of_the_winner_is_taken_off() -> None:
    """Settings that are all worth 60 %: the best of eight looks better; the corrected score does not."""
    rng = np.random.default_rng(5)
    images = [number // 2 for number in range(160)]
    naive, corrected, covered = [], [], 0
    for seed in range(60):
        runs = [[(rng.random((3, 160)) < 0.6).astype(float)] for _ in range(8)]
        naive.append(max(float(run[0].mean(1).max()) for run in runs))
        found = score_of_chosen(runs, images, draws=200, seed=seed)
        assert found is not None
        corrected.append(found.value)
        covered += found.low <= 0.6 <= found.high
    assert np.mean(naive) > 0.66
    assert abs(np.mean(corrected) - 0.6) < 0.01
    assert covered >= 57


def test_a_setting_that_is_better_keeps_its_score() -> None:
    rng = np.random.default_rng(6)
    values = []
    for seed in range(40):
        runs = [[(rng.random((1, 200)) < share).astype(float)] for share in (0.5, 0.5, 0.8)]
        found = score_of_chosen(runs, range(200), draws=200, seed=seed)
        assert found is not None
        values.append(found.value)
    assert abs(np.mean(values) - 0.8) < 0.01
    assert score_of_chosen([[np.ones((1, 10))]], [0] * 10) is None  # one image: none to leave out


def test_a_paired_test_over_seeds_is_students() -> None:
    from scipy.stats import ttest_rel

    first, second = [1.0, 1.2, 0.9], [0.8, 0.9, 0.85]
    difference, low, high, p = paired_by_seed(first, second)
    known = ttest_rel(second, first)
    assert difference == pytest.approx(np.mean(second) - np.mean(first)) and p == pytest.approx(known.pvalue)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval()))
    assert paired_by_seed([1.0], [2.0])[3] == 1.0


def trained(folder: Path, shares: dict[int, list[float]], best: int | None = None) -> Path:
    """A run folder with validation answers: for each step the scores of its questions."""
    artifacts.write_json(folder / artifacts.RUN, {"best": {"step": best, "metric": METRIC} if best else None})
    artifacts.write_json(folder / artifacts.RECIPE, {"load_best_model_at_end": best is not None})
    for step, scores in shares.items():
        place = folder / artifacts.VALIDATION_FOLDER / f"step-{step}" / "demo_charts"
        rows: list[dict[str, Any]] = [
            {"id": f"q{n}", "image": f"i{n}", "question": "?", "answers": ["7"], "prediction": "7" if score else "x"}
            for n, score in enumerate(scores)
        ]
        artifacts.write_jsonl(place / artifacts.PREDICTIONS, rows)
        artifacts.write_json(place / artifacts.RESULTS, {"metric": METRIC})
    return folder


def measured(folder: Path, label: str, cost: float, *runs: list[float]) -> Measured:
    folders = tuple(trained(folder / f"{label}{seed}", {3: scores}) for seed, scores in enumerate(runs))
    return Measured(label, folders, tuple(float(np.mean(scores)) for scores in runs), cost, cost)


def right(count: int, of: int = 200) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


def test_the_cheapest_that_is_not_worse_is_recommended(tmp_path: Path) -> None:
    found = judge(
        [
            measured(tmp_path, "costly", 100.0, right(161), right(163)),
            measured(tmp_path, "cheap", 50.0, right(160), right(160)),
            measured(tmp_path, "poor", 20.0, right(100), right(101)),
        ],
        METRIC,
        True,
    )
    assert [one.label for one in found.standings] == ["costly", "cheap", "poor"]
    assert [one.verdict for one in found.standings] == ["best", "no significant difference", "worse"]
    assert found.recommended == "cheap" and found.questions == 200
    assert found.standings[1].difference == pytest.approx(-0.01) and found.standings[0].spread is not None
    assert found.expected is not None and found.expected["value"] < 0.82
    assert any("not significantly worse" in reason and "50 s instead of" in reason for reason in found.reasons)


def test_what_costs_the_same_is_not_called_cheaper(tmp_path: Path) -> None:
    found = judge(
        [measured(tmp_path, "one", 99.0, right(158)), measured(tmp_path, "two", 100.0, right(160))], METRIC, True
    )
    assert found.recommended == "two"
    assert any("no significant difference between the best and any other" in reason for reason in found.reasons)


def test_a_difference_that_one_seed_does_not_show_is_not_called_one(tmp_path: Path) -> None:
    runs = (right(190), right(100)), (right(120), right(110))
    found = judge([measured(tmp_path, "up", 50.0, *runs[0]), measured(tmp_path, "down", 50.0, *runs[1])], METRIC, True)
    assert found.standings[1].p_holm is not None and found.standings[1].p_holm < 0.05
    assert found.standings[1].verdict == "no significant difference"


def test_losses_are_compared_over_seeds(tmp_path: Path) -> None:
    def losses(label: str, *values: float) -> Measured:
        return Measured(
            label, tuple(trained(tmp_path / f"{label}{n}", {}) for n in range(len(values))), values, 9.0, 9.0
        )

    found = judge([losses("a", 1.0, 1.1, 0.9), losses("b", 2.0, 2.11, 1.89)], "eval_loss", False)
    assert found.recommended == "a" and found.standings[1].verdict == "worse" and found.questions == 0
    assert found.expected is not None and found.expected["value"] == pytest.approx(1.0)
    alone = judge([losses("c", 1.0), losses("d", 2.0)], "eval_loss", False)
    assert alone.standings[1].verdict == "too few to judge" and alone.expected is None


def outlook(name: str, seconds: float) -> Outlook:
    estimate = Estimate(seconds, seconds / 2, seconds * 2)
    return Outlook(SweepSetting((("lora_r", name),)), "mine", estimate, estimate, estimate, 0.0, 0.0, 10)


def test_a_budget_leaves_out_seeds_before_settings() -> None:
    outlooks = [outlook("4", 10), outlook("8", 20), outlook("16", 40)]
    assert within_budget(outlooks, [1, 2, 3], 210) == (outlooks, [1, 2, 3], [])
    kept, seeds, notes = within_budget(outlooks, [1, 2, 3], 140)
    assert (kept, seeds) == (outlooks, [1, 2]) and "2 of 3 seeds are trained" in notes
    kept, seeds, notes = within_budget(outlooks, [1, 2, 3], 30)
    assert (kept, seeds) == (outlooks[:2], [1]) and "lora_r=16" in notes[-1]
    with pytest.raises(ForecastError, match="2 settings with one seed take"):
        within_budget(outlooks, [1, 2, 3], 29)


def test_each_trial_at_the_same_time_has_devices_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VISIBLE, "0,2,GPU-c,3,5")
    assert environments(None, 2) == [{VISIBLE: "0,2"}, {VISIBLE: "GPU-c,3"}]
    assert environments(2, 1) == [{VISIBLE: "0"}, {VISIBLE: "2"}] and environments(1, 2) == [{}]
    with pytest.raises(RunError, match="needs 6 devices, and 5 are visible"):
        environments(3, 2)
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environments(None, 4) == [{}]
    shares = environments(2, 1)
    assert len(shares) == 2 and shares[0].keys() == {"OMP_NUM_THREADS"}
    log = tmp_path / "log"
    told = f"import os; print(os.environ['{VISIBLE}'])"
    assert start_process([sys.executable, "-S", "-c", told], log, {VISIBLE: "5"}).wait() == 0
    assert log.read_text() == "5\n"


def test_deepspeed_is_told_the_devices_of_a_trial_beside_others() -> None:
    alone, beside = launch_words(2, "zero2"), launch_words(2, "zero2", "2,3")
    assert "--num_gpus=2" in alone and "--include=localhost:2,3" in beside
    assert any(word.startswith("--master_port=") for word in beside) and "--num_gpus=2" not in beside


def test_trials_at_the_same_time_share_the_time() -> None:
    outlooks = [outlook("4", 10), outlook("8", 20), outlook("16", 40)]
    assert total(outlooks)[0].value == 70 and total(outlooks, 3)[0].value == pytest.approx(70 / 3)
    assert total(outlooks, 2)[0].value == pytest.approx(70 * 2 / 3)  # a device is idle in the second round
    assert within_budget(outlooks, [1, 2, 3], 70, 3) == (outlooks, [1, 2, 3], [])
