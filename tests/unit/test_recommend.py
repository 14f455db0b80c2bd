"""Recommendations: monotone in the budget, the Pareto front, where quality comes from, the guide's flow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wording import line_with
from vlm_sft.evaluate.statistics import mean_interval
from vlm_sft.forecast.hardware import DEVICES, device_named, find_device
from vlm_sft.forecast.pareto import cheapest_not_worse, pareto_front
from vlm_sft.forecast.recipe_quality import GUIDE, Quality, guide_comparison, qualities
from vlm_sft.forecast.recommend import PRIORITIES, RecipeCandidate, plot, recommend, worth

HOUR = 3600.0
EPOCHS = {"smoketest": 1.0, "1epoch": 1.0, "2epoch": 2.0, "5epoch": 5.0, "best": 6.0}


def candidate(
    name: str, hours: float, quality: tuple[float, float] | None = None, disk: float = 1e9
) -> RecipeCandidate:
    measured = Quality(quality[0], quality[0] - quality[1], quality[0] + quality[1], "a test") if quality else None
    seconds = hours * HOUR
    return RecipeCandidate(
        name, EPOCHS.get(name, 1.0), seconds, 1.2 * seconds, 1e9, disk, measured, name == "smoketest"
    )


qualities_drawn = st.tuples(st.floats(0, 1), st.floats(0.001, 0.2))
candidates_drawn = st.lists(
    st.builds(candidate, st.sampled_from(["a", "b", "c", "d", "smoketest"]), st.floats(0.1, 100), qualities_drawn),
    min_size=1,
    max_size=7,
    unique_by=lambda one: one.name,
)


@settings(deadline=None)
@given(candidates_drawn, st.floats(0.1, 100), st.floats(0, 100), st.sampled_from(PRIORITIES))
def test_more_hours_never_give_a_worse_recipe(
    found: list[RecipeCandidate], hours: float, more: float, priority: str
) -> None:
    first, second = recommend(found, hours, None, priority), recommend(found, hours + more, None, priority)
    if first.chosen is None:
        return
    by_name = {one.name: one for one in found}
    if by_name[first.chosen].partial:
        return  # nothing but a try-out was affordable
    assert second.chosen is not None
    assert worth(by_name[second.chosen], first.measured) >= worth(by_name[first.chosen], first.measured)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_pareto_front_holds_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = {points[index] for index in pareto_front(points)}
    unbeaten = {
        one for one in points if not any(other[0] <= one[0] and other[1] >= one[1] and other != one for other in points)
    }
    assert front == unbeaten


def test_cheapest_that_is_not_significantly_worse() -> None:
    found = [
        candidate("1epoch", 1, (0.60, 0.02)),
        candidate("2epoch", 2, (0.69, 0.02)),
        candidate("5epoch", 5, (0.70, 0.02)),
        candidate("best", 6, (0.66, 0.02)),
    ]
    balanced = recommend(found, 10)
    assert (balanced.chosen, balanced.runner_up) == ("2epoch", "5epoch")
    assert line_with(balanced.reasons[0], "not significantly worse", "5epoch")
    assert balanced.front == ("1epoch", "2epoch", "5epoch")
    assert recommend(found, 10, priority="quality").chosen == "5epoch"
    assert recommend(found, 10, priority="speed").chosen == "1epoch"
    assert recommend(found, 1.5).chosen == "1epoch"
    drawn = "\n".join(plot(found, balanced))
    assert "# 2epoch" in drawn and "* 5epoch" in drawn and "o best" in drawn


@pytest.mark.parametrize(
    "times", [(0.01, 0.23, 0.39, 0.90, 1.07), (1, 1, 1, 1, 1), (1, 1.01, 1.02, 1.03, 1.04), (0.5, 1, 1, 90, 91)]
)
@pytest.mark.parametrize("values", [(0.714, 0.738, 0.739, 0.740, 0.740), (0.7,) * 5, (0.5, 0.6, 0.7, 0.8, 0.9)])
def test_names_of_the_plot_are_whole(times: tuple[float, ...], values: tuple[float, ...]) -> None:
    """Recipes that take nearly as long and answer nearly as well overwrote each other: "# 1ep* 2epoch"."""
    names = ("smoketest", "1epoch", "2epoch", "5epoch", "best")
    found = [candidate(*one, (value, 0.02)) for *one, value in zip(names, times, values, strict=True)]
    lines = plot(found, recommend(found, 100))
    drawn = "\n".join(lines[1:13])
    words = drawn.replace("|", " ").split()
    assert sorted(word for word in words if word not in "#*o") == sorted(names)
    assert words.count("#") == 1 and len(lines) == 15 and all(len(line) <= 63 for line in lines)


def test_names_that_the_plot_has_no_room_for_are_listed() -> None:
    found = [candidate(f"a_recipe_of_mine_{number}", 1, (0.7, 0.02)) for number in range(20)]
    drawn = "\n".join(plot(found, recommend(found, 10)))
    assert "no room for the names of: " in drawn and all(f"a_recipe_of_mine_{number}" in drawn for number in range(20))


def test_what_cannot_be_afforded_is_named() -> None:
    found = [candidate("1epoch", 1, disk=5e9), candidate("2epoch", 30)]
    nothing = recommend(found, 10, disk_bytes=1e9)
    assert nothing.chosen is None
    first, second = nothing.reasons
    assert line_with(first, "1epoch: ", "5.00 GB", "1.00 GB") and line_with(second, "2epoch: ", "30.00 h", "10 h")


def guide_advice(hours: float, priority: str) -> str:
    """The recipe that the guide advises for a budget; beyond its last line that of the last line."""
    row = next((row for row in GUIDE if hours < row.high_hours), GUIDE[-1])
    return row.for_quality if priority == "quality" else row.recipe


def test_guide_flow_with_the_guides_own_times() -> None:
    """Where a recipe takes the hours that the guide gives it, the recommendation is the guide's."""
    found = [
        candidate("smoketest", 0.1),
        candidate("1epoch", 4),
        candidate("2epoch", 8),
        candidate("5epoch", 16),
        candidate("best", 19),
    ]
    for hours in (5, 7.9, 8, 12, 15.9, 16, 18.5, 20, 24):
        assert recommend(found, hours).chosen == guide_advice(hours, "balanced"), hours
    assert recommend(found, 22, priority="quality").chosen == guide_advice(22, "quality") == "best"
    lines = guide_comparison({"1epoch": 0.65 * HOUR, "2epoch": HOUR, "5epoch": 2.5 * HOUR, "best": 3 * HOUR})
    assert line_with(lines[1], "1epoch: ", "under 8 h", "0.65 h")
    assert line_with(lines[-1], "best: ", "16 to 24 h", "3.00 h")
    assert len(lines) == 1 + sum(len({row.recipe, row.for_quality}) for row in GUIDE)


