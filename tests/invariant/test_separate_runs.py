"""Runs by the commands of a family whose questions cannot share an image: packing and a resume change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_models
from vlm_sft.cli.main import main
from vlm_sft.data.engine_options import AUTO
from vlm_sft.model.feature_choice import FeatureCost
from vlm_sft.model.padded_rows import PaddedRows, padded_rows

RECIPE = (
    "--dataset demo_charts --max_train 24 --max_eval 8 --max_steps 4 --global_batch_size 8 --learning_rate 1e-3 "
    "--lora_r 4 --report_to none --eval_steps 2 --save_steps 2 --logging_steps 1 --load_best_model_at_end false "
    "--eval_benchmarks none"
)


def train(folder: Path, run: str, *more: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter of a run, and its losses."""
    command = [*RECIPE.split(), "--base_model", str(folder / "base"), "--cache_dir", str(folder / "cache"), *more]
    assert main(["train", "--output_dir", str(folder / run), *command]) == 0
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
    return load_file(folder / run / "adapter_model.safetensors"), losses


def test_packs_and_a_resume_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.save("paligemma", tmp_path / "base")
    batches: list[tuple[int, int]] = []

    def noted(*arguments: Any, **options: Any) -> PaddedRows:
        rows = padded_rows(*arguments, **options)
        batches.append((len(rows.images), len(set(rows.images))))
        return rows

    monkeypatch.setattr("vlm_sft.model.packed_forward.padded_rows", noted)
    adapter, losses = train(tmp_path, "whole")
    assert max(rows for rows, _ in batches) == 8 and any(rows > images for rows, images in batches)
    batches.clear()
    single, others = train(tmp_path, "single", "--packing", "false", "--feature_cache", "off")
    assert set(batches) == {(1, 1)}
    assert others == pytest.approx(losses, abs=2e-5)
    assert max(float((single[name] - adapter[name]).abs().max()) for name in adapter) <= 1e-5

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    (tmp_path / "resumed" / "adapter_model.safetensors").unlink()
    # A tower rounds otherwise beside other images: a resume keeps features, or does not, as the run did.
    kept = json.loads((tmp_path / "whole" / "run.json").read_text())["engine"]["feature_cache"]["training"]["used"]
    monkeypatch.setattr(FeatureCost, "objection", lambda *given: "not now" if kept and AUTO in given else "")
    again, _ = train(tmp_path, "resumed", "--resume", "auto")
    assert (
        json.loads((tmp_path / "resumed" / "run.json").read_text())["engine"]["feature_cache"]["training"]["used"]
        is kept
    )
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)
