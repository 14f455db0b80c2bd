"""What the steps of the GPU check share: where they run, the rows, the model in memory, and their result files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import cases
import shapes
from peers.machine import matrix_peak, now
from throughput_results import arithmetic_flops
from vlm_sft.common import artifacts
from vlm_sft.data.collate import PackedBatch, collate
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.encode import Encoder
from vlm_sft.data.packing import EpochPlanner, bundle_tokens
from vlm_sft.data.prompt import PromptSettings
from vlm_sft.data.sample import ImageRef, Sample
from vlm_sft.forecast.hardware import find_device
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import Base, choose_attention, ready
from vlm_sft.model.packed_forward import Positions
from vlm_sft.model.step_gradients import StepGradients

REPEATS = 3  # timed passes after the first
SIZES = {"cuda": ("7b", 8192, 192), "cpu": ("tiny", 1024, 16)}  # shape, tokens of a pack, questions


@dataclass
class Context:
    """Where the steps run.

    Attributes:
        device: "cuda", in bfloat16, or "cpu", a trial in float32 with a tiny model.
        work: folder of models, rows, logs and results.
        tokenizer: Qwen's tokenizer.json.
        data: folder of ChartQA's parquet files; charts are drawn where it is not there.
    """

    device: str
    work: Path
    tokenizer: Path
    data: Path
    values: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is checked."""
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the frozen weights."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def shape(self) -> str:
        """Name of the model's shape."""
        return SIZES[self.device][0]

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Let `note` write into the result file of one step."""
        self.values, self.path = {"rows": [], "notes": []}, self.work / f"{name}.json"
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(seconds=round(time.perf_counter() - began, 2))

    def note(self, **values: Any) -> None:
        """Add values to the step's result, and write it: a run that is cut off still tells something."""
        self.values |= _finite(values)
        artifacts.write_json(self.path, self.values)

    def row(self, **values: Any) -> None:
        """Add one measurement to the step's result."""
        self.values["rows"].append(_finite(values))
        self.note()

    @cached_property
    def case(self) -> cases.Case:
        """The rows' source: real charts in their own size, or drawn ones."""
        return cases.CASES["native" if self.data.is_dir() else "drawn"]

    def rows_folder(self, questions: int) -> Path:
        """Folder of so many rows, written once."""
        folder = self.work / "cases" / f"{self.case.name}-{questions}"
        cases.write(self.case, questions, folder, self.data)
        return folder

    @cached_property
    def base(self) -> Base:
        """A base whose weights are in no folder."""
        function, notes = choose_attention(True, self.dtype)
        self.values["notes"] += notes
        processor = shapes.processor(self.tokenizer, self.case.max_pixels)
        prompt = PromptSettings(template="{question}")
        return Base("random", "", processor, prompt, (shapes.END,), function, self.dtype, tuple(notes))

    def build(self) -> Any:
        """The model with random weights on its device, as `load_model` would have made it."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen2_5_VLForConditionalGeneration._from_config(
                shapes.config(shapes.SHAPES[self.shape]), dtype=self.dtype
            )
        return ready(model, self.base.function)

    @cached_property
    def encoded(self) -> PreparedData:
        """The encoded rows."""
        folder = self.rows_folder(SIZES[self.device][2])
        rows = [cases.Row(**row) for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]
        samples = [
            Sample(str(number), "check", "", (ImageRef.from_path(row.image),), row.question, row.answer, (row.answer,))
            for number, row in enumerate(rows)
        ]
        encoder = Encoder(self.base.processor, self.base.prompt, self.base.stop_ids)
        return PreparedData(samples, encoder, "images")

    def pack(self, model: Any) -> PackedBatch:
        """The fullest pack of the rows, on the CPU, with the positions that a loader would give it."""
        data, tokens = self.encoded, SIZES[self.device][1]
        planner = EpochPlanner(data.lengths, len(list(data.samples())), tokens, 1, 0)
        packs = planner.epoch(0)[0].ranks[0]
        fullest = max(packs, key=lambda pack: sum(bundle_tokens(one, data.lengths[one.group]) for one in pack))
        batch = collate(fullest, data)
        batch.positions = Positions(model)(batch)
        return batch

    @cached_property
    def peaks(self) -> dict[str, float | None]:
        """FLOP/s of one large matrix product, measured, and of the data sheet."""
        listed = find_device(torch.cuda.get_device_name()) if self.on_gpu else None
        return {"measured": matrix_peak(self.on_gpu, bf16=self.on_gpu), "data_sheet": listed.flops if listed else None}


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have: one of them must not cost the whole step."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def precision(context: Context) -> Any:
    """The context of a forward pass, as a training has it."""
    return torch.autocast(context.device, torch.bfloat16, enabled=context.on_gpu)


def one_pass(context: Context, model: Any, batch: PackedBatch) -> StepGradients:
    """Forward and backward of a pack as a training step does it."""
    gradients = StepGradients(model, PackMode(), 0, 1.0 / max(1, len(batch.targets)), lambda: precision(context))
    gradients.add(batch)
    return gradients


def timed_passes(context: Context, model: Any, batch: PackedBatch, sizes: dict[str, int]) -> dict[str, Any]:
    """Seconds, tokens/s, shares of the peaks and memory of passes over one pack.

    Args:
        context: where they run.
        model: in training, on its device.
        batch: the pack, on the same device.
        sizes: parameters of the model's parts, from `shapes.parameter_counts`.
    """
    if context.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    split: list[dict[str, Any]] = []
    loss = 0.0
    for _ in range(REPEATS + 1):
        began = now()
        found = one_pass(context, model, batch)
        seconds.append(now() - began)
        split, loss = found.splits, float(found.loss)
        del found
    usual = sorted(seconds[1:])[REPEATS // 2]
    counts = {"language_tokens": batch.tokens, "head_rows": len(batch.targets), "patches": patches(batch)}
    rate = arithmetic_flops(counts, sizes) / usual
    language = 4.0 * sizes["language"] * batch.tokens / usual
    peaks = context.peaks
    return {
        "first_seconds": seconds[0],
        "seconds": usual,
        "tokens": batch.tokens,
        "tokens_per_second": batch.tokens / usual,
        "share_of_measured_peak": rate / (peaks["measured"] or 1.0),
        "mfu": rate / peaks["data_sheet"] if peaks["data_sheet"] else None,
        "language_mfu": language / peaks["data_sheet"] if peaks["data_sheet"] else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if context.on_gpu else None,
        "cut_in_two": bool(split),
        "loss": loss,
    }


def patches(batch: PackedBatch) -> int:
    """Patches that the vision tower computes for a pack."""
    return sum(len(image["pixel_values"]) for image in batch.tensors if "pixel_values" in image)


def median_seconds(work: Any, repeats: int = 7) -> tuple[float, float]:
    """Seconds of the first call, and the median of those after it."""
    took: list[float] = []
    for _ in range(repeats + 1):
        began = now()
        work()
        took.append(now() - began)
    return took[0], sorted(took[1:])[repeats // 2]


def relative(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    """Norm of the difference over the norm of the exact value, tensor by tensor; 0 where both are zero."""
    pairs = zip(found, exact, strict=True)
    norms = [(float((one.double() - two.double()).norm()), float(two.double().norm())) for one, two in pairs]
    # Half of the gradients of a fresh adapter are zero.
    return [difference / size if size else float(difference > 0) for difference, size in norms]
