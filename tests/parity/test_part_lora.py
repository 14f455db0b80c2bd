"""LoRA on tower and projector: packs are exact against plain transformers with PEFT; parts, ranks, rates, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests import tiny_models
from tests.parity.test_exactness import alone, undiminished
from tests.questions import PROMPT, pack, questions
from vlm_sft.common.errors import ModelError
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import Bundle
from vlm_sft.forecast.flops import adapter_of
from vlm_sft.forecast.shapes import FAMILIES as SIZED
from vlm_sft.forecast.shapes import model_shape
from vlm_sft.model import packed_forward
from vlm_sft.model.cpu.fuse import fuse_modules
from vlm_sft.model.families import declared_mode
from vlm_sft.model.last_layer import trim_last_layer
from vlm_sft.model.load import SHARED_SDPA, set_attention
from vlm_sft.model.parts import PROJECTOR_LORA, VISION_LORA, part_linears, part_loras
from vlm_sft.model.trainable import described, save_tuned, tune
from vlm_sft.model.vision_features import start_training
from vlm_sft.model.vllm_rules import TOWER, lora_settings, not_for_vllm
from vlm_sft.planning.run_setting import _counted_shape
from vlm_sft.recipe.load import load_recipe
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.train.optimization import decay_groups, make_optimizer, make_scheduler

BOTH = {"train": "language,vision_lora,projector_lora", "vision_lora_rank": 3, "projector_lora_rank": 8}
PACK = [Bundle(1, (2, 0)), Bundle(0, (0, 1, 2))]


def tuned(family: str, dtype: torch.dtype = torch.float32, **recipe: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A tiny model with LoRA whose updates are not zero, its processor, and what run.json would say."""
    model, processor = tiny_models.build(family)
    settings = load_recipe(None, {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.3, **recipe})
    wrapped, facts = tune(model.to(dtype), settings, "tiny", master=False)
    wrapped.to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return wrapped, processor, facts


def grown(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of what the losses depend on: LLaVA leaves the last block of its tower unused."""
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "llava"])
def test_packs_are_those_of_plain_transformers_with_peft(family: str, tmp_path: Path) -> None:
    """In float64: losses and gradients of a pack, in training, against separate sequences of PEFT's own modules."""
    ours, processor, _ = tuned(family, torch.float64, **{**BOTH, "lora_dropout": 0})
    save_tuned(ours, tmp_path, None, None)
    theirs = PeftModel.from_pretrained(
        tiny_models.build(family)[0].to(torch.float64), str(tmp_path), is_trainable=True
    ).eval()
    encoder = Encoder(processor, PROMPT)
    groups = [encoder.encode(questions(index, 3)) for index in range(2)]
    expected, summed = [], {}
    for bundle in PACK:
        for number in bundle.questions:
            with undiminished():
                losses = alone(theirs, encoder, questions(bundle.group, 3)[number])
                expected.append(losses.detach())
                for name, gradient in grown(theirs, losses).items():
                    summed[name] = summed.get(name, 0) + gradient
    base = ours.get_base_model()
    set_attention(base, SHARED_SDPA)
    trim_last_layer(base)
    fuse_modules(base)
    start_training(ours)
    mode = declared_mode(base.config, "blockwise")
    batch = pack(PACK, groups, torch.float64)
    with undiminished(), packed_forward.packed(batch, mode, 0):
        scores = packed_forward.token_losses(ours, batch, mode)
        found = grown(ours, scores)
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-10, atol=1e-10)
    assert found.keys() == summed.keys()
    for part in ("lora_A", "lora_B"):
        assert any(part in name and "language" not in name and "text_model" not in name for name in found)
    for name, gradient in found.items():
        assert (gradient - summed[name]).norm() <= 1e-10 * summed[name].norm() + 1e-13, name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_linear_modules_of_every_family(family: str) -> None:
    """Tower and projector do not overlap; together they are the linear modules outside of the language model."""
    model, _ = tiny_models.build(family)
    decoder = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    modules = dict(model.named_modules())
    outside = {
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear) and id(module) not in decoder and "audio" not in path
    }
    outside -= {path for path in outside if isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)}
    tower, projector = (set(part_linears(model, part)) for part in (VISION_LORA, PROJECTOR_LORA))
    assert tower and not tower & projector and tower | projector == outside


