"""A pack gives the losses and gradients of separate sequences in plain transformers, for every family."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.older_versions import TAKES_FEATURES
from tests.questions import ask, asked_types, pack, picture, questions, tiny
from tests.tiny_models import FAMILIES, build
from vlm_sft.data.collate import PackedBatch
from vlm_sft.data.encode import EncodedGroup, Encoder
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.packing import Bundle
from vlm_sft.data.sample import Sample
from vlm_sft.model import families, packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.cpu.fuse import fuse_modules
from vlm_sft.model.families import PLAIN_LAYERS, PackMode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import is_blockwise, set_attention
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.trainable import checkpoint_layers
from vlm_sft.model.vision_features import TowerCounter, start_training

SHARING = [family for family in FAMILIES if not families.FAMILIES[family].reason]
# How float32 rounds depends on the processor: below 1e-5 on an AMD Zen 4, 1.2e-5 on an Intel Cascade Lake.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}
# A recurrence amplifies rounding: plain transformers with its two attention functions differs by 1.3e-4 in float32.
RECURRENT = {torch.float64: 1e-10, torch.float32: 1e-3}
SINGLE = {"ernie4_5_vl_moe"}  # their routers compute in float32 whatever they are given
SEPARATE = PackMode("separate")
BATCHED = {"hunyuan_vl": 1e-4}  # rounds to float32 in places of a batch that `undiminished` does not reach
SIZES = ((72, 56), (56, 56), (100, 60))  # pixels of the three pictures
COUNTS = (10, 4, 2)  # their questions

Gradients = dict[str, torch.Tensor]


@dataclass
class Truth:
    """What plain transformers says about each question alone: token losses, and gradients of their sum."""

    losses: dict[tuple[int, int], torch.Tensor]
    gradients: dict[tuple[int, int], Gradients]


@dataclass
class Case:
    model: Any
    encoder: Encoder
    groups: list[EncodedGroup]
    truth: Truth
    dtype: torch.dtype

    def batch(self, *bundles: Bundle) -> PackedBatch:
        return pack(list(bundles), self.groups, self.dtype)


@contextmanager
def undiminished() -> Iterator[None]:
    """Let no model round to float32 inside: their norms do, and then two float64 results agree to 1e-8 only.

    Positions, whole numbers, are float32 then and frequencies may be float64: their product takes the wider one.
    """
    to, narrow, sample = torch.Tensor.to, torch.Tensor.float, F.grid_sample
    softmax = torch.Tensor.softmax

    def probabilities(tensor: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(tensor, dim, dtype=None if tensor.dtype == torch.float64 else dtype)

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return tensor
        return to(tensor, *args, **kwargs)

    def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        wider = torch.promote_types(one.dtype, other.dtype)
        return torch.matmul(to(one, wider), to(other, wider))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grid_sample", lambda values, grid, **how: sample(values, to(grid, values.dtype), **how))
        patch.setattr(torch.Tensor, "to", keep)
        patch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else narrow(self))
        patch.setattr(torch.Tensor, "__matmul__", product)
        patch.setattr(torch.Tensor, "softmax", probabilities)
        patch.setattr(torch.Tensor, "type", keep)
        yield


def gradients(model: Any, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def alone(model: Any, encoder: Encoder, sample: Sample) -> torch.Tensor:
    """Token losses of one question: the full processor call on the whole conversation, the model's own positions."""
    processor, pictures = encoder.processor, [decode_rgb(ref.load(), ref.source) for ref in sample.images]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": encoder.prompt.template.replace("{question}", sample.question)},
            ],
        }
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample.target}]}
    asked = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if "PaliGemma" in type(processor).__name__:
        inputs = dict(processor(text=[asked], images=[pictures], suffix=[sample.target], return_tensors="pt"))
        labels = inputs.pop("labels")
    else:
        told = processor.apply_chat_template([*messages, answer], tokenize=False, add_generation_prompt=False)
        inputs = dict(processor(text=[told], images=[pictures], return_tensors="pt", **asked_types(processor)))
        start = processor(text=[asked], images=[pictures], return_tensors="pt")["input_ids"].shape[1]
        ids = inputs["input_ids"][0]
        end = start + (ids[start:] == processor.tokenizer.eos_token_id).nonzero()[0].item() + 1
        labels = torch.full_like(ids, -100)[None]
        labels[0, start:end] = ids[start:end]
    dtype = next(model.parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    keep = labels[0, 1:] != -100
    return F.cross_entropy(logits[0, :-1][keep], labels[0, 1:][keep], reduction="none")


@functools.cache
def case(family: str, dtype: torch.dtype) -> Case:
    if family in SINGLE and dtype == torch.float64:
        pytest.skip("transformers computes this family's routers in float32")
    model, encoder = tiny(family, dtype, SHARED_SDPA)
    groups, truth = [], Truth({}, {})
    # Eager attention computes its softmax in float32, so it cannot be the measure in float64.
    model.set_attn_implementation("eager" if dtype == torch.float32 else "sdpa")
    assert not is_blockwise(model.get_base_model())
    for index, (count, size) in enumerate(zip(COUNTS, SIZES, strict=True)):
        samples = questions(index, count, size)
        groups.append(encoder.encode(samples))
        for number, sample in enumerate(samples):
            with undiminished():
                losses = alone(model, encoder, sample)
                truth.losses[index, number] = losses.detach()
                truth.gradients[index, number] = gradients(model, losses.sum())
    base = model.get_base_model()
    assert trim_last_layer(base) == (base.config.get_text_config().model_type in PLAIN_LAYERS)
    fuse_modules(base)
    return Case(model, encoder, groups, truth, dtype)


def check(case: Case, bundles: list[Bundle], mode: PackMode, limit: float | None = None) -> None:
    set_attention(case.model.get_base_model(), SHARED_SDPA if mode.kind == "blockwise" else "sdpa")
    batch = case.batch(*bundles)
    with undiminished(), packed_forward.packed(batch, mode, 0):
        scores = packed_forward.token_losses(case.model, batch, mode)
        found = gradients(case.model, scores.sum())
    asked = [(bundle.group, number) for bundle in bundles for number in bundle.questions]
    recurrent = "linear_attention" in families.layer_kinds(case.model.get_base_model().config)
    limit = (RECURRENT if recurrent else TOLERANCE)[case.dtype] if limit is None else limit
    torch.testing.assert_close(scores, torch.cat([case.truth.losses[key] for key in asked]), rtol=limit, atol=limit)
    total = torch.stack([case.truth.losses[key].sum() for key in asked]).sum()
    assert abs(scores.sum() - total) <= limit * total
    for name, gradient in found.items():
        expected = torch.stack([case.truth.gradients[key][name] for key in asked]).sum(0)
        assert expected.norm() > 0, name
        assert (gradient - expected).norm() <= limit * expected.norm(), name


def declared(case: Case, kind: families.Kind) -> PackMode:
    mode = families.declared_mode(case.model.get_base_model().config, kind)
    assert mode is not None
    return mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["blockwise", "dense"])
