"""Weights, gradients and optimizer that FSDP divides over two ranks: the training is that of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import save_base
from tests.pictures import png
from tests.processes import MAIN, Warm
from vlm_sft.common.errors import RecipeError, RunError
from vlm_sft.distributed.launch import Launch, read_launch
from vlm_sft.recipe.load import load_recipe
from vlm_sft.train.fsdp_optimization import require_dividable

COLOURS = ("red", "navy", "gold", "white", "black", "green")
STEPS, SAVED = 4, 2
# Relative distance of a tensor from that of one process. Measured here: 2e-7 for all weights; an adapter's frozen base
# is computed by other kernels where it is divided.
BOUND = 2e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and questions: one without an image, and not as many packs on one rank as on the other."""
    folder = tmp_path_factory.mktemp("fsdp")
    save_base(folder / "base")
    rows = []
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(png(colour, (56 + 14 * number, 70)))
        texts = "abc"[: 1 + number % 3]
        rows += [{"image": f"{number}.png", "question": f"Say {text}.", "answer": colour} for text in texts]
    rows.append({"question": "What is one?", "answer": "y"})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    return [
        *("train", "--base_model", str(place / "base"), "--dataset", str(place / "own.jsonl")),
        *("--output_dir", str(place / name), "--max_steps", str(STEPS), "--save_steps", str(SAVED)),
        *("--global_batch_size", "5", "--tokens_per_pack", "90", "--learning_rate", "2e-3", "--adam_epsilon", "1e-6"),
        *("--eval_benchmarks", "none", "--report_to", "none", "--logging_steps", "1", "--save_total_limit", "9", *more),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def alone(warm: Warm, *arguments: str) -> None:
    done = warm.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def on_two_ranks(warm: Warm, log: Path, *arguments: str) -> None:
    code = warm.start_both(arguments, log, script=MAIN).wait(280)
    assert code == 0, log.read_text()[-4000:]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(("--train", "all"), id="all"),
        pytest.param(("--lora_dropout", "0.1"), id="adapter", marks=pytest.mark.slow),
        pytest.param(
            ("--train", "language,vision", "--gradient_checkpointing", "true"), id="vision", marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_train_as_one_process_and_resume_bit_for_bit(
    place: Path, warm: Warm, trained: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    alone(warm, *words(place, f"{name} alone", *trained))
    on_two_ranks(warm, place / f"{name}.log", *words(place, name, "--fsdp", *trained))
    facts = json.loads((place / name / "run.json").read_text())
    assert (facts["parallel"], facts["world_size"], facts["status"]) == ("fsdp", 2, "finished")
    found, expected = weights(place / name), weights(place / f"{name} alone")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= BOUND * tensor.norm(), key
    assert losses(place / name) == pytest.approx(losses(place / f"{name} alone"), rel=1e-5)

    again = f"{name} again"
    (place / again).mkdir()
    shutil.copytree(place / name / f"checkpoint-{SAVED}", place / again / f"checkpoint-{SAVED}")
    on_two_ranks(warm, place / f"{again}.log", *words(place, again, "--fsdp", "--resume", "auto", *trained))
    resumed = weights(place / again)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in found.items())
    state = place / name / f"checkpoint-{STEPS}"
    for rank in range(2):
        file = f"optimizer-{rank}-of-2.safetensors"
        assert (state / file).read_bytes() == (place / again / state.name / file).read_bytes()


def test_what_cannot_be_divided_is_refused() -> None:
    launch = Launch(0, 0, 2, True, None, "fsdp")
    require_dividable(load_recipe(None, {}), launch)
    for recipe, told in (({"optim": "adafactor"}, "adafactor"), ({"load_in_4bit": True}, "4-bit")):
        with pytest.raises(RecipeError, match=told):
            require_dividable(load_recipe(None, recipe), launch)
    with pytest.raises(RunError, match="nobody to divide"):
        read_launch(None, None, fsdp=True)
    with pytest.raises(RunError, match="beside --deepspeed zero3"):
        read_launch(None, "zero3", fsdp=True)