def test_a_part_without_linear_modules_is_refused() -> None:
    model, _ = tiny_models.build("gemma3")  # its projector is one matrix without a module
    with pytest.raises(ModelError, match="projector of gemma3 has no linear module"):
        part_loras(model, load_recipe(None, {"train": "projector_lora"}))


def test_ranks_differ_and_the_scale_does_not() -> None:
    for more, scale in (({}, 2.0), ({"use_rslora": True}, 4.0)):
        model, _, facts = tuned("qwen2_5_vl", **BOTH, **more)
        inner = model.get_base_model().model
        layers = {
            4: inner.language_model.layers[0].self_attn.q_proj,
            3: inner.visual.blocks[0].attn.qkv,
            8: inner.visual.merger.mlp[0],
        }
        for rank, layer in layers.items():
            assert layer.r["default"] == rank and layer.scaling["default"] == pytest.approx(scale)
        assert layers[4].lora_dropout["default"].p == 0.3
        assert isinstance(layers[3].lora_dropout["default"], nn.Identity)
        assert {name: part["r"] for name, part in facts["parts"].items()} == {"vision_lora": 3, "projector_lora": 8}
        told = described(facts)
        assert "LoRA of rank 3 on the vision tower" in told and "without dropout" in told
        config = model.peft_config["default"].to_dict()
        paths = [path for part in (VISION_LORA, PROJECTOR_LORA) for path in facts["parts"][part]["modules"]]
        base = tiny_models.build("qwen2_5_vl")[0]
        assert not_for_vllm(config, [*facts["modules"], *paths], base) == ()
        assert lora_settings(config, paths, base) == {"max_lora_rank": 8, TOWER: True}
        config["alpha_pattern"] = {}
        assert any("scales the updates" in problem for problem in not_for_vllm(config, paths, base))


def test_parts_have_their_own_learning_rates() -> None:
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 1e-5, "projector_learning_rate": 1e-4}
    for train in ("language,vision_lora,projector_lora", "language,vision,projector", "all"):
        recipe = load_recipe(None, {**rates, "train": train, "weight_decay": 0.1})
        model, _ = tune(tiny_models.build("qwen2_5_vl")[0], recipe, "tiny", master=True)
        optimizer = make_optimizer(model, recipe)
        names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        seen: dict[str, float] = {}
        for group in optimizer.param_groups:
            seen |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
        assert len(seen) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
        for name, rate in seen.items():
            assert rate == (1e-4 if ".merger." in name else 1e-5 if ".visual." in name else 1e-3), name
        assert optimizer.param_groups[0]["lr"] == 1e-3  # what is shown
        decayed, plain = ({id(p) for p in group["params"]} for group in decay_groups(model, 0.1))
        for group in optimizer.param_groups:
            assert {id(p) for p in group["params"]} <= (decayed if group["weight_decay"] else plain)
        scheduler = make_scheduler(optimizer, recipe, Schedule(10, 10, 2, 0, 0, []))
        for _ in range(9):
            assert {round(rate / scheduler.get_last_lr()[0], 6) for rate in scheduler.get_last_lr()} == {1, 0.01, 0.1}
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("family", [family for family in SIZED if family != "gemma3"])
def test_the_forecast_counts_what_is_trained(family: str) -> None:
    model, _, facts = tuned(family, **BOTH)
    recipe = load_recipe(None, {"lora_r": 4, **BOTH})
    config = model.get_base_model().config
    trained = facts["trainable_parameters"]
    shapes = [model_shape(config.to_dict()), _counted_shape(config)]
    assert [adapter_of(recipe, shape).parameters(shape) for shape in shapes] == [trained, trained]
    assert not adapter_of(recipe, shapes[0]).frozen_tower and adapter_of(recipe, shapes[0]).trained_tower
