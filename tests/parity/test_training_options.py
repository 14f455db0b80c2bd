"""NEFTune, the DFT loss and smoothed labels in packs: those of separate sequences in plain transformers, in float64."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.test_exactness import Gradients, gradients, undiminished
from tests.questions import pack, questions, tiny
from vlm_sft.cli.main import main
from vlm_sft.data.collate import PackedBatch
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu import cross_entropy
from vlm_sft.model.embedding_noise import add_noise
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import set_attention
from vlm_sft.model.packed_forward import Objective
from vlm_sft.model.step_gradients import StepGradients

LIMIT = 1e-10
ALPHA, SEED, STEP = 7.0, 3, 5
SIZES = ((72, 56), (100, 60))
WHOLE = [[Bundle(0, (0, 2, 1)), Bundle(1, (1, 0))]]
PARTS = [[Bundle(0, (2,)), Bundle(1, (0,))], [Bundle(0, (1, 0))], [Bundle(1, (1,))]]
ALONE = [[Bundle(0, (0,))], [Bundle(0, (2,))], [Bundle(0, (1,))], [Bundle(1, (1,))], [Bundle(1, (0,))]]
SEPARATE = PackMode("separate")
OBJECTIVES = {"nll": Objective(), "dft": Objective(by_probability=True), "smoothed": Objective(smoothing=0.2)}


def prepared(family: str, trim: bool = True) -> tuple[Any, list[EncodedGroup], PackMode]:
    model, encoder = tiny(family, torch.float64, SHARED_SDPA)
    base = model.get_base_model()
    if trim:
        trim_last_layer(base)
    mode = declared_mode(base.config, "blockwise")
    assert mode is not None and mode.shares
    return model, [encoder.encode(questions(seed, 3, size)) for seed, size in enumerate(SIZES)], mode


def packed(
    model: Any, groups: list[EncodedGroup], mode: PackMode, packs: list[list[Bundle]], objective: Objective
) -> tuple[float, Gradients]:
    """Loss and gradients of a step by packs, as a training computes it."""
    batches = [pack(bundles, groups, torch.float64) for bundles in packs]
    scale = 1 / sum(len(batch.targets) for batch in batches)
    step = StepGradients(model, mode, STEP, scale, nullcontext, objective)
    for batch in batches:
        step.add(batch)
    losses = torch.cat([losses for _, losses in step._tokens])
    return float(losses.sum() * scale), {name: value for name, value in step.named().items() if value is not None}


def plain_loss(scores: torch.Tensor, targets: torch.Tensor, name: str) -> torch.Tensor:
    """The sum of an objective over the rows of scores (S, V), written down as its paper has it."""
    probabilities = scores.softmax(-1)
    right = probabilities[torch.arange(len(targets)), targets]
    if name == "dft":
        return -(right.detach() * right.log()).sum()
    if name == "smoothed":
        return -(0.8 * right.log() + 0.2 * probabilities.log().mean(-1)).sum()
    return -right.log().sum()


def alone(model: Any, groups: list[EncodedGroup], name: str, noise: dict[int, torch.Tensor]) -> tuple[float, Gradients]:
    """The same by a plain call of transformers a question; `noise` is added to its embeddings by a hook of its own."""
    set_attention(model.get_base_model(), "sdpa")
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    embedding = model.get_base_model().get_input_embeddings()
    for index, bundles in enumerate(ALONE):
        batch = pack(bundles, groups, torch.float64)
        hook = embedding.register_forward_hook(lambda module, args, out, index=index: out + noise.get(index, 0.0))
        output = model(**packed_forward.separate_inputs(model, batch), use_cache=False)
        hook.remove()
        total = total + plain_loss(output.logits[0, batch.predict], batch.targets, name)
        tokens += len(batch.targets)
    found = gradients(model, total / tokens)
    set_attention(model.get_base_model(), SHARED_SDPA)
    return float(total.detach()) / tokens, found


def assert_equal(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> None:
    assert one[0] == pytest.approx(other[0], rel=LIMIT)
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= LIMIT * other[1][name].norm(), name


@pytest.mark.parametrize("name", ["dft", "smoothed"])
@pytest.mark.parametrize("trim", [True, False], ids=["answers only", "whole layer"])
def test_objectives_are_those_of_plain_transformers(name: str, trim: bool) -> None:
    model, groups, mode = prepared("qwen2_5_vl", trim)
    assert cross_entropy.is_covered(model.get_base_model().get_output_embeddings())  # no scores where it is trimmed
    with undiminished():
        expected, usual = (alone(model, groups, kind, {}) for kind in (name, "nll"))
        assert abs(expected[0] - usual[0]) > 1e-3
        for packs, how in ((WHOLE, mode), (PARTS, mode), (ALONE, mode), (WHOLE, SEPARATE)):
            assert_equal(packed(model, groups, how, packs, OBJECTIVES[name]), expected)


def noise_of(model: Any, batch: PackedBatch) -> torch.Tensor:
    """The noise on one question, (1, T, C), as embeddings without weights give it."""
    embedding = model.get_base_model().get_input_embeddings()
    kept = embedding.weight.detach().clone()
    with torch.no_grad(), packed_forward.packed(batch, SEPARATE, STEP):
        embedding.weight.zero_()
        found = embedding(batch.input_ids)
        embedding.weight.copy_(kept)
    return found


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("name", ["nll", "dft"])
def test_noise_is_the_same_whatever_the_packs(family: str, name: str) -> None:
    model, groups, mode = prepared(family)
    with undiminished():
        without = packed(model, groups, mode, WHOLE, OBJECTIVES[name])[0]
        add_noise(model, ALPHA, SEED)
        assert packed(model.eval(), groups, mode, WHOLE, OBJECTIVES[name])[0] == without
        model.train()
        noise = {index: noise_of(model, pack(bundles, groups, torch.float64)) for index, bundles in enumerate(ALONE)}
        for packs, how in ((WHOLE, mode), (PARTS, mode), (ALONE, mode), (WHOLE, SEPARATE)):
            found = packed(model, groups, how, packs, OBJECTIVES[name])
            model.eval()  # our own noise is off: the reference has it from a hook of its own
            expected = alone(model, groups, name, noise)
            model.train()
            assert_equal(found, expected)
        assert abs(expected[0] - without) > 1e-4


def test_noise_is_uniform_and_as_large_as_the_paper_says() -> None:
    model, groups, _ = prepared("qwen2_5_vl")
    add_noise(model.train(), ALPHA, SEED)
    (bundle,) = ALONE[0]
    batch = pack([bundle], groups, torch.float64)
    noise = noise_of(model, batch)[0]
    start, prefix, end = batch.ends[0]
    channels = noise.shape[1]
    for part, length in ((noise[start:prefix], prefix - start), (noise[prefix:end], end - start)):
        size = ALPHA / (length * channels) ** 0.5
        assert 0.95 * size < part.abs().max() <= size
        assert part.std() == pytest.approx(size / 3**0.5, rel=0.1)
        assert abs(part.mean()) < 5 * size / (3 * part.numel()) ** 0.5
    with packed_forward.packed(batch, SEPARATE, STEP + 1):
        embedding = model.get_base_model().get_input_embeddings()
        other = embedding(batch.input_ids) - embedding.weight[batch.input_ids[0]]
    assert not torch.isclose(other[0], noise).any(1).all()


def test_a_resumed_run_draws_the_same_noise(tmp_path: Path) -> None:
    def train(name: str, *more: str) -> tuple[dict[str, torch.Tensor], float]:
        command = f"train --base_model pocket --dataset demo_charts --output_dir {tmp_path / name} --max_steps 4 "
        command += "--max_train 16 --global_batch_size 4 --eval_strategy no --save_steps 2 --logging_steps 1 "
        command += f"--eval_benchmarks none --report_to none --cache_dir {tmp_path / 'cache'} --loss_type dft"
        assert main([*command.split(), *more]) == 0
        first = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        return load_file(tmp_path / name / "adapter_model.safetensors"), first.get("loss", 0.0)

    noisy = ("--neftune_noise_alpha", "5")
    (whole, loss), (_, quiet) = train("whole", *noisy), train("quiet")
    resumed, _ = train("resumed", *noisy, "--resume", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert abs(loss - quiet) > 1e-4


def test_schedules_and_losses_through_the_command(tmp_path: Path) -> None:
    """The first loss is of the same weights and questions: DFT weights it down, smoothing asks for other words too."""
    ways = {
        "cosine_with_min_lr": ("--lr_scheduler_type", "cosine_with_min_lr"),
        "warmup_stable_decay": ("--lr_scheduler_type", "warmup_stable_decay", "--lr_decay_ratio", "0.5"),
        "dft": ("--loss_type", "dft"),
        "smoothed": ("--label_smoothing_factor", "0.3"),
    }
    command = "train --base_model pocket --dataset demo_charts --max_steps 4 --max_train 16 --global_batch_size 4 "
    command += "--learning_rate 0.001 --warmup_ratio 0 --min_lr_ratio 0.2 --logging_steps 1 --eval_strategy no "
    command += f"--save_strategy no --eval_benchmarks none --report_to none --cache_dir {tmp_path / 'cache'}"
    losses, rates = {}, {}
    for name, flags in ways.items():
        run = tmp_path / name
        assert main([*command.split(), *flags, "--output_dir", str(run)]) == 0
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in logged if "loss" in row][0]
        rates[name] = [row["learning_rate"] / 0.001 for row in logged if "learning_rate" in row]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates["cosine_with_min_lr"] == pytest.approx(cosine)
    assert rates["warmup_stable_decay"] == pytest.approx([1, 1, 1, 0.2 + 0.8 * (1 - 0.5**0.5)])
    plain = losses["cosine_with_min_lr"]
    assert plain == losses["warmup_stable_decay"] and losses["dft"] < 0.9 * plain < 1.1 * plain < losses["smoothed"]
