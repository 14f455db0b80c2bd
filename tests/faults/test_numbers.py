"""Numbers gone bad: the step is passed over on every rank, the samples are named, the training ends when it goes on."""

from __future__ import annotations

import contextlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.faults import training
from tests.processes import Warm
from tests.questions import questions, tiny
from vlm_sft.common.errors import DeviceMemoryError, NumericalError
from vlm_sft.data.collate import collate
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward, step_gradients
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.planning.training_run import FaultPolicy
from vlm_sft.train import health, loop
from vlm_sft.train.event_log import EventLog
from vlm_sft.train.health import AdapterWatch, SpikeDetector

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return training.prepared(training.samples())


def test_gradients_are_those_of_backward(data: PreparedData) -> None:
    made, encoder = tiny("qwen2_5_vl", torch.float32, SHARED_SDPA)
    groups = [encoder.encode(questions(seed, 3)) for seed in range(4)]
    plans = [Bundle(0, (0, 1, 2)), Bundle(1, (0, 2))], [Bundle(2, (1,)), Bundle(3, (0,))]
    packs = [collate(plan, groups) for plan in plans]
    computed = StepGradients(made, PackMode(), 0, 0.05, contextlib.nullcontext)
    for pack in packs:
        computed.add(pack)
        with packed_forward.packed(pack, PackMode(), 0):
            losses = packed_forward.token_losses(made, pack, PackMode())
            (losses.sum() * 0.05).backward()
    assert len(computed.parameters) == 12
    for parameter, gradient in zip(computed.parameters, computed.sums, strict=True):
        assert torch.equal(parameter.grad, gradient)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        surrogate = computed.surrogate()
    assert {one.data_ptr() for one in kept} == {one.data_ptr() for one in computed.sums}, "no copies of gradients"
    found = torch.autograd.grad(surrogate, computed.parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, computed.sums, strict=True))


