"""LoRA on the weights of experts: what PEFT trains, saves, opens and merges is what was named, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.parity.test_exactness import gradients, undiminished
from tests.questions import PROMPT, pack, questions
from tests.tiny_models import build
from vlm_sft.common.errors import ModelError
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.adapters import add_lora, language_model_path, load_adapter, parameter_counts, resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.expert_targets import expert_parameters
from vlm_sft.model.families import PackMode, declared_mode
from vlm_sft.model.load import set_attention
from vlm_sft.model.vllm_rules import not_for_vllm

FAMILIES = ["qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "kimi_k25"]
NAMES = ["o_proj", "experts.gate_up_proj", "experts.down_proj"]


def adapted(model: Any, names: list[str], **settings: Any) -> PeftModel:
    """The model with LoRA whose B matrices are not zero."""
    settings = {"r": 3, "alpha": 6, "dropout": 0.0, "seed": 1, "base_name": "tiny"} | settings
    wrapped = add_lora(model, resolve_targets(model, names), **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return wrapped


def losses(model: Any, groups: Any, bundles: list[Bundle], mode: PackMode) -> torch.Tensor:
    batch = pack(bundles, groups, next(model.parameters()).dtype)
    with packed_forward.packed(batch, mode, 0):
        return packed_forward.token_losses(model, batch, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_mean_the_weights_of_experts(family: str) -> None:
    model, _ = build(family)
    experts = expert_parameters(model, language_model_path(model) + ".")
    assert experts and all(model.get_parameter(path).dim() == 3 for path in experts)
    targets = resolve_targets(model, NAMES)
    assert set(targets.experts) == set(experts) and set(experts) < set(targets.paths)
    assert sum(targets.by_name[name] for name in NAMES[1:]) == len(experts)
    wrapped = adapted(model, NAMES)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained) and sum(".experts." in name for name in trained) == 2 * len(experts)
    weights = {
        path: model.get_parameter(path.replace(".experts.", ".experts.base_layer.base_layer.")) for path in experts
    }
    rows = sum(len(weight) * sum(weight.shape[1:]) for weight in weights.values())  # of A and B together, a rank
    linear = sum(p.numel() for name, p in wrapped.named_parameters() if name in trained and ".o_proj." in name)
    assert parameter_counts(wrapped)[0] == 3 * rows + linear


def test_a_name_of_linear_modules_means_these_alone() -> None:
    model, _ = build("qwen3_vl_moe")
    targets = resolve_targets(model, ["down_proj"])
    assert targets.paths == ("model.language_model.layers.1.mlp.down_proj",) and not targets.experts
    assert not resolve_targets(model, ["all-linear"]).experts
    only = resolve_targets(model, ["gate_up_proj"])
    assert only.paths == only.experts and len(only.experts) == 2 and only.peft == []


def test_gradients_of_experts_are_those_of_separate_sequences() -> None:
    model, processor = build("qwen3_vl_moe")
    model = model.double()
    model.set_experts_implementation("eager")
    set_attention(model, SHARED_SDPA)
    encoder = Encoder(processor, PROMPT)
    groups = [encoder.encode(questions(seed, 2, size)) for seed, size in enumerate(((72, 56), (100, 60)))]
    wrapped = adapted(model, NAMES)
    mode = declared_mode(model.config, "blockwise")
    assert mode is not None
    with undiminished():
        found = gradients(wrapped, losses(wrapped, groups, [Bundle(0, (0, 1)), Bundle(1, (1,))], mode).sum())
        set_attention(model, "sdpa")
        alone = [
            losses(wrapped, groups, [Bundle(*one)], PackMode("separate")).sum()
            for one in ((0, (0,)), (0, (1,)), (1, (1,)))
        ]
        expected = gradients(wrapped, torch.stack(alone).sum())
    assert sum(".experts." in name for name in found) == 8
    for name, gradient in found.items():
        assert expected[name].norm() > 0
        assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def test_saved_opened_and_merged(tmp_path: Path) -> None:
    model, processor = build("qwen3_vl_moe")
    set_attention(model, SHARED_SDPA)
    encoder = Encoder(processor, PROMPT)
    groups = [encoder.encode(questions(0, 2))]
    wrapped = adapted(model, NAMES)
    bundles, mode = [Bundle(0, (0, 1))], declared_mode(model.config, "blockwise")
    assert mode is not None
    with torch.no_grad():
        expected = losses(wrapped, groups, bundles, mode)
        with wrapped.disable_adapter():
            assert (losses(wrapped, groups, bundles, mode) - expected).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    again, _ = build("qwen3_vl_moe")
    set_attention(again, SHARED_SDPA)
    opened = load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(losses(opened.eval(), groups, bundles, mode), expected)
        merged: Any = opened.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(losses(merged, groups, bundles, mode), expected, rtol=1e-4, atol=1e-4)
    config = {"target_parameters": ["experts.down_proj"], "r": 3}
    assert any("experts' weights" in problem for problem in not_for_vllm(config, [], again))


@pytest.mark.parametrize(
    ("settings", "told"), [({"dropout": 0.1}, "without dropout only"), ({"use_dora": True}, "no DoRA")]
)
def test_what_peft_cannot_do_is_refused(settings: dict[str, Any], told: str) -> None:
    model, _ = build("qwen3_vl_moe")
    with pytest.raises(ModelError, match=told) as refused:
        adapted(model, ["q_proj", "experts.down_proj"], **settings)
    assert "experts.down_proj" in refused.value.what
    with pytest.raises(ModelError) as unknown:
        resolve_targets(model, ["experts.gate_proj"])
    assert "experts.gate_up_proj" in str(unknown.value.fix)
