"""Forecasts through the command line: told, recorded, compared, refused; plans and recommendations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.faults.test_messages import rows, write
from vlm_sft.cli.main import main
from vlm_sft.common.artifacts import write_jsonl
from vlm_sft.forecast.calibration import PAST_RUNS, read_past_runs

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ("time_seconds", "peak_bytes", "disk_bytes")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("setup")
    base = tiny_models.save("qwen2_5_vl", folder / "base")
    data = write(folder, list(rows(folder, 20)))
    return [
        "--base_model",
        str(base),
        "--dataset",
        str(data),
        "--global_batch_size",
        "8",
        "--eval_benchmarks",
        "none",
        "--sft_config",
        str(ROOT / "configs" / "sft_config_1epoch.json"),
        "--cache_dir",
        str(folder / "cache"),
    ]


def test_plan_says_what_training_does(setup: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned, run = tmp_path / "plan.json", tmp_path / "run"
    assert main(["plan", *setup, "--output", str(planned), "--output_dir", str(run)]) == 0
    assert not run.exists()
    plan = json.loads(planned.read_text())
    assert "forecast (table):" in capsys.readouterr().out
    assert main(["train", *setup, "--feature_cache", "100MB", "--probe", "--output_dir", str(run)]) == 0
    record = json.loads((run / "run.json").read_text())
    counts = json.loads((run / "data.json").read_text())["train"]
    assert plan["schedule"]["steps"] == record["steps"]
    assert (plan["questions"], plan["images"]) == (counts["samples"], counts["images"])
    # The plan counts tokens without processing an image; training counts them from what the processor made.
    assert plan["histograms"]["image_tokens"] == counts["token_histograms"]["image_tokens"]
    assert plan["histograms"]["question_tokens"] == counts["token_histograms"]["question_tokens"]
    assert record["passes"] == plan["passes"]
    assert (plan["passes"]["tokens_per_pack"], plan["passes"]["gradient_checkpointing"]) == (2048, False)
    told = record["forecast"]
    assert told["basis"] == "probe" and "probe" in told["items"]["time_seconds"]
    for name in OUTCOMES:
        assert told[name]["low"] <= told[name]["value"] <= told[name]["high"]
        assert sum(told["items"][name].values()) == pytest.approx(told[name]["value"], rel=0.01)
    actual = told["actual"]
    assert sum(actual["items"]["time_seconds"].values()) == pytest.approx(actual["time_seconds"], abs=0.2)
    assert actual["disk_bytes"] == pytest.approx(told["disk_bytes"]["value"], rel=0.15)
    assert actual["peak_bytes"] == pytest.approx(told["peak_bytes"]["value"], rel=0.1)
    output = capsys.readouterr().out
    assert "forecast (probe):" in output and "forecast against outcome: time: " in output
    cache = Path(setup[-1])
    (past,) = read_past_runs(cache)
    assert past["actual"]["training steps"] > 0
    assert main(["plan", *setup, "--output_dir", str(run)]) == 0
    assert "forecast (past runs):" in capsys.readouterr().out
    # What the first run has put into the cache is not forecast again.
    again = tmp_path / "again"
    assert main(["train", *setup, "--feature_cache", "100MB", "--output_dir", str(again)]) == 0
    warm = json.loads((again / "run.json").read_text())["forecast"]
    assert {"vision features", "written already"} <= told["items"]["disk_bytes"].keys()
    assert not {"vision features", "prepared images"} & warm["items"]["disk_bytes"].keys()
    assert not warm["items"]["time_seconds"]["vision features"]
    assert warm["actual"]["disk_bytes"] == pytest.approx(warm["disk_bytes"]["value"], rel=0.15)
    # Two runs that other programs held up, with the rates of that hour, ruin no later forecast.
    (cache / PAST_RUNS).unlink()
    assert main(["plan", *setup, "--output", str(planned), "--output_dir", str(run)]) == 0
    free = json.loads(planned.read_text())["forecast"]["time_seconds"]
    slow = past | {
        "actual": {item: 130 * value for item, value in past["actual"].items()},
        "rates": past["rates"] | {"flops": past["rates"]["flops"] / 40, "unrest": 1.0},
    }
    write_jsonl(cache / PAST_RUNS, [slow, slow])
    assert main(["plan", *setup, "--output", str(planned), "--output_dir", str(run)]) == 0
    held_up = json.loads(planned.read_text())["forecast"]["time_seconds"]
    assert held_up["value"] < 4 * free["value"], "the reported one was 126 times as much"
    assert held_up["high"] / held_up["value"] > 2, "and it says that it is less certain"
    (cache / PAST_RUNS).unlink()
    # Other weights in the same folder need features of their own, and no new images.
    weights = Path(setup[1]) / "model.safetensors"
    value = load_file(weights)
    save_file(
        {name: -tensor if "visual" in name else tensor for name, tensor in value.items()}, weights, {"format": "pt"}
    )
    other = tmp_path / "other"
    assert main(["train", *setup, "--feature_cache", "100MB", "--output_dir", str(other)]) == 0
    cold = json.loads((other / "run.json").read_text())["forecast"]
    assert cold["items"]["disk_bytes"]["vision features"] == told["items"]["disk_bytes"]["vision features"]
    assert "prepared images" not in cold["items"]["disk_bytes"]
    assert cold["actual"]["disk_bytes"] == pytest.approx(cold["disk_bytes"]["value"], rel=0.15)


def test_what_surely_does_not_fit_is_refused_with_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "plan",
        "--base_model",
        "Qwen/Qwen2.5-VL-72B-Instruct",
        "--questions",
        "1000",
        "--images",
        "500",
        "--gpus",
        "8",
        "--gpu_type",
        "A100-80GB",
        "--deepspeed",
        "zero2",
    ]
    assert main(line) == 4
    message = capsys.readouterr().err
    assert "memory:" in message and "A100-80GB has 84.2 GB" in message
    assert "it would fit with --deepspeed zero3" in message
    assert main([*line, "--ignore_forecast"]) == 0
    assert "warning: memory:" in capsys.readouterr().err
    assert main([*line[:-1], "zero3"]) == 0
    capsys.readouterr()
    # ZeRO-3 cannot partition 4-bit weights, so they are no way out of it.
    assert main([*line[:7], "--gpus", "2", "--gpu_type", "L4", "--deepspeed", "zero3"]) == 4
    assert "load_in_4bit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu_type", "B999"], "--gpu_type B999 is not in the table"),
        (["--image_size", "large"], "--image_size large is not a size"),
        (["--images", "2000"], "every image needs a question"),
        (["--gpus", "0"], "--gpus 0 is below 1"),
    ],
)
def test_mistakes_are_told(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--base_model", "Qwen/Qwen2.5-VL-3B-Instruct", "--questions", "1000", "--gpu_type", "L4", *flags]
    assert main(line) == 2
    assert message in capsys.readouterr().err


def test_recommend_on_the_guides_set_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "front.svg"
    line = [
        "recommend",
        "--hours",
        "12",
        "--base_model",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "--questions",
        "50000",
        "--images",
        "5000",
        "--gpus",
        "8",
        "--gpu_type",
        "A100-80GB",
        "--output",
        str(figure),
    ]
    assert main(line) == 0
    output = capsys.readouterr().out
    assert "recommended: " in output and "start it with:\n  torchrun --nproc_per_node=8 -m vlm_sft train" in output
    assert "the guide plans 8 to 16 h, our forecast is " in output
    assert "5epoch" in figure.read_text()
    assert main(["recommend", *line[1:3], "--runs", str(tmp_path / "none"), *line[3:-2]]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["recommend", "--hours", "0.001", *line[3:-2]]) == 4
