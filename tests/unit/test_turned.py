"""Fused experts are loaded under ZeRO-3, whichever way round a checkpoint holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from tests.tiny_models import qwen3_vl

LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers.integrations import HfDeepSpeedConfig
from vlm_sft.distributed.launch import connected, read_launch
from vlm_sft.model.load import find_base, load_model
import deepspeed

launch = read_launch(None, "zero3")
with connected(launch):
    settings = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    for folder in sys.argv[1:]:
        model = load_model(find_base(folder))
        experts = dict(model.named_parameters())
        assert all(hasattr(one, "ds_id") for one in experts.values())
        with deepspeed.zero.GatheredParameters(list(experts.values())):
            save_file({name: one.detach().clone() for name, one in experts.items()}, f"{folder}/loaded")
"""


def save_moe(folder: Path) -> Path:
    """Write a tiny Qwen3-VL-MoE with its processor."""
    dense, processor = qwen3_vl()
    settings = dense.config.to_dict()
    text, vision = ({**settings[part]} for part in ("text_config", "vision_config"))
    for part in (text, vision):
        del part["model_type"]
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": []}
    ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def turned(source: Path, folder: Path) -> Path:
    """The same model with its fused experts the other way round."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    experts = {name: value.transpose(1, 2).contiguous() for name, value in weights.items() if ".experts." in name}
    assert len(experts) == 6
    save_file(weights | experts, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the deepspeed extra")
def test_fused_experts_are_loaded_under_zero3_whichever_way_round_they_are_kept(tmp_path: Path) -> None:
    folders = [save_moe(tmp_path / "kept")]
    folders.append(turned(folders[0], tmp_path / "turned"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        plain = dict(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).named_parameters())
        loaded = load_file(folder / "loaded")
        assert plain.keys() == loaded.keys()
        assert [name for name in plain if not torch.equal(plain[name], loaded[name])] == []
