"""Layers with a state compute packs as separate sequences, and are left alone where that is not certain."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests import tiny_models, tiny_models_recurrent
from tests.parity.test_exactness import undiminished
from tests.parity.test_generation_modes import LENGTH, transformers_answer
from tests.questions import pack, questions, tiny
from vlm_sft.data.packing import Bundle
from vlm_sft.evaluate.generate import generate
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.forward_patch import PLAIN, is_exchanged
from vlm_sft.model.load import set_attention
from vlm_sft.model.mixers import Sequences, short_convolution
from vlm_sft.model.pack_context import PackContext, computing
from vlm_sft.model.recurrent import mixer_of, recurrence_problem, share_states, unshared_states
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.state_batches import Recurrence, state_batches

ENDS = [[0, 40, 43, 44, 52], [52, 58, 60], [60, 95, 130, 133]]
STATEFUL = {"qwen3_5": "linear_attention", "lfm2_vl": "conv"}


def layers(family: str) -> tuple[Any, list[Any]]:
    model, _ = tiny_models.build(family)
    return model, [module for module in model.get_decoder().modules() if mixer_of(module) is not None]


@pytest.mark.parametrize("family", STATEFUL)
def test_states_of_a_pack_are_those_of_its_sequences(family: str) -> None:
    model, (module, *_) = layers(family)
    hidden = torch.randn(1, ENDS[-1][-1], 64, generator=torch.Generator().manual_seed(3))
    plain = module.forward
    expected = torch.empty_like(hidden)
    with torch.no_grad():
        for start, prefix, *ends in ENDS:
            for begin, end in zip([prefix, *ends], ends, strict=False):
                alone = plain(torch.cat([hidden[:, start:prefix], hidden[:, begin:end]], dim=1))
                expected[:, start:prefix] = alone[:, : prefix - start]
                expected[:, begin:end] = alone[:, prefix - start :]
        assert share_states(model) >= 1
        with computing(PackContext(hidden.shape[1], recurrence=Recurrence(ENDS))):
            found = module(hidden)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(hidden), plain(hidden))  # outside of packs


def test_batches_hold_every_token_once_and_pad_little() -> None:
    batches = state_batches(ENDS, torch.device("cpu"))
    tokens = torch.cat([batch.tokens.flatten() for batch in (*batches.prefixes, *batches.questions)])
    assert torch.equal(tokens[batches.places], torch.arange(ENDS[-1][-1]))
    assert len(tokens) <= ENDS[-1][-1] / 0.75 + 32
    lengths = torch.cat([batch.lengths for batch in batches.questions])
    assert lengths[batches.order].tolist() == [3, 1, 8, 2, 35, 3]


def test_a_convolution_goes_on_from_fewer_tokens_than_its_window() -> None:
    layer = torch.nn.Conv1d(3, 3, 4, groups=3).requires_grad_(False)
    inputs = torch.randn(2, 5, 3)

    def convolved(some: torch.Tensor, lengths: list[int], before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, tail = short_convolution(layer, some, Sequences((some,), torch.tensor(lengths), None, True), before)
        assert tail is not None
        return output, tail

    first, tail = convolved(inputs[:, :2], [2, 1], torch.zeros(2, 3, 3))
    assert torch.equal(tail[1], torch.cat([torch.zeros(2, 3), inputs[1, :1]]))
    second, _ = convolved(inputs[:1, 2:], [3], tail[:1])
    whole, _ = convolved(inputs, [5, 5], torch.zeros(2, 3, 3))
    torch.testing.assert_close(torch.cat([first[:1], second], dim=1), whole[:1])


@pytest.mark.parametrize(("family", "kind"), STATEFUL.items())
def test_without_our_forward_nothing_is_shared(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN, "1")
    model, encoder = tiny(family, torch.float32, SHARED_SDPA)
    mode = choose_mode(model, encoder)
    assert mode.kind == "separate" and f"layers of {kind}" in mode.note


def test_a_layer_that_computes_something_else_is_left_as_it_is() -> None:
    model, (first, second, *_) = layers("qwen3_5")
    plain = first.forward
    first.forward = lambda hidden, **more: 2 * plain(hidden, **more)

    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("this layer wants more")

    second.forward = refuse
    set_attention(model, SHARED_SDPA)
    assert not is_exchanged(first) and not is_exchanged(second)
    assert unshared_states(model) == "linear_attention"
    mode = declared_mode(model.config, "blockwise", unshared_states(model))
    assert mode is not None and mode.kind == "separate"


def test_a_model_whose_layers_all_share_is_declared_to() -> None:
    model, _ = layers("qwen3_5")
    set_attention(model, SHARED_SDPA)
    assert unshared_states(model) == ""
    assert declared_mode(model.config, "blockwise", "") == PackMode("blockwise")


def test_a_language_model_of_mamba_2_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_models.FAMILIES, "mamba2", tiny_models_recurrent.mamba2)
    model, encoder = tiny("mamba2", torch.float64, SHARED_SDPA)
    assert choose_mode(model, encoder) == PackMode("blockwise")
    groups = [encoder.encode(questions(0, 3)), encoder.encode(questions(1, 2, (56, 72)))]
    bundles = [Bundle(0, (2, 0, 1)), Bundle(1, (0, 1))]

    def summed(packs: list[list[Bundle]], mode: PackMode) -> list[torch.Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for bundles in packs:
            batch = pack(bundles, groups, torch.float64)
            with undiminished(), packed_forward.packed(batch, mode, 0):
                total = total + packed_forward.token_losses(model, batch, mode).sum()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with undiminished():
            return [total.detach(), *torch.autograd.grad(total, trained)]

    alone = [[Bundle(bundle.group, (number,))] for bundle in bundles for number in bundle.questions]
    for found, expected in zip(summed([bundles], PackMode()), summed(alone, PackMode("separate")), strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_mamba_2_answers_from_the_state_behind_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_models.FAMILIES, "mamba2", tiny_models_recurrent.mamba2)
    model, encoder = tiny("mamba2", torch.float32, SHARED_SDPA)
    samples = questions(0, 3)
    batch = pack([Bundle(0, (0, 1, 2))], [encoder.encode(samples, with_answers=False)])
    with torch.no_grad():
        found = generate(model, batch, mode=PackMode(), max_new_tokens=LENGTH, stop_ids=encoder.stop_ids).tokens
        set_attention(model.get_base_model(), "sdpa")
        assert found == [transformers_answer(model, encoder, sample) for sample in samples]


def test_a_run_says_which_kernels_a_recurrence_lacks() -> None:
    model, _ = layers("qwen3_5")
    problem = recurrence_problem(model)
    assert problem is None if find_spec("fla") else "flash-linear-attention" in str(problem)
    assert recurrence_problem(tiny_models.build("llava")[0]) == ""
