"""LoRA's targets: names mean the language model's own layers, and without names every kind of its layers gets LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CONFIG_MAPPING

import families as bench
from tests import tiny_models, tiny_models_targets
from tests.adapters import save_adapter, save_base
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import ModelError
from vlm_sft.forecast.flops import adapter_of
from vlm_sft.model.adapters import Targets, add_lora, resolve_targets
from vlm_sft.model.default_targets import default_targets, mixer_projections
from vlm_sft.model.layout import without_weights
from vlm_sft.model.load import find_base
from vlm_sft.model.saved_adapter import require_fit
from vlm_sft.planning.options import TrainOptions
from vlm_sft.planning.run_recipe import read_run_recipe
from vlm_sft.planning.run_setting import shape_of
from vlm_sft.recipe.load import load_recipe

USUAL = ("q_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DELTA = (*USUAL, "in_proj_qkv", "in_proj_z", "out_proj")
# By config.model_type, for the families' default configurations.
DEFAULTS = {
    "qwen2_5_vl": USUAL,
    "llava": USUAL,
    "gemma4": USUAL,
    "qwen3_5": DELTA,
    "qwen3_5_moe": DELTA,
    "minicpmv4_6": DELTA,
    "kimi_k25": LATENT,
    "dots3_note": LATENT,
    "mistral_large4": ("kv_a_proj_with_mqa", "kv_b_proj", "q_proj", "o_proj"),
    "lfm2_vl": ("q_proj", "v_proj", "out_proj"),  # without convolutions
    "lfm3_vl": (*USUAL, "in_proj", "out_proj"),
    "glm5_next": (*LATENT[:-1], *USUAL),
    "fuyu": ("query_key_value", "dense"),
}


def shortened(config: Any, layers: int = 6) -> Any:
    """A configuration and its parts with few layers."""
    for name in ("num_hidden_layers", "num_layers", "depth"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(layers, getattr(config, name)))
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            shortened(getattr(config, part), layers)
    return config


def wrapped(model: Any, targets: Targets) -> Any:
    """The model with LoRA; `add_lora` refuses where PEFT wrapped other modules than the targets."""
    return add_lora(model, targets, r=2, alpha=4, dropout=0.0, seed=0, base_name="tiny")


@pytest.mark.parametrize("family", DEFAULTS)
def test_every_kind_of_layer_gets_lora_by_default(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} lacks it")
    config = shortened(CONFIG_MAPPING[family]())
    names = default_targets(config)
    assert names == DEFAULTS[family]
    model = without_weights(config)
    found = resolve_targets(model, names)
    assert all(found.by_name.values())
    layers = {path.split(".layers.")[1].split(".")[0] for path in found.paths if ".layers." in path}
    assert len(layers) in (0, config.get_text_config().num_hidden_layers)
    wrapped(model, found)


@pytest.mark.parametrize(
    ("family", "names", "values"),
    [
        ("qwen3_5", USUAL, {"layer_types": ["full_attention"] * 2}),
        ("qwen3_5", DELTA[3:], {"layer_types": ["linear_attention"] * 2}),
        ("kimi_k25", ("kv_a_proj_with_mqa", "kv_b_proj", "q_proj", "o_proj"), {"q_lora_rank": None}),
    ],
)
def test_targets_that_a_configuration_leaves_out_are_not_asked_for(
    family: str, names: tuple[str, ...], values: dict[str, Any]
) -> None:
    if family not in tiny_models.FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} lacks it")
    config = tiny_models.build(family)[0].config.to_dict()
    text = config["text_config"] | values
    text["num_hidden_layers"] = len(values.get("layer_types", "11"))
    changed = CONFIG_MAPPING[family].from_dict(config | {"text_config": text})
    found = default_targets(changed)
    assert set(found) == set(names)
    assert all(resolve_targets(without_weights(changed), found).by_name.values())


def test_a_language_model_without_attention_is_sized_and_gets_lora(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "vocab_size": 300}
    config = transformers.LlavaConfig(text_config={"model_type": "mamba2", "num_hidden_layers": 2, **sizes})
    assert default_targets(config) == ("in_proj",)
    config.save_pretrained(tmp_path)
    base: Any = SimpleNamespace(path=str(tmp_path))
    text = shape_of(base).text
    assert (text.layers, text.hidden) == (2, 64) and text.parameters > 0


def test_a_language_model_with_other_names_gets_lora_on_its_attention() -> None:
    layer = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"mixing": nn.Linear(4, 4), "back": nn.Linear(4, 4)}),
            "mlp": nn.ModuleDict({"out_proj": nn.Linear(4, 4)}),
        }
    )
    assert mixer_projections(nn.ModuleDict({"layers": nn.ModuleList([layer])})) == ("back", "mixing")
    assert mixer_projections(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": layer["mlp"]})])})) == ()
    assert mixer_projections(nn.Linear(4, 4)) == ()


class Mamba2Mixer(nn.Module):
    """Its kernels take the weight of the output projection, past LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)