def test_the_ranks_meet_once_beside_their_gradients(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vote tells which gradients there are anywhere: a rank without images has none of a trained tower."""
    met: list[int] = []

    def of_both(tensor: torch.Tensor) -> torch.Tensor:
        """What two ranks would have, if the other had every gradient but the last, and the same numbers."""
        met.append(tensor.numel())
        if len(met) == 1:
            tensor[4:-1] += 1.0
        return tensor

    monkeypatch.setattr(health, "sum_ranks", of_both)
    monkeypatch.setattr(step_gradients, "sum_ranks", of_both)
    made = training.trainer(data, tmp_path).model
    found = StepGradients(made, PackMode(), 0, 1.0, contextlib.nullcontext)
    own = torch.ones_like(found.parameters[1])
    found.sums[1] = own.clone()
    voting = health.Health(EventLog(tmp_path / "events.jsonl"), 3, lambda: False, torch.device("cpu"), 2)
    assert voting.vote(1, found)
    found.average(2)
    count = len(found.parameters)
    # In the first steps of a training they meet to find matrices that are not trained, too.
    assert met == [4 + count, count, sum(one.numel() for one in found.parameters[:-1])]
    assert found.sums[-1] is None and torch.equal(found.sums[1], own / 2)
    assert all(not value.any() for value in (found.sums[0], found.sums[2]))


def optimizer_state(trainer: Any) -> list[torch.Tensor]:
    state = trainer.optimization.optimizer.state_dict()["state"]
    return [value.clone() for entry in state.values() for value in entry.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_changes_nothing(
    value: float, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.spoil_loss(monkeypatch, lambda step, ids: step == 3, value)
    made = training.trainer(data, tmp_path)
    states: list[list[torch.Tensor]] = []

    class KeepState(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            states.append(optimizer_state(made))

    seen, keep = training.watch_steps(made)
    made.run([keep, KeepState()])
    assert training.moved(seen) == [True, True, True, False, True, True]
    for one, other in zip(states[2], states[3], strict=True):
        assert torch.equal(one, other)  # moments and counts
    assert not all(torch.equal(one, other) for one, other in zip(states[3], states[4], strict=True))
    (event,) = training.events(tmp_path)
    assert (event["step"], event["kind"], event["source"], event["action"]) == (4, "not_finite", "loss", "step skipped")
    assert event["loss"] == repr(value) or event["loss"] == "nan"
    assert event["samples"] >= 1 and all(name.startswith("picture ") for name in event["sample_ids"])
    assert all(torch.isfinite(tensor).all() for tensor in seen[-1].values())
    assert made.state.global_step == 6
    assert all(row["loss"] == row["loss"] for row in made.state.log_history if "loss" in row)


def test_only_the_bad_question_is_named(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    culprits: list[str] = []

    def first_pack(step: int, ids: list[str]) -> bool:
        if step == 1 and not culprits:
            culprits.append(ids[0])
            return True
        return False

    training.spoil_loss(monkeypatch, first_pack)
    training.trainer(data, tmp_path, max_steps=2).run()
    assert training.events(tmp_path)[0]["sample_ids"] == culprits


def test_a_bad_gradient(data: PreparedData, tmp_path: Path) -> None:
    made = training.trainer(data, tmp_path, max_steps=4)
    seen, keep = training.watch_steps(made)
    name, parameter = next((n, p) for n, p in made.model.named_parameters() if "lora_B" in n)
    parameter.register_hook(lambda gradient: gradient * (float("inf") if made.state.global_step == 1 else 1.0))
    made.run([keep])
    assert training.moved(seen) == [True, False, True, True]
    (event,) = training.events(tmp_path)
    assert (event["step"], event["source"], event["samples"]) == (2, "gradient", 6)


def test_a_bad_image_tensor_names_its_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = training.prepared(training.samples())
    real = data.encoder.process_images

    def process(sample: Any) -> dict[str, torch.Tensor]:
        tensors = real(sample)
        if sample.images[0].source == "picture 5":
            tensors["pixel_values"] = tensors["pixel_values"].clone()
            tensors["pixel_values"][0, 0] = float("nan")
        return tensors

    monkeypatch.setattr(data.cache, "image_tensors", process)
    training.trainer(data, tmp_path, max_steps=4).run()
    found = training.events(tmp_path)
    assert found and {event["source"] for event in found} == {"image"}
    named = [name for event in found for name in event["sample_ids"]]
    assert sorted(named) == ["picture 5/0", "picture 5/1", "picture 5/2"]


def test_three_in_a_row_end_the_training(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.spoil_loss(monkeypatch, lambda step, ids: step in (1, 3, 4, 5))
    made = training.trainer(data, tmp_path, max_steps=20)
    with pytest.raises(NumericalError, match="3 steps in a row.* step 6") as caught:
        made.run()
    assert "anomalies.jsonl" in str(caught.value) and "picture " in str(caught.value)
    assert [event["in_a_row"] for event in training.events(tmp_path) if event["step"] > 3] == [1, 2, 3]
    again = training.trainer(data, tmp_path, max_steps=20, policy=FaultPolicy(max_bad_steps=2))
    with pytest.raises(NumericalError, match="2 steps in a row.* step 5"):
        again.run()


def test_never_best(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations at steps 1 to 4: not finite at 1, sound at 2, after a dropped step at 3, sound at 4."""
    training.spoil_loss(monkeypatch, lambda step, ids: step == 2)
    made = training.trainer(
        data,
        tmp_path,
        evaluation=data,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    results = iter([{"eval_loss": loss} for loss in (float("nan"), 3.0, 1.0, 2.0)])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *_: next(results))
    made.run()
    assert (made.state.best_global_step, made.state.best_metric) == (4, 2.0)


def test_spikes_are_told_from_noise() -> None:
    found = SpikeDetector()
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert max(found.score(2.0 - index / 400 + 0.1 * value) for index, value in enumerate(noise)) < 6
    assert found.score(4.0) > 12
    assert found.score(1.5) < 2  # one outlier does not move the median
    flat = SpikeDetector()
    assert max(flat.score(1.0) for _ in range(40)) == 0.0
    assert flat.score(1.05) < 8 < flat.score(1.5)


def test_a_spike_is_recorded(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.spoil_loss(monkeypatch, lambda step, ids: step == 18, 500.0)
    made = training.trainer(data, tmp_path, max_steps=20)
    seen, keep = training.watch_steps(made)
    made.run([keep])
    (event,) = training.events(tmp_path)
    assert (event["step"], event["kind"], event["samples"]) == (19, "loss_spike", 6)
    assert event["score"] > 8 and all(training.moved(seen))  # told, not dropped


def test_dead_adapters_are_found_and_sound_ones_are_not(data: PreparedData, tmp_path: Path) -> None:
    made = training.trainer(data, tmp_path, max_steps=8, warmup_ratio=0.4, lr_scheduler_type="linear")
    names = [name for name, _ in made.model.named_parameters() if "q_proj.lora_B" in name]
    dict(made.model.named_parameters())[names[0]].register_hook(torch.zeros_like)
    made.run()
    (event,) = training.events(tmp_path)
    assert (event["kind"], event["parameter"], event["step"]) == ("dead_adapter", names[0], 5)


def test_a_matrix_waits_for_its_partner() -> None:
    pair = {"x.lora_A": torch.nn.Parameter(torch.ones(2, 2)), "x.lora_B": torch.nn.Parameter(torch.zeros(2, 2))}
    watch = AdapterWatch(pair)
    gradients = {"x.lora_A": torch.zeros(2, 2), "x.lora_B": torch.ones(2, 2)}
    assert [watch.look(gradients, lambda *v: list(v)) for _ in range(9)] == [[]] * 9  # B never moved
    with torch.no_grad():
        pair["x.lora_B"].add_(1.0)
    assert [watch.look(gradients, lambda *v: list(v)) for _ in range(5)] == [[], [], [], [], ["x.lora_A"]]
    assert not watch.active


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, tokens: int, in_backward: bool) -> None:
    """Packs of more tokens raise what a GPU raises, in the forward or within the backward pass."""
    sound = packed_forward.forward

    def forward(model: Any, batch: Any, mode: Any, **extra: Any) -> Any:
        if batch.tokens > tokens and not in_backward:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        output = sound(model, batch, mode, **extra)
        if batch.tokens > tokens:
            output.logits.register_hook(_no_memory)
        return output

    monkeypatch.setattr(packed_forward, "forward", forward)


def _no_memory(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_pack_that_does_not_fit_is_cut_in_two(
    in_backward: bool, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.trainer(data, tmp_path / "whole", max_steps=3, lora_dropout=0.05)
    whole.run()
    assert training.events(tmp_path / "whole") == []
    out_of_memory_above(monkeypatch, 200, in_backward)
    (tmp_path / "cut").mkdir()
    cut = training.trainer(data, tmp_path / "cut", max_steps=3, lora_dropout=0.05)
    cut.run()
    found = training.events(tmp_path / "cut")
    assert [event["step"] for event in found] == [1, 2, 3]
    assert {(event["kind"], event["action"], event["samples"]) for event in found} == {("out_of_memory", "split", 6)}
    expected, got = training.weights(whole), training.weights(cut)
    # In steps of 1e-3, in float32: 2.6e-6 on an AMD Zen 4, 3.1e-6 on an Intel Cascade Lake.
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    losses = [[row["loss"] for row in made.state.log_history if "loss" in row] for made in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)


def test_what_never_fits_ends_with_advice(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(monkeypatch, 20, in_backward=False)
    made = training.trainer(data, tmp_path, max_steps=2)
    before = training.weights(made)
    with pytest.raises(DeviceMemoryError, match="--tokens_per_pack 256") as caught:
        made.run()
    assert "step 1" in str(caught.value) and "--gradient_checkpointing" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.weights(made).items())


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3", "fsdp"])
def test_no_rank_steps_when_one_has_bad_numbers(parallel: str, warm: Warm, tmp_path: Path) -> None:
    if parallel.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    run = warm.start_both([str(tmp_path), parallel], tmp_path / "log", script=Path(training.__file__))
    assert run.wait(240) == 0, (tmp_path / "log").read_text()[-4000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["moved"] == found[1]["moved"] == [True, False, True, False, True, True]
    assert found[0]["rates"] == found[1]["rates"] == [1e-3] * 6
    assert all(loss == loss for loss in found[0]["losses"])
    bad = training.events(tmp_path)
    assert [(event["step"], event["rank"]) for event in bad] == [(2, 1), (4, 1)]
    assert {event["kind"] for event in bad} == {"not_finite"}
