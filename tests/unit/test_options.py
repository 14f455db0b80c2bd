"""Options that are declared once: their flags, their values, their mistakes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from vlm_sft.cli.parser import build_parser
from vlm_sft.cli.plan import plan_options
from vlm_sft.cli.train import train_options
from vlm_sft.common.errors import RunError
from vlm_sft.common.options import add_options, option, read_options
from vlm_sft.data.engine_options import EngineOptions
from vlm_sft.planning.options import TrainOptions


@dataclass(frozen=True)
class Some:
    """One option of each kind."""

    name: str
    folder: Path | None = option(None, "a folder", "DIR")
    count: int = option(3, "a number (default: %(default)s)", "N")
    again: bool = option(False, "a flag without a value", names=("--once_more",))
    cache: bool = option(True, "a switch", words=("on", "off"))
    packing: bool = option(False, "another one", words=("true", "false"))
    size: tuple[int, int] = option((2, 3), "a pair", text="2x3", read=lambda text: tuple(map(int, text.split("x"))))
    resume: str | None = option(None, "with or without a value", bare="auto")


def parsed(*words: str) -> Some:
    parser = argparse.ArgumentParser()
    add_options(parser, Some)
    return read_options(Some, parser.parse_args(words), name="mine")


def test_flags_give_the_values_of_their_fields() -> None:
    assert parsed() == Some("mine")
    line = "--folder a/b --count 5 --once_more --cache FALSE --packing on --size 4x5 --resume"
    assert parsed(*line.split()) == Some("mine", Path("a/b"), 5, True, False, True, (4, 5), "auto")
    assert parsed("--resume", "there").resume == "there"
    assert read_options(Some, argparse.Namespace(count=4), name="few") == Some("few", count=4)


def test_wrong_switches_are_named_together() -> None:
    with pytest.raises(RunError, match=r"--cache .*maybe.*, --packing .*perhaps.*: neither on nor off"):
        parsed("--cache", "maybe", "--packing", "perhaps")


def test_every_option_of_a_training_has_a_flag_and_its_default() -> None:
    args = build_parser("train").parse_args(["train", "--output_dir", "run"])
    assert train_options(args) == TrainOptions(output_dir=Path("run"))
    without = {"output_dir", "overrides", "engine"}
    assert {item.name for item in fields(TrainOptions) if "flag" not in item.metadata} == without
    assert all("flag" in item.metadata for item in fields(EngineOptions))


def test_a_plan_reads_what_a_training_does() -> None:
    line = [
        "--base_model",
        "pocket",
        "--feature_cache",
        "2GB",
        "--packing",
        "off",
        "--lora_r",
        "8",
        "--system",
        "a\\nb",
    ]
    planned = plan_options(build_parser("plan").parse_args(["plan", *line, "--gpus", "2"]))
    trained = train_options(build_parser("train").parse_args(["train", "--output_dir", "outputs/planned", *line]))
    assert planned.train == trained and planned.gpus == 2 and planned.hypothetical is None
    assert (trained.engine.feature_cache, trained.engine.packing, trained.system) == (2 * 10**9, False, "a\nb")
    assert trained.overrides == {"lora_r": "8"}
