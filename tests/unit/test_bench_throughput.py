"""The throughput benchmark: rows, models, what is counted, what is refused, and the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from transformers import AutoModelForImageTextToText

import coverage
import faults
import grouping
import real_chartqa
import recipe_results
import text_rows
import throughput
import throughput_results
from cases import choose
from common import RESULTS, ROOT, with_block
from peers import environment
from peers.worker import Job
from shapes import SHAPES, TEMPLATE, config, parameter_counts
from throughput_results import (
    arithmetic_flops,
    check,
    fastest,
    limits,
    median_row,
    ratios,
    readme_table,
    saved_by_arithmetic,
    summary,
    tables,
)

SCRIPTS = {
    "throughput_": throughput_results,
    "faults": faults,
    "grouping": grouping,
    "coverage": coverage,
    "text_rows": text_rows,
    "real_chartqa": real_chartqa,
    "recipes-": recipe_results,
    "ablation-": recipe_results,
}
SIZES = {"language": 100, "vision": 10, "embedding": 1000, "total": 1110}
EXPECTED = {
    "questions": 8,
    "images": 4,
    "tokens": 800,
    "image_tokens": 600,
    "supervised": 24,
    "patches": 2400,
    "distinct_patches": 1200,
    "distinct_prefix_tokens": 320,
    "own_tokens": 160,
}


def counts(**changes: int) -> dict[str, int]:
    """What a side without sharing has to process in one epoch."""
    found = {
        "language_tokens": 832,
        "padding": 32,
        "image_tokens": 600,
        "supervised": 24,
        "patches": 2400,
        "tower_calls": 2,
        "tower_images": 8,
    }
    return found | changes


def measured(epochs: list[dict[str, int]], seconds: list[float], **changes: Any) -> dict[str, Any]:
    """A worker's result."""
    warm_up = {"flops": [50, 50 + 2 * int(arithmetic_flops(counts(), SIZES))], "epochs": [counts()]}
    return {
        "preparation_seconds": 2.0,
        "loading_seconds": 1.0,
        "epoch_seconds": seconds,
        "preparation": {},
        "data_wait_seconds": [0.1] * len(seconds),
        "epochs": epochs,
        "warm_up": warm_up,
        "epoch_loss": [12.0],
        "peak_memory_bytes": 10,
        "matrix_peak": 1e6,
        "trainable_parameters": 7,
        "versions": {"torch": "2"},
    } | changes


def peer(**changes: Any) -> dict[str, Any]:
    """A peer's row: one epoch of four seconds."""
    return median_row([summary(measured([counts()], [4.0], **changes), EXPECTED, SIZES, 6)])


def processed(*epochs: dict[str, int]) -> dict[str, Any]:
    """A peer's row with these counts."""
    return median_row([summary(measured(list(epochs), [1.0] * len(epochs)), EXPECTED, SIZES, 6)])


def ours(tokens: int = 500, rows: int = 24, patches: int = 1200, **changes: Any) -> dict[str, Any]:
    """Our row: features in the preparation, three epochs."""
    epoch = {"language_tokens": tokens, "head_rows": rows}
    result = measured([epoch] * 3, [2.0, 1.0, 1.0], preparation={"patches": patches, "tower_calls": 4}, **changes)
    return median_row([summary(result, EXPECTED, SIZES, 3)])


def test_a_case_holds_whole_images_and_exactly_so_many_questions() -> None:
    groups = {f"image{number}": [(f"q{number}{k}", "a") for k in range(1 + number % 3)] for number in range(30)}
    chosen = choose(groups, 20, one_an_image=False)
    assert sum(map(len, chosen.values())) == 20
    assert all(rows == groups[key] for key, rows in chosen.items())
    single = choose(groups, 20, one_an_image=True)
    assert len(single) == 20 and {len(rows) for rows in single.values()} == {1}
    with pytest.raises(ValueError, match="only 60 of 61 questions are there"):
        choose(groups, 61, one_an_image=False)