def recorded_row(recipe: str, accuracy: float, variant: str = "as is") -> dict[str, object]:
    return {
        "arm": "recipe",
        "recipe": recipe,
        "variant": variant,
        "benchmarks": {"x": {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}},
    }


def test_own_runs_count_before_the_recorded_benchmark(tmp_path: Path) -> None:
    recorded, runs = tmp_path / "recorded", tmp_path / "runs"
    recorded.mkdir()
    rows = [
        recorded_row("1epoch", 0.5),
        recorded_row("1epoch", 0.9, "learning_rate 1"),
        {"arm": "recipe", "recipe": "best", "variant": "as is", "benchmarks": {}},
    ]
    file = {"settings": {"base_model": "pocket", "dataset": "easy_vqa"}, "rows": rows, "made": "then"}
    (recorded / "recipes-pocket-easy_vqa.json").write_text(json.dumps(file))
    found, source = qualities(None, "pocket", ["easy_vqa"], recorded)
    assert {name: round(one.value, 6) for name, one in found.items()} == {"1epoch": 0.5}
    assert source == "quality: recorded benchmark of pocket on easy_vqa, then"
    assert "take the order, not the numbers" in qualities(None, "other", ["chartqa"], recorded)[1]
    assert qualities(None, "pocket", ["easy_vqa"], tmp_path)[0] == {}
    for name, when, accuracy in (("a", "2026-01-01", 0.1), ("b", "2026-01-02", 0.7)):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text(
            json.dumps(
                {
                    "recipe_file": "configs/sft_config_best.json",
                    "base_model": "pocket",
                    "datasets": ["easy_vqa"],
                    "status": "finished",
                    "finished": when,
                }
            )
        )
        (runs / name / "results.json").write_text(
            json.dumps(
                {
                    "benchmarks": {
                        "easy_vqa": {"tuned": {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}}
                    }
                }
            )
        )
    own, source = qualities(runs, "pocket", ["easy_vqa"], recorded)
    assert list(own) == ["best"] and own["best"].value == pytest.approx(0.7)
    assert "1 of your recipes' runs" in source