@pytest.mark.parametrize("family", SHARING)
def test_packs_of_one_to_ten_questions(family: str, kind: families.Kind, dtype: torch.dtype) -> None:
    tried = case(family, dtype)
    mode = declared(tried, kind)
    assert mode.shares
    for count in range(1, 11):
        first = Bundle(0, tuple(range(count))[::-1])
        others = [Bundle(1, (2, 0)), Bundle(2, (1,))][: count % 3]
        check(tried, [*others, first], mode)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fallback_is_exact_too(family: str, dtype: torch.dtype) -> None:
    tried = case(family, dtype)
    limit = BATCHED.get(family)
    check(tried, [Bundle(1, (0,))], SEPARATE)
    counter = TowerCounter(tried.model)
    check(tried, [Bundle(0, (3,)), Bundle(2, (1,)), Bundle(1, (0,))], SEPARATE, limit)
    seen = counter.images
    # Rows of unequal length; an image that several are about is computed once.
    check(tried, [Bundle(0, (3, 1, 2, 0)), Bundle(2, (1,)), Bundle(1, (2, 0))], SEPARATE, limit)
    counter.close()
    # MiniCPM-V's pictures are side by side in one call, and one by one where each is apart.
    assert not TAKES_FEATURES or counter.images in (2 * seen, seen + len(SIZES))


