"""Packs and gradient checkpointing follow from memory; the forecast's memory from what was measured on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import common
import forecast_gpu
from vlm_sft.cli.main import main
from vlm_sft.common.artifacts import read_json
from vlm_sft.data.packing import EpochPlanner, GroupLengths
from vlm_sft.forecast import memory
from vlm_sft.forecast.flops import Adapter, Work
from vlm_sft.forecast.hardware import device_named, table_rates
from vlm_sft.forecast.pack_size import PACK_TOKENS, Passes, choose_passes
from vlm_sft.forecast.setting import RankLayout, Setting
from vlm_sft.forecast.shapes import find_published

SHAPE = find_published("Qwen/Qwen2.5-VL-7B-Instruct").shape
SOME, ALL_LINEAR = ("q_proj", "v_proj", "o_proj"), tuple(SHAPE.text.linears)
RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "gpu_check-nvidia_h100_80gb_hbm3.json"
LENGTHS, VISUAL = (GroupLengths(532, (20, 20), (5, 5)),) * 200, [514] * 200
PLANNER = EpochPlanner(LENGTHS, 64, 8192, 1, 0)


def setting(device: str, targets: tuple[str, ...] = SOME, dropout: bool = True, **changes: Any) -> Setting:
    changes = {"fused": True, "flash_heads": 28, **changes}
    return Setting(SHAPE, Adapter(16, targets, dropout), 2, False, table_rates(device_named(device)), **changes)


def chosen(
    asked: Setting, tokens: tuple[int, ...] = PACK_TOKENS, checkpointing: tuple[bool, ...] = (False, True)
) -> Passes:
    return choose_passes(asked, PLANNER, VISUAL, tokens, checkpointing)


def test_what_fits_is_not_computed_twice() -> None:
    """The kept record of an H100: 53.7 GB without checkpointing, 25 % faster than with it."""
    passes = chosen(setting("H100"))
    assert (passes.tokens_per_pack, passes.gradient_checkpointing) == (8192, False)
    assert passes.peak_bytes is not None and passes.room_bytes is not None
    assert 40e9 < passes.peak_bytes < passes.room_bytes < 80e9
    assert "packs of 8,192 tokens, activations kept" in passes.reason


def test_a_smaller_pack_is_faster_than_computing_again() -> None:
    passes = chosen(setting("A100-40GB"))
    assert (passes.tokens_per_pack, passes.gradient_checkpointing) == (4096, False)
    assert "packs of 8,192 tokens, activations kept would need" in passes.reason


def test_checkpointing_where_a_smaller_pack_does_not_help() -> None:
    passes = chosen(setting("L4"))
    assert passes.gradient_checkpointing and passes.peak_bytes is not None
    passes = chosen(setting("A100-40GB"), tokens=(8192,))
    assert (passes.tokens_per_pack, passes.gradient_checkpointing) == (8192, True)
    passes = chosen(setting("A100-40GB"), checkpointing=(False,))
    assert not passes.gradient_checkpointing and passes.tokens_per_pack == 4096


def test_nothing_fits_and_that_is_said() -> None:
    passes = chosen(setting("T4"))
    assert (passes.tokens_per_pack, passes.gradient_checkpointing) == (2048, True)
    assert "all other ways need more" in passes.reason


def test_small_models_keep_their_activations_and_full_training_does_not() -> None:
    """A limit of a billion parameters knew neither."""
    small = find_published("Qwen/Qwen2-VL-2B-Instruct").shape
    rates = table_rates(device_named("H100"))
    assert not chosen(Setting(small, Adapter(16, SOME), 2, False, rates, fused=True)).gradient_checkpointing
    tight = table_rates(device_named("L4"))
    assert not chosen(Setting(small, Adapter(16, SOME), 2, False, tight)).gradient_checkpointing
    everything = Adapter(16, (), False, everything=True)
    zero = Setting(small, everything, 2, False, tight, ranks=RankLayout(8, "zero3"))
    whole = choose_passes(zero, PLANNER, VISUAL, (8192,), (False, True))
    assert whole.gradient_checkpointing


# What gpu_check measured, by mode: the same setting, and the peak that it forecasts within 15 %.
MEASURED = {
    "dropout 0.05, modules of the libraries": setting("H100", fused=False),
    "dropout 0.05, without liger-kernel": setting("H100", fused=False),
    "dropout 0": setting("H100", dropout=False),
    "dropout 0.05": setting("H100"),
}
# Measured with the hook on patches that checkpointing had left behind: the frozen tower kept its activations.
HOOKED = {
    "dropout 0, checkpointing": replace(setting("H100", dropout=False), checkpointing=True),
    "dropout 0, SDPA": setting("H100", dropout=False, flash_heads=0),
    "dropout 0.05, all linear layers": setting("H100", ALL_LINEAR),
    "dropout 0, all linear layers": setting("H100", ALL_LINEAR, dropout=False),
}


def test_forecast_memory_is_what_a_gpu_needed() -> None:
    steps = read_json(RECORD)["steps"]
    pack = forecast_gpu.recorded_pack(steps["modes"], SHAPE)
    rows = {row["mode"]: row for row in steps["modes"]["rows"]}
    assert rows.keys() == MEASURED.keys() | HOOKED.keys()
    for mode, asked in MEASURED.items():
        assert peak(asked, pack) == pytest.approx(rows[mode]["peak_bytes"], rel=0.15), mode
    for mode, asked in HOOKED.items():
        tower = memory.image_bytes(replace(asked, adapter=replace(asked.adapter, vision=True)), pack, False)
        said, room = peak(asked, pack) + tower, steps["installed"]["memory"]
        if rows[mode]["cut_in_two"]:
            assert said > room, mode
        else:
            assert said == pytest.approx(rows[mode]["peak_bytes"], rel=0.15), mode
    kept = next(row for row in steps["features"]["rows"] if row["mode"] == "kept features")
    assert peak(setting("H100"), pack, features=True) == pytest.approx(kept["peak_bytes"], rel=0.15)


def peak(asked: Setting, pack: Work, features: bool = False) -> float:
    return sum(memory.peak_items(asked, pack, 0, features).values())


PLAN = [
    "plan",
    "--base_model",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "--questions",
    "400",
    "--images",
    "200",
    "--bf16",
    "auto",
    "--flash_attn",
]


@pytest.mark.parametrize(
    ("flags", "tokens", "checkpointing"),
    [
        (["--gpu_type", "H200"], 8192, False),
        (["--gpu_type", "H100", "--gradient_checkpointing", "true"], 8192, True),
        (["--gpu_type", "L4", "--tokens_per_pack", "4096"], 4096, True),
        (["--gpu_type", "L4", "--tokens_per_pack", "2048", "--gradient_checkpointing", "true"], 2048, True),
    ],
)
def test_plan_says_and_writes_the_decision(
    flags: list[str], tokens: int, checkpointing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, *flags, "--ignore_forecast", "--output", str(tmp_path / "plan.json")]) == 0
    passes = json.loads((tmp_path / "plan.json").read_text())["passes"]
    assert (passes["tokens_per_pack"], passes["gradient_checkpointing"]) == (tokens, checkpointing)
    output = capsys.readouterr().out
    assert "assumed: liger-kernel is " in output and "attention by FlashAttention" in output
    open_ones = {"--tokens_per_pack", "--gradient_checkpointing"} - set(flags)
    assert (f"passes: packs of {tokens:,} tokens" in output) == bool(open_ones)
    largest = next(line for line in output.splitlines() if line.startswith("epoch: "))
    assert int(largest.rsplit(" ", 1)[1].replace(",", "")) <= tokens


def test_errors_against_every_source_stand_in_the_documents() -> None:
    """The page is what the command writes from the code as it is, and no source is missed by more than the interval."""
    rows = [*forecast_gpu.recorded(), *forecast_gpu.published()]
    text = common.README.read_text(encoding="utf-8")
    assert common.with_block(text, "forecast_gpu", forecast_gpu.table(rows)) == text, "run python bench/forecast_gpu.py"
    for row in rows:
        assert abs(row.memory_error) <= 0.15, row
        assert abs(row.speed_error) <= 0.15, row
    by_name = {row.what: row for row in rows}
    assert by_name["A100, Qwen-VL-Chat: 2,048 tokens, checkpointing"].said_speed > 2_500, "it was 1,475"
