"""Switches of a family's configuration that change what its model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models, tiny_models_odd
from tests.faults.test_messages import rows, train, write
from tests.parity.test_generation_modes import transformers_answer
from tests.questions import PROMPT, adapted, pack, questions, tiny
from tests.tiny_models_parts import text_of
from vlm_sft.common import artifacts
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.evaluate.generate import generate
from vlm_sft.export.verify import folder_answers, our_answers
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import PLAIN_ATTENTION, SHARED_SDPA, attention_name
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.load import find_base, load_model, ready
from vlm_sft.model.sharing_check import choose_mode, features_error, sharing_error
from vlm_sft.model.vision_features import as_weights, encode_images


def changed(family: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A tiny model, plain, some of whose settings, or whose whole language model, are others; and its encoder."""
    model, processor = tiny_models.build(family)
    settings = model.config.to_dict()
    settings["text_config"] = text if text and "model_type" in text else settings["text_config"] | (text or {})
    settings["vision_config"] |= vision or {}
    torch.manual_seed(0)
    made = type(model)(type(model.config).from_dict(settings)).eval()
    return made, Encoder(processor, PROMPT)


def test_a_model_without_attention_shares_and_is_verified() -> None:
    """transformers' cache asks a layer of attention how long the sequence is."""
    model, encoder = changed("qwen3_5", {"layer_types": ["linear_attention"] * 4})
    ready(model, SHARED_SDPA)
    assert choose_mode(model, encoder).kind == "blockwise" and sharing_error(model, encoder, "blockwise") < 1e-4
    samples = questions(0, 2)
    ours = our_answers(model, encoder, samples, "ours")
    theirs = folder_answers(model, encoder.processor, encoder, samples, "theirs")
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.tokens) > 1 and torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_features_of_a_tower_that_adds_none_to_deeper_layers() -> None:
    model, encoder = changed("qwen3_vl", vision={"deepstack_visual_indexes": []})
    ready(model, SHARED_SDPA)
    assert features_error(adapted(model).eval(), encoder) < 1e-6


TEXTS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_language_model_that_takes_no_sdpa_shares_by_its_own_attention(kind: str, tmp_path: Path) -> None:
    """Capped scores (Gemma 2) and sinks (GPT-OSS) are nothing that SDPA computes."""
    layers = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    text = text_of(tiny_models.build("internvl")[1].tokenizer)
    model, encoder = changed("internvl", text | layers | TEXTS[kind] | {"model_type": kind})
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)
    base = tmp_path / "base"
    model.save_pretrained(base)
    encoder.processor.save_pretrained(base)
    opened = load_model(find_base(str(base), bf16=False))
    assert attention_name(opened.config.text_config) == PLAIN_ATTENTION
    assert attention_name(opened.config.vision_config) != PLAIN_ATTENTION
    assert declared_mode(opened.config, "dense") is None  # InternVL is declared, and not proven with this model
    assert choose_mode(opened, encoder).kind == "dense" and sharing_error(opened, encoder, "dense") < 1e-5
    groups = [encoder.encode(questions(0, 2), with_answers=False)]
    batch = pack([Bundle(0, (0, 1))], groups)
    together = generate(opened, batch, mode=choose_mode(opened, encoder), max_new_tokens=4, stop_ids=encoder.stop_ids)
    assert together.tokens == [transformers_answer(model, encoder, sample)[:4] for sample in questions(0, 2)]
    if kind == "gemma2":
        data = write(tmp_path, list(rows(tmp_path, 8)))
        flags = (
            "--max_steps",
            "1",
            "--eval_strategy",
            "no",
            "--load_best_model_at_end",
            "false",
            "--report_to",
            "none",
        )
        assert train(base, data, tmp_path / "run", *flags) == 0
        assert artifacts.read_json(tmp_path / "run" / artifacts.RUN)["attention"] == PLAIN_ATTENTION


@pytest.mark.skipif("mistral_large4" not in tiny_models_odd.MODELS, reason="transformers lacks it")
def test_sparse_attention_keeps_the_function_that_it_makes_masks_for() -> None:
    model, processor = tiny_models_odd.MODELS["mistral_large4"]()
    ready(model.eval(), SHARED_SDPA)
    assert attention_name(model.config.text_config) == "sdpa"
    assert "layers of indexed_attention" in choose_mode(model, Encoder(processor, PROMPT)).note


@pytest.mark.skipif("cosmos3_edge" not in tiny_models.FAMILIES, reason="transformers lacks it")
def test_token_types_that_a_processor_gives_on_demand_only() -> None:
    _, processor = tiny_models.build("cosmos3_edge")
    group = Encoder(processor, PROMPT).encode(questions(0, 1))
    assert (group.prefix_types == 1).sum() == group.image_tokens > 0


@pytest.mark.skipif("step3p7" not in tiny_models.FAMILIES, reason="transformers lacks it")
def test_a_small_picture_without_crops_beside_a_large_one_in_separate_rows() -> None:
    model, encoder = tiny("step3p7", torch.float32, SHARED_SDPA)
    groups = [encoder.encode(questions(seed, 2, size)) for seed, size in enumerate(((56, 56), (150, 60)))]
    assert ["pixel_values_local" in group.tensors for group in groups] == [False, True]

    def losses(bundles: list[Bundle]) -> torch.Tensor:
        batch = pack(bundles, groups)
        with torch.no_grad(), packed_forward.packed(batch, PackMode("separate"), 0):
            return packed_forward.token_losses(model.eval(), batch, PackMode("separate"))

    alone = [losses([Bundle(group, (number,))]) for group in (0, 1) for number in (0, 1)]
    torch.testing.assert_close(losses([Bundle(0, (0, 1)), Bundle(1, (0, 1))]), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("unlimited_ocr" not in tiny_models_odd.MODELS, reason="transformers lacks it")
def test_counts_that_a_model_takes_as_lists() -> None:
    """A large picture has crops, and the model splits them by their counts."""
    model, processor = tiny_models_odd.MODELS["unlimited_ocr"]()
    processor.image_processor.max_patches = 2
    image = Encoder(processor, PROMPT).process_images(questions(0, 1, (700, 1300))[0])
    assert as_weights(model, image)["num_local_patches"] == [2] and torch.is_tensor(image["num_local_patches"])
    (features,) = encode_images(ready(model.eval().requires_grad_(False), SHARED_SDPA), [image])
    assert features