@pytest.mark.parametrize("family", SHARING)
def test_checkpointed_layers_give_the_same_gradients(family: str) -> None:
    tried = case(family, torch.float32)
    model = tried.model
    checkpoint_layers(model)
    start_training(model)
    try:
        check(tried, [Bundle(1, (0, 3)), Bundle(0, (5, 1, 2))], declared(tried, "blockwise"))
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def test_paligemma_does_not_share_and_says_so() -> None:
    tried = case("paligemma", torch.float32)
    mode = choose_mode(tried.model, tried.encoder)
    assert mode.kind == "separate"
    assert mode.note.startswith("paligemma: its image tokens read the question")


def test_an_unknown_family_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = case("qwen2_5_vl", torch.float32)
    set_attention(tried.model.get_base_model(), SHARED_SDPA)
    monkeypatch.setattr(families, "FAMILIES", {})
    tried.model.train()
    assert choose_mode(tried.model, tried.encoder) == PackMode("blockwise")
    assert tried.model.training
    tried.model.eval()
    monkeypatch.setattr(
        packed_forward, "position_ids", lambda model, batch: torch.zeros(3, 1, batch.tokens, dtype=torch.long)
    )
    mode = choose_mode(tried.model, tried.encoder)
    assert mode.kind == "separate" and "differ from separate ones" in mode.note


def test_an_unknown_family_with_bidirectional_images_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build("gemma3")
    config = model.config.text_config
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    for layer in model.model.language_model.layers:
        layer.self_attn.layer_type, layer.self_attn.sliding_window = "full_attention", None
    set_attention(model, SHARED_SDPA)
    encoder = Encoder(processor, case("gemma3", torch.float32).encoder.prompt)
    assert choose_mode(model, encoder) == PackMode("blockwise", image_blocks=True)
    monkeypatch.setattr(families, "FAMILIES", {})
    mode = choose_mode(model, encoder)
    assert mode.kind == "separate" and "differ from separate ones" in mode.note


def test_a_family_that_cannot_compute_packs_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = case("llava", torch.float32)
    monkeypatch.setattr(families, "FAMILIES", {})

    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no positions\nof this kind")

    monkeypatch.setattr(packed_forward, "position_ids", refuse)
    mode = choose_mode(tried.model, tried.encoder)
    assert mode.kind == "separate" and "cannot be computed (no positions)" in mode.note


@pytest.mark.parametrize("kind", ["blockwise", "dense"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma3", "qwen3_5", "lfm2_vl", "gemma4", "llama4"])
def test_a_question_and_a_picture_change_nothing_elsewhere(family: str, kind: families.Kind) -> None:
    model, encoder = tiny(family, torch.float32, SHARED_SDPA if kind == "blockwise" else "sdpa")
    mode = families.declared_mode(model.get_base_model().config, kind)
    assert mode is not None
    trim_last_layer(model.get_base_model())
    assert fuse_modules(model.get_base_model()) > 0
    first, second = questions(0, 4), questions(1, 3)
    bundles = [Bundle(0, (0, 1, 2, 3)), Bundle(1, (0, 1, 2))]

    def losses(*samples: list[Sample]) -> tuple[PackedBatch, torch.Tensor]:
        batch = pack(bundles, [encoder.encode(members) for members in samples])
        with torch.no_grad(), packed_forward.packed(batch, mode, 0):
            return batch, packed_forward.token_losses(model, batch, mode)

    batch, before = losses(first, second)
    asked = [replace(first[1], question=first[1].question.swapcase()), *first[2:]]
    _, after = losses([first[0], *asked], second)
    changed = batch.target_branch == 2
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.isclose(before[changed], after[changed]).all()

    other = picture(77)
    _, after = losses(first, [ask(other, sample.question, sample.target) for sample in second])
    changed = batch.target_branch > 4
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.isclose(before[changed], after[changed]).any()


def test_a_trained_matrix_has_gradients_from_every_question() -> None:
    tried = case("qwen2_5_vl", torch.float32)
    names = [name for name in tried.truth.gradients[0, 0] if "lora_A" in name]
    assert len(names) == 2 * 3  # layers x (q, v, o)
    assert all(tried.truth.gradients[key][name].norm() > 0 for key in tried.truth.gradients for name in names)