def test_the_template_renders_the_published_conversation_without_the_last_line_feed() -> None:
    render = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render.render(messages=[user], add_generation_prompt=True) == prompt
    assert render.render(messages=[user, answer]) == prompt + "So.<|im_end|>"
    told = {"role": "system", "content": "Be brief."}
    assert render.render(messages=[told, user]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_the_shapes_have_the_sizes_that_the_tables_name() -> None:
    with torch.device("meta"):
        found = {
            name: parameter_counts(AutoModelForImageTextToText.from_config(config(SHAPES[name]))) for name in SHAPES
        }
    assert round(found["small"]["total"] / 1e6) == 48 and round(found["medium"]["total"] / 1e6) == 219
    assert found["medium"]["embedding"] == 151_936 * 576
    published, wide = found.pop("7b"), found.pop("wide")
    assert wide["embedding"] == published["embedding"]
    assert 7 * wide["language"] == pytest.approx(published["language"], rel=1e-5)
    assert published["total"] == 8_292_166_656  # of Qwen2.5-VL-7B-Instruct, as its weights' index says
    assert published["language"] + published["vision"] + 2 * published["embedding"] == published["total"]
    assert all(parts["language"] + parts["vision"] + parts["embedding"] == parts["total"] for parts in found.values())


def test_a_gpu_trains_in_half_precision_and_is_the_only_one_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--device", "cuda", "--shapes", "7b", "--cases", "native"])
    args = throughput.parse()
    (tmp_path / "bench.json").write_text('{"shape": "7b"}')
    asked = throughput.job(args, "ours", tmp_path, tmp_path, 12_845_056, 6)
    job = Job(**asked, output="out")
    assert job.on_gpu and job.dtype == "bfloat16"
    assert not Job(**asked | {"device": "cpu"}, output="out").on_gpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert throughput.environment("trl", 2, tmp_path, "cuda")["CUDA_VISIBLE_DEVICES"] == "3"
    assert throughput.environment("trl", 2, tmp_path, "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert throughput.environment("trl", 2, tmp_path, "cpu")["PYTHONPATH"] == ""
    own = throughput.environment("ours", 2, tmp_path, "cpu")["PYTHONPATH"]
    assert Path(own) == ROOT / "src"  # the checkout that is measured, not the one that is installed
    nothing_counted = measured([counts()], [4.0], warm_up={"flops": [], "epochs": [counts()]})
    assert summary(nothing_counted, EXPECTED, SIZES, 6)["flops_by_arithmetic"] == 1.0


def test_speeds_count_preparation_once_and_extrapolate_what_was_not_run() -> None:
    row = peer()
    assert row["cold"] == pytest.approx(8 / 6) and row["warm"] == pytest.approx(2.0)
    assert row["long"] == pytest.approx(6 * 8 / (2 + 6 * 4)) and row["extrapolated"]
    assert row["padding_share"] == pytest.approx(32 / 832) and row["data_wait_share"] == pytest.approx(0.1 / 4)
    real = ours()
    assert real["cold"] == pytest.approx(2.0) and real["warm"] == pytest.approx(8.0)
    assert real["long"] == pytest.approx(3 * 8 / 6) and not real["extrapolated"]
    assert real["cold_tower_calls"] == 4 and real["warm_tower_calls"] == 0


def test_flops_follow_parameters_tokens_and_rows_and_are_scaled_by_the_counted_step() -> None:
    flops = 4 * 100 * 832 + 4 * 1000 * 24 + 2 * 10 * 2400
    assert arithmetic_flops(counts(), SIZES) == flops
    assert arithmetic_flops(counts(head_rows=800), SIZES) == flops + 4 * 1000 * 776
    assert peer()["share_of_peak"] == pytest.approx(2 * flops / 4.0 / 1e6)


def test_what_arithmetic_allows() -> None:
    # By hand: 480 shared tokens and 24 answers an epoch, 1,200 patches once; separate, 800 tokens and 2,400 patches.
    epoch, tower, separate = 4 * 100 * 480 + 4 * 1000 * 24, 2 * 10 * 1200, 4 * 100 * 800 + 4 * 1000 * 24 + 2 * 10 * 2400
    saved = saved_by_arithmetic(EXPECTED, SIZES, 6)
    assert saved == pytest.approx(
        {"cold": separate / (epoch + tower), "long": 6 * separate / (6 * epoch + tower), "warm": separate / epoch}
    )
    possible = limits(EXPECTED, SIZES, 6, flops_by_arithmetic=2.0, matrix_peak=1e6)
    assert possible["warm"] == pytest.approx(8 / (2 * epoch / 1e6))
    assert possible["cold"] < possible["long"] < possible["warm"]


def test_sides_that_do_the_common_work_are_reported() -> None:
    assert check({"ours": ours(), "trl": peer(), "msswift": peer(epoch_loss=[12.0001])}, EXPECTED) == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            lambda: processed(counts(image_tokens=8, language_tokens=240)),
            "8 image_tokens in epoch 1, not 600; 208 tokens in epoch 1, not 800",
        ),
        (lambda: peer(epoch_loss=[12.1]), "a loss of 12.10000 in epoch 1, not 12.00000"),
        (lambda: peer(trainable_parameters=14), "14 trained parameters, not 7"),
        (lambda: processed(counts(), counts(patches=0)), "0 patches in epoch 2, not 2,400"),
    ],
    ids=["one image token a question", "another loss", "another adapter", "a cached tower"],
)
def test_a_peer_that_does_other_work_is_refused(row: Any, reason: str) -> None:
    refused = check({"ours": ours(), "msswift": row()}, EXPECTED)
    assert list(refused) == ["msswift"] and "; ".join(refused["msswift"]) == reason


def test_our_side_is_refused_when_it_leaves_out_images_questions_or_answers() -> None:
    few = check({"ours": ours(tokens=471, rows=23, patches=1196)}, EXPECTED)["ours"]
    assert few[:2] == ["23 supervised in epoch 1, not 24", "471 tokens in epoch 1, not 472 to 800"]
    assert few[-1] == "1,196 patches until the end of epoch 1, not at least 1,200"