@pytest.mark.parametrize("accuracy", [0.0, 0.4])
def test_own_runs_on_too_few_questions_are_not_chosen_by(tmp_path: Path, accuracy: float) -> None:
    """A run on four images says nothing about its recipe; the line says what it would take."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text(
        json.dumps(
            {
                "recipe_file": "configs/sft_config_best.json",
                "base_model": "pocket",
                "datasets": ["own"],
                "status": "finished",
                "finished": "2026-01-01",
            }
        )
    )
    low, high = mean_interval([1.0] * round(10 * accuracy) + [0.0] * round(10 - 10 * accuracy), [0, 1, 2, 3, 0] * 2)
    (tmp_path / "runs" / "a" / "results.json").write_text(
        json.dumps({"benchmarks": {"own": {"n": 10, "tuned": {"accuracy": accuracy, "interval": [low, high]}}}})
    )
    found, source = qualities(tmp_path / "runs", "pocket", ["own"], tmp_path)
    assert found == {}
    first, second = source.splitlines()
    assert "ordered by their epochs" in first
    assert line_with(second, "too few questions", f"best {100 * accuracy:.1f} % [")
    needed = int(second.split("about ")[1].split(" questions")[0].replace(",", ""))
    assert needed == math.ceil(10 * ((high - low) / 2 / 0.1) ** 2) > 50


def test_devices_are_found_by_their_drivers_names_and_never_guessed() -> None:
    reported = {
        "NVIDIA A100-SXM4-80GB": "A100-80GB",
        "NVIDIA H200": "H200",
        "NVIDIA L40S": "L40S",
        "NVIDIA L4": "L4",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100-PCIe",
        "NVIDIA GeForce RTX 4090": "RTX4090",
        "Tesla T4": "T4",
        "NVIDIA A10G": "A10G",
        "NVIDIA A10": "A10",
        "NVIDIA H100 NVL": "H100-NVL",
        "NVIDIA A100-PCIE-40GB": "A100-40GB",
        "NVIDIA A100 80GB PCIe": "A100-80GB",
        "NVIDIA B200": "B200",
        "NVIDIA GB200": "GB200",
        "NVIDIA GeForce RTX 5090": "RTX5090",
        "NVIDIA RTX A6000": "A6000",
        "NVIDIA RTX 6000 Ada Generation": "RTX6000-Ada",
        "AMD Instinct MI300X OAM": "MI300X",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX-PRO-6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000-Server",
        "Tesla V100-SXM2-16GB": "V100-16GB",
        "Tesla V100S-PCIE-32GB": "V100-32GB",
    }
    assert {name: device.name for name in reported if (device := find_device(name))} == reported
    others = (
        "NVIDIA B300",
        "NVIDIA A1000",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Quadro RTX 6000",
    )
    assert [name for name in others if find_device(name)] == []
    assert all(device.source and find_device(device.name) is device for device in DEVICES)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H100-80GB", "H100"),
        ("H100-SXM", "H100"),
        ("h100 sxm5 80gb", "H100"),
        ("h100_pcie", "H100-PCIe"),
        ("nvidia h200", "H200"),
        ("DGX B200", "B200"),
        ("GB200 NVL72", "GB200"),
        ("RTX 5090", "RTX5090"),
        ("RTX 6000 Ada", "RTX6000-Ada"),
        ("RTX PRO 6000 Blackwell", "RTX-PRO-6000"),
        ("L40S", "L40S"),
        ("mi300x", "MI300X"),
        ("A100 80GB", "A100-80GB"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("T4", "T4"),
        ("V100", "V100-16GB"),
        ("GeForce RTX 4090", "RTX4090"),
        ("4090", "RTX4090"),
    ],
)
def test_natural_spellings_of_a_device_are_known(written: str, name: str) -> None:
    assert device_named(written).name == name


@pytest.mark.parametrize(
    ("written", "meant"),
    [("B300", "did you mean B200?"), ("GH200", "did you mean "), ("MI325X", "did you mean MI300X?"), ("abacus", "")],
)
def test_an_unknown_device_gets_the_nearest_and_the_list(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"--gpu_type {written} is not in the table") as error:
        device_named(written)
    assert meant in str(error.value) and ("did you mean" in str(error.value)) is bool(meant)
    assert all(device.name in str(error.value) for device in DEVICES)


def test_the_cheapest_that_is_not_worse_is_asked_for_by_cost() -> None:
    judged: list[int] = []

    def worse(one: int) -> bool:
        judged.append(one)
        return one < 3

    assert cheapest_not_worse([1, 2, 3, 4, 5], 5, worse) == 3 and judged == [1, 2, 3]
    assert cheapest_not_worse([1, 2], 2, lambda one: True) == 2
