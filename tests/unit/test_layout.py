"""No family of image-text-to-text models ends in a raw error: what cannot be used is refused from its configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
)

from tests.adapters import save_adapter, save_base
from tests.tiny_models_parts import byte_tokenizer
from vlm_sft.cli.main import main
from vlm_sft.common.errors import ModelError
from vlm_sft.model.adapters import resolve_targets
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.layout import require_layout
from vlm_sft.model.load import ready
from vlm_sft.model.parts import ALL, LANGUAGE, PROJECTOR, VISION, saved_modules
from vlm_sft.model.vision_features import tower_modules

REFUSED = {
    "blip",
    "blip-2",
    "florence2",
    "git",
    "idefics",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "kosmos-2.5",
    "pix2struct",
    "t5gemma2",
    "udop",
    "vision-encoder-decoder",
}
KNOWN = {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "gemma3", "internvl", "idefics3", "smolvlm", "mistral3"}


MOST_LAYERS = 4  # of each part of a model: more of them are no other kinds of layers


def with_few_layers(kind: Any) -> Any:
    """The default configuration of a family with few layers, where its settings do not speak of single ones."""
    config = kind()
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(MOST_LAYERS, getattr(part, name)))
    return config


def built(kind: Any) -> tuple[Any, Any] | None:
    """The configuration of a family and its model without weights; None where its defaults build none."""
    for configure in (with_few_layers, lambda kind: kind()):
        try:
            with torch.device("meta"):
                config = configure(kind)
                return config, AutoModelForImageTextToText.from_config(config)
        except Exception:  # settings that do not go together, or a package that is not installed
            continue
    return None


def test_every_family_is_refused_in_one_line_or_can_be_made_ready() -> None:
    """Every family of transformers whose defaults build a model, without weights."""
    refused, taken = set(), set()
    for kind in AutoModelForImageTextToText._model_mapping:
        found = built(kind)
        if found is None:
            continue
        config, model = found
        try:
            require_layout(config, "/models/some")
        except ModelError as error:
            what, fix = str(error).split("\n")
            assert what.startswith(f"--base_model /models/some: models of the family '{config.model_type}' are not")
            assert "docs/FAMILIES.md" in fix
            refused.add(config.model_type)
            continue
        taken.add(config.model_type)
        ready(model, SHARED_SDPA)
        tower_modules(model)
        assert resolve_targets(model, ["all-linear"]).paths
        for part in (LANGUAGE, PROJECTOR, VISION, ALL):
            try:
                saved_modules(model, [part])
            except ModelError as error:
                assert "--train" in str(error)
    assert refused >= REFUSED and taken >= KNOWN
    assert len(taken) > 40


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def blip2() -> Any:
    text = {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    }
    vision = SMALL | {"image_size": 28, "patch_size": 14}
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config=vision, qformer_config=SMALL | {"encoder_hidden_size": 32}, text_config=text)
    )


def git() -> Any:
    vision = SMALL | {"image_size": 28, "patch_size": 14}
    return GitForCausalLM(GitConfig(**SMALL, vocab_size=300, vision_config=vision))


def kosmos2() -> Any:
    text = {"vocab_size": 300, "embed_dim": 32, "layers": 1, "ffn_dim": 32, "attention_heads": 2}
    vision = SMALL | {"image_size": 28, "patch_size": 14}
    return Kosmos2ForConditionalGeneration(Kosmos2Config(text_config=text, vision_config=vision))


def pix2struct() -> Any:
    text = {"vocab_size": 300, "hidden_size": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 32,
        "d_ff": 32,
        "d_kv": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "seq_len": 64,
    }
    return Pix2StructForConditionalGeneration(Pix2StructConfig(text_config=text, vision_config=vision))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    return save_adapter(save_base(place / "base"), place / "adapter")


@pytest.mark.parametrize("make", [blip2, git, kosmos2, pix2struct])
def test_every_command_that_opens_a_base_refuses_it_in_one_line(
    make: Any, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", str(tmp_path / "out")
    make().save_pretrained(base)
    tokenizer = byte_tokenizer(["<|end|>"], eos_token="<|end|>", pad_token="<|end|>")
    kind = GitProcessor if make is git else Blip2Processor
    kind(BlipImageProcessor(), tokenizer).save_pretrained(base)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30)).save(picture)
    lines = [
        ["train", "--dataset", "demo_charts", "--output_dir", out],
        ["eval", "--benchmark", "demo_charts", "--output_dir", out],
        ["ask", str(picture), "What is it?"],
        ["plan", "--dataset", "demo_charts"],
        ["export", "--adapter", str(adapter), "--merge", "--output_dir", out],
    ]
    for line in lines:
        assert main([*line, "--base_model", str(base)]) == 2, line
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and "Traceback" not in told, (line, told)
        assert f"'{make.__name__.replace('blip2', 'blip-2').replace('kosmos2', 'kosmos-2')}' are not supported" in told
        assert not Path(out).exists()


def test_a_known_family_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_sft.model.layout.find_spec", lambda name: None)
    config = SimpleNamespace(model_type="gemma3n")
    with pytest.raises(ModelError, match="models of the family 'gemma3n' need timm\n  fix: pip install timm"):
        require_layout(config, "/models/some")  # type: ignore[arg-type]
