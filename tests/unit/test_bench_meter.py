"""The throughput benchmark: what the meter counts is what a training really processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.processing_utils import ProcessorMixin

import cases
from cases import Row, expected_work
from peers import machine, measure, ours_sft
from peers.worker import Job
from shapes import TEMPLATE, parameter_counts
from tests import tiny_models
from throughput_results import check, median_row, summary
from vlm_sft.model.cpu import cross_entropy
from vlm_sft.train.loop import TrainingLoop


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The measuring wrappers, taken off again after the test."""
    for owner in (owner for family in measure.counted_classes() for owner in family):
        monkeypatch.setattr(owner, "forward", owner.forward)
    for owner, name in ((Trainer, "train"), (TrainingLoop, "run"), (cross_entropy, "token_losses")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for owner in (AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, ProcessorMixin):
        monkeypatch.setattr(owner, "from_pretrained", owner.__dict__["from_pretrained"])
    measure.install()
    yield


def test_a_meter_counts_what_a_training_really_processes(
    counting: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = tiny_models.build("qwen2_5_vl")
    Image.new("RGB", (112, 56), "red").save(tmp_path / "a.png")
    rows = [Row(str(tmp_path / "a.png"), "What colour?", "red"), Row(str(tmp_path / "a.png"), "A circle?", "no")]
    expected = expected_work(rows, processor)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        + row.answer
        + "<|im_end|>\n"
        for row in rows
    ]
    pictures = [[Image.open(row.image)] for row in rows]

    def collate(chosen: list[int]) -> dict[str, torch.Tensor]:
        batch = processor(
            text=[texts[i] for i in chosen], images=[pictures[i] for i in chosen], padding=True, return_tensors="pt"
        )
        supervised = [expected_answer(processor, rows[i]) for i in chosen]
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (length, count) in enumerate(zip(batch["attention_mask"].sum(1).tolist(), supervised, strict=True)):
            kept = slice(-count, None) if processor.tokenizer.padding_side == "left" else slice(length - count, length)
            labels[row, kept] = batch["input_ids"][row, kept]
        return {**batch, "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-9,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    meter = measure.Meter()
    with measure.measuring(meter):
        Trainer(model, arguments, train_dataset=[0, 1], data_collator=collate).train()
    result = meter.result()
    assert len(result["epoch_seconds"]) == 2 and result["preparation"] == {}
    for epoch in result["epochs"]:
        assert epoch["language_tokens"] - epoch["padding"] == expected["tokens"]
        assert epoch["image_tokens"] == expected["image_tokens"] == 16
        assert epoch["patches"] == expected["patches"] == 4 * 16
        assert epoch["tower_calls"] == 1 and epoch["tower_images"] == 2
        assert epoch["supervised"] == expected["supervised"]
    assert result["epoch_loss"] == pytest.approx(result["logged_loss"], rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "paligemma"])
def test_our_side_is_followed_through_its_own_loop(counting: None, tmp_path: Path, family: str) -> None:
    side = 56 if family == "qwen2_5_vl" else 64
    model = tiny_models.save(family, tmp_path / "base")
    rows = cases.write(cases.Case("drawn", "drawn"), 8, tmp_path / "rows", tmp_path)
    processor = AutoProcessor.from_pretrained(model)
    shared = family != "paligemma"
    if shared:
        processor.chat_template = TEMPLATE
        processor.save_pretrained(model)
        processor.image_processor.size = {"shortest_edge": 784, "longest_edge": side * side}
    counted = FlopCounterMode(display=False, custom_mapping=machine.product_flops())
    meter = measure.Meter(total_flops=counted.get_total_flops)
    job = Job(
        model=str(model),
        rows=str(tmp_path / "rows"),
        output=str(tmp_path / "out"),
        epochs=2,
        batch=4,
        micro_batch=4,
        max_pixels=side * side,
        learning_rate=1e-6,
        rank=4,
        alpha=8,
        targets=("q_proj", "v_proj", "o_proj"),
        family=family,
    )
    with counted, measure.measuring(meter):
        ours_sft.train(job)
    result = meter.result() | {"peak_memory_bytes": 1, "matrix_peak": 1e9, "versions": {}}
    sizes = parameter_counts(AutoModelForImageTextToText.from_pretrained(model))
    expected = expected_work(rows, processor, shared)
    row = median_row([summary(result | {"warm_up": result}, expected, sizes, 2)])
    assert check({"ours": row}, expected) == {}
    assert len(result["epoch_seconds"]) == len(result["epoch_loss"]) == 2 and len(result["logged_loss"]) == 4
    times = zip(result["data_wait_seconds"], result["epoch_seconds"], strict=True)
    assert all(0 < waited < took for waited, took in times)
    assert result["epoch_loss"][0] == pytest.approx(sum(result["logged_loss"][:2]) / 2, rel=0.1)
    assert row["flops_by_arithmetic"] > 0.2 and row["trainable_parameters"] > 0


def expected_answer(processor: Any, row: Row) -> int:
    """Tokens of the answer with what the template puts behind it."""
    return len(processor.tokenizer(row.answer + "<|im_end|>\n")["input_ids"])
