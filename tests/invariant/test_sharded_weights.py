"""Weights that the ranks share out while they answer: the answers are those of the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.adapters import save_adapter, save_base
from tests.pictures import png
from tests.processes import MAIN, Warm
from vlm_sft.common.errors import ModelError
from vlm_sft.model.load import find_base, load_model
from vlm_sft.model.sharded import shards_weights

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
COLOURS = ("red", "navy", "gold", "white", "black", "green")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter on it, and questions: not as many on one rank as on the other."""
    folder = tmp_path_factory.mktemp("sharded")
    save_adapter(save_base(folder / "base"), folder / "adapter")
    rows = []
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour, (56 + 14 * number, 70)))
        texts = "abc"[: 1 + number % 3]
        rows += [{"image": f"{number}.png", "question": f"Say {text}.", "answer": "x"} for text in texts]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def alone(warm: Warm, *arguments: str) -> None:
    done = warm.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def on_two_ranks(warm: Warm, log: Path, *arguments: str) -> str:
    code = warm.start_both(arguments, log, script=MAIN).wait(280)
    said = log.read_text()
    assert code == 0, said[-3000:]
    return said


def answers(folder: Path) -> list[str]:
    (path,) = folder.rglob("predictions.jsonl")
    return [json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_ranks_with_half_the_weights_each_answer_as_the_whole_model(place: Path, warm: Warm) -> None:
    asked = [
        "eval",
        "--base_model",
        str(place / "base"),
        "--benchmark",
        str(place / "own.jsonl"),
        "--split",
        "train",
        "--max_new_tokens",
        "8",
        "--tokens_per_pack",
        "300",
        "--output_dir",
    ]
    for name, more in (("base", []), ("tuned", ["--adapter", str(place / "adapter")])):
        alone(warm, *asked, str(place / name), *more)
        shared = place / f"{name} shared"
        told = on_two_ranks(warm, place / f"{name}.log", *asked, str(shared), *more, "--shard_weights", "true")
        assert "the weights are sharded over 2 ranks" in told
        assert answers(shared) == answers(place / name)
    assert answers(place / "base") != answers(place / "tuned")


@needs_deepspeed
def test_a_training_under_zero_3_can_end_with_it(place: Path, warm: Warm) -> None:
    run, data = place / "run", str(place / "own.jsonl")
    settings = ["--base_model", str(place / "base"), "--max_new_tokens", "8"]
    on_two_ranks(
        warm,
        place / "train.log",
        "train",
        *settings,
        "--dataset",
        data,
        "--output_dir",
        str(run),
        "--max_steps",
        "2",
        "--global_batch_size",
        "4",
        "--learning_rate",
        "0.02",
        "--deepspeed",
        "zero3",
        "--eval_strategy",
        "no",
        "--report_to",
        "none",
        "--shard_weights",
        "true",
    )
    for name, more in (("base", []), ("tuned", ["--adapter", str(run)])):
        alone(warm, "eval", *settings, "--benchmark", data, "--output_dir", str(place / "again" / name), *more)
        assert answers(run / "evaluation" / name) == answers(place / "again" / name)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_auto_looks_at_the_memory_of_a_rank() -> None:
    base = find_base("pocket")
    assert shards_weights("auto", base, 2, 2**30)
    assert not shards_weights("auto", base, 2, 2**40)
    assert not shards_weights("auto", base, 1, 2**30) and not shards_weights("false", base, 2, 2**30)
    assert not shards_weights("auto", replace(base, load_in_4bit=True), 2, 2**30)
    with pytest.raises(ModelError, match="only one rank"):
        shards_weights("true", base, 1, 2**30)
    with pytest.raises(ModelError, match="4-bit"):
        shards_weights("true", replace(base, load_in_4bit=True), 2, 2**30)
    assert base.dtype == torch.float32


def test_a_model_that_was_read_onto_its_device_is_an_ordinary_one(place: Path) -> None:
    base = find_base(str(place / "base"))
    plain, placed = load_model(base), load_model(base, "cpu:0")
    assert not hasattr(placed, "hf_device_map") and not hasattr(placed, "_hf_hook")
    weights = placed.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


@needs_deepspeed
@pytest.mark.timeout(300)
def test_a_rank_whose_pack_has_no_image_does_not_wait_for_the_tower(place: Path, warm: Warm) -> None:
    rows = [{"image": f"{number}.png", "question": "Say.", "answer": "x"} for number in range(2)]
    rows += [{"question": f"What is {number}?", "answer": "y"} for number in range(6)]
    (place / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    on_two_ranks(
        warm,
        place / "mixed.log",
        *("train", "--base_model", str(place / "base"), "--dataset", str(place / "mixed.jsonl")),
        *("--output_dir", str(place / "mixed"), "--max_steps", "4", "--global_batch_size", "2", "--train", "vision"),
        *("--deepspeed", "zero3", "--eval_strategy", "no", "--eval_benchmarks", "none", "--report_to", "none"),
        *("--save_strategy", "no", "--logging_steps", "1"),
    )
    logged = [json.loads(line) for line in (place / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4]


@needs_deepspeed
@pytest.mark.timeout(300)
def test_ranks_whose_packs_have_no_image_answer_beside_ranks_that_look_at_one(place: Path, warm: Warm) -> None:
    rows = [{"image": str(place / f"{number}.png"), "question": "Say.", "answer": "x"} for number in range(3)]
    rows += [{"question": f"What is {number}?", "answer": "y"} for number in range(4)]
    # Smaller tensors than the largest ones of pocket's tower are not partitioned, and nobody waits for them.
    (place / "both").mkdir()
    (place / "both" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["eval", "--base_model", "pocket", "--benchmark", str(place / "both")]
    asked += ["--max_new_tokens", "6", "--tokens_per_pack", "60", "--feature_cache", "off", "--max_left_out", "1"]
    alone(warm, *asked, "--output_dir", str(place / "both whole"))
    assert len(answers(place / "both whole")) == len(rows)
    shared = ["--output_dir", str(place / "both shared"), "--shard_weights", "true"]
    on_two_ranks(warm, place / "both.log", *asked, *shared)
    assert answers(place / "both shared") == answers(place / "both whole")