def test_the_output_of_mamba_gets_no_lora() -> None:
    layers = nn.ModuleList([nn.ModuleDict({"mixer": Mamba2Mixer()})])
    assert mixer_projections(nn.ModuleDict({"layers": layers})) == ("in_proj",)


class Clipped(nn.Module):
    """A linear layer of a family's own class, as in the tower of Gemma 4."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.linear = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values.clamp(-1, 1))


def test_what_has_the_name_outside_the_language_model_is_left_alone() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    model.model.visual.blocks[0].q_proj = Clipped(nn.Linear(4, 4))
    model.model.visual.blocks[1].v_proj = nn.Conv1d(4, 4, 1)
    found = resolve_targets(model, USUAL)
    assert len(found.paths) == 6 and all(path.startswith("model.language_model.") for path in found.paths)
    assert found.peft == list(found.paths)
    with pytest.raises(ModelError, match="1 modules of that name are outside it, e.g. model.visual.blocks.1.v_proj"):
        resolve_targets(model, ["blocks.1.v_proj"])
    with pytest.raises(ModelError, match="'lm_head' matches no linear module of the language model"):
        resolve_targets(model, ["lm_head"])
    wrapped(model, found)


def test_a_linear_layer_inside_another_class_is_meant_by_that_name() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    attention = model.get_decoder().layers[1].self_attn
    attention.q_proj = Clipped(attention.q_proj)
    found = resolve_targets(model, USUAL)
    assert found.by_name == {"q_proj": 2, "v_proj": 2, "o_proj": 2}
    assert "model.language_model.layers.1.self_attn.q_proj.linear" in found.paths
    wrapped(model, found)


def test_the_head_of_a_language_model_is_not_one_of_its_linear_layers() -> None:
    if "llama4" not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} lacks it")
    model = without_weights(shortened(CONFIG_MAPPING["llama4"]()))
    assert model.get_output_embeddings() is not None
    assert not [path for path in resolve_targets(model, ["all-linear"]).paths if path.endswith("lm_head")]


def test_names_that_mean_nothing_else_stay_names() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    assert resolve_targets(model, USUAL).peft == list(USUAL)


@pytest.mark.skipif("qwen3_omni_moe_thinker" not in CONFIG_MAPPING, reason="this transformers lacks it")
def test_targets_of_a_mixture_of_experts_stay_inside_the_language_model() -> None:
    """PEFT takes the pattern of such a model apart into names, which its towers have too."""
    model = without_weights(shortened(CONFIG_MAPPING["qwen3_omni_moe_thinker"]()))
    wrapped(model, resolve_targets(model, USUAL))


def test_what_peft_refuses_is_one_line() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    targets = Targets(("model.language_model.norm",), ["model.language_model.norm"], {"norm": 1})
    with pytest.raises(ModelError, match="PEFT cannot wrap the modules of this adapter: Target module Qwen"):
        wrapped(model, targets)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral 4, in the family of Mistral 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.FAMILIES, "mistral4", tiny_models_targets.mistral4)
        return tiny_models.save("mistral4", tmp_path_factory.mktemp("latent") / "base")


def chosen(base: Path | str, folder: Path, recipe: Path | None = None, **flags: Any) -> tuple[tuple[str, ...], int]:
    """Targets of a run, and how many notes there are about it."""
    options = TrainOptions(output_dir=folder, base_model=str(base), sft_config=recipe, overrides=flags)
    loaded = read_run_recipe(options)
    return loaded.recipe.target_modules, sum("mistral4" in note for note in loaded.notes)


def test_a_run_takes_the_names_of_its_base_where_the_user_gives_none(latent: Path, tmp_path: Path) -> None:
    (tmp_path / "usual.json").write_text(json.dumps({"target_modules": list(USUAL)}))
    (tmp_path / "other.json").write_text(json.dumps({"target_modules": ["o_proj"]}))
    assert chosen(latent, tmp_path) == (LATENT, 1)
    assert chosen(latent, tmp_path, tmp_path / "usual.json") == (LATENT, 1)
    assert chosen(latent, tmp_path, tmp_path / "other.json") == (("o_proj",), 0)
    assert chosen(latent, tmp_path, target_modules="q_proj,v_proj,o_proj") == (USUAL, 0)
    assert chosen(latent, tmp_path, train="projector") == (USUAL, 0)
    assert chosen("pocket", tmp_path) == (USUAL, 0)
    assert chosen(tmp_path / "nowhere", tmp_path) == (USUAL, 0), "what is wrong with it is told later"


def test_the_forecast_counts_adapters_of_other_names(latent: Path) -> None:
    recipe = load_recipe(None, {"target_modules": ",".join(LATENT)})
    shape = shape_of(find_base(str(latent), bf16=False))
    assert adapter_of(recipe, shape).parameters(shape) > 0


def test_an_adapter_of_a_pattern_still_opens(tmp_path: Path) -> None:
    """Earlier versions wrote one where names were not enough."""
    base = save_base(tmp_path / "base", "llava")
    adapter = save_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / artifacts.ADAPTER_CONFIG).read_text())
    assert all(path.startswith("model.language_model.") for path in config["target_modules"])
    config["target_modules"] = r"model\.language_model\.(?:.*\.)?(?:q_proj|v_proj|o_proj)"
    (adapter / artifacts.ADAPTER_CONFIG).write_text(json.dumps(config))
    assert len(require_fit(adapter, find_base(str(base), bf16=False)).layers) == 6


@pytest.mark.slow
def test_a_run_without_names_goes_through_every_command(
    latent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = bench.trained(latent, tmp_path)
    assert (trained["exit_code"], trained["steps"], trained["evaluated"]) == (0, 2, 4)
    assert f"LoRA on {', '.join(LATENT)}: the layers of mistral4" in capsys.readouterr().out
    lora = artifacts.read_json(tmp_path / "run" / artifacts.RUN)["lora"]
    assert lora["target_modules"] == list(LATENT) and lora["by_name"] == dict.fromkeys(LATENT, 2)
    assert artifacts.read_json(tmp_path / "run" / artifacts.RECIPE)["target_modules"] == list(LATENT)
    assert bench.reloaded(latent, tmp_path) == {"exit_code": 0, "questions": 4, "identical": 4}
    merged = bench.merged(tmp_path)
    assert merged["identical_answers"] == merged["questions"] == 2
    Image.new("RGB", (72, 56), "red").save(tmp_path / "picture.png")
    asked = ["ask", str(tmp_path / "picture.png"), "What is it?", "--adapter", str(tmp_path / "run")]
    assert main([*asked, "--base_model", str(latent)]) == 0
    line = ["--base_model", str(latent), "--dataset", "demo_charts", "--max_train", "16", "--max_eval", "4"]
    assert main(["plan", *line]) == 0