def test_speedups_are_paired_round_by_round() -> None:
    sides = {"ours": {"by_round": {"cold": [10.0, 20.0, 60.0]}}, "trl": {"by_round": {"cold": [5.0, 5.0, 10.0]}}}
    assert ratios(sides, "cold") == {"trl": 4.0}  # of 2, 4 and 6
    assert ratios({"trl": sides["trl"]}, "cold") == {}


def compared(sides: dict[str, Any], questions: int = 8) -> dict[str, Any]:
    """A result file."""
    return {
        "case": "chartqa",
        "shape": "small",
        "sizes": SIZES | {"total": 48_000_000},
        "expected": EXPECTED | {"questions": questions},
        "rounds": 1,
        "epochs": 6,
        "sides": sides,
        "threads": 2,
        "batch": 16,
        "refused": {"llamafactory": ["a loss of 13.0"]},
        "device": "CPU",
        "git": {"hash": "0123456789", "dirty": True},
        "command": ["python", "bench/throughput.py"],
        "versions": {"torch": "2.15"},
    }


def test_tables_name_the_best_peer_the_origin_and_who_was_refused(tmp_path: Path) -> None:
    result = compared({"ours": ours(), "trl": peer(preparation_seconds=12.0), "msswift": peer()})
    (tmp_path / "throughput_chartqa_small.json").write_text(json.dumps(result))
    text = tables(tmp_path)
    assert "| chartqa | small, 48 M | 8 / 4 | msswift | 1.5x | 2.2x | 4.0x |" in text
    assert "| msswift | 1 | 1.33 | 2.00 | 1.85 (extrapolated) |" in text and "commit 0123456 (dirty)" in text
    assert "llamafactory is not reported: a loss of 13.0." in text and "| ours | 1 | 2.00 | 8.00 | 4.00 |" in text
    told = readme_table(tmp_path)
    assert "| ChartQA, 2.0 questions an image | Qwen2.5-VL of 48 M, float32 | 4.00 | 1.85 | not run | 1.33 |" in told
    assert told.splitlines()[2].endswith("| **2.2x** |")


def test_a_run_that_covers_less_than_the_record_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "RESULTS", tmp_path / "results")
    record = tmp_path / "results" / "throughput_chartqa_small.json"
    work = tmp_path / "work"

    def kept(sides: dict[str, Any], questions: int = 8) -> Path:
        return throughput.keep(compared(sides, questions), work, "")

    assert kept({"ours": ours()}) == work / record.name and not record.exists()  # nothing to compare with
    assert "no comparison for the tables" in capsys.readouterr().err
    assert kept({"ours": ours(), "trl": peer(), "msswift": peer()}) == record
    known = record.read_bytes()
    assert kept({"ours": ours(), "trl": peer()}) == work / record.name
    told = capsys.readouterr().err
    assert "msswift: 0 of 1" in told and str(work / record.name) in told
    assert kept({"ours": ours(), "trl": peer(), "msswift": peer()}, questions=4) == work / record.name
    assert "questions: 4 of 8" in capsys.readouterr().err
    assert kept({"ours": ours()}) == work / record.name
    assert record.read_bytes() == known and list(json.loads((work / record.name).read_text())["sides"]) == ["ours"]
    assert kept({"ours": ours(), "trl": peer(), "msswift": peer()}, questions=16) == record


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_record_says_how_much_it_covers(name: str) -> None:
    paths = sorted(RESULTS.glob(f"{name}*.json"))
    assert paths
    for path in paths:
        counts = SCRIPTS[name].covered(json.loads(path.read_text(encoding="utf-8")))
        assert counts and all(count > 0 for count in counts.values())


def test_the_first_page_shows_the_recorded_speeds() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_block(readme, "speed", readme_table(RESULTS)) == readme


def test_an_environment_is_made_again_when_what_it_holds_changes(tmp_path: Path) -> None:
    assert not environment.ready("trl", tmp_path)
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / environment.DONE).write_text(environment.wanted("trl"))
    assert environment.ready("trl", tmp_path) and environment.make("trl", tmp_path).name == "python"
    (tmp_path / "trl" / environment.DONE).write_text("trl==0.1\n")
    assert not environment.ready("trl", tmp_path)


def test_unknown_names_on_the_command_line_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--sides", "ours,axolotl"])
    with pytest.raises(SystemExit):
        throughput.parse()
    assert "--sides axolotl: not one of ours, trl, llamafactory, msswift" in capsys.readouterr().err


def test_each_side_is_compared_in_its_fastest_number_format() -> None:
    sides = {"ours": ours(), "ours bf16": ours(), "trl": peer(), "trl bf16": peer()}
    for label, long in (("ours", 2.0), ("ours bf16", 6.0), ("trl", 1.5), ("trl bf16", 1.0)):
        sides[label] |= {"long": long, "by_round": {"long": [long]}}
    assert fastest(sides) == {"ours": sides["ours bf16"], "trl": sides["trl"]}
    assert ratios(sides, "long") == {"trl": pytest.approx(4.0)}
    assert check(sides, EXPECTED) == {}
