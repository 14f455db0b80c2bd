"""One side's training in its own process and environment: `python worker.py JOB.json RESULT.json`.

A small training goes first, in the same process and with its FLOPs counted: it pays for imports and for what libraries
set up once, and its result is the check of the arithmetic. Then comes the training that is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers import machine, measure  # noqa: E402

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "llamafactory",
    "ms-swift",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Job:
    """The common work, for a side's program.

    Attributes:
        model: model folder.
        rows: folder of the case.
        output: a folder that is not there yet.
        epochs: passes over the rows.
        batch: questions of an optimizer step.
        micro_batch: questions of a forward pass, for sides that count so.
        max_pixels: bound on an image's area in pixels.
        learning_rate: constant.
        rank, alpha, targets: LoRA.
        device: "cpu" or "cuda", which computes in bfloat16.
        family: `model_type` of the model.
        patch: pixels of a side of a patch; four patches make a token.
        cpu_format: number format on a CPU.
    """

    model: str
    rows: str
    output: str
    epochs: int
    batch: int
    micro_batch: int
    max_pixels: int
    learning_rate: float
    rank: int
    alpha: int
    targets: tuple[str, ...]
    device: str = "cpu"
    family: str = "qwen2_5_vl"
    patch: int = 14
    cpu_format: str = "float32"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU trains."""
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """Name of the number format."""
        return "bfloat16" if self.on_gpu else self.cpu_format

    @property
    def bf16(self) -> bool:
        """Whether a side trains in bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def has_flash(self) -> bool:
        """Whether a peer, which needs the package, can use FlashAttention."""
        return self.on_gpu and find_spec("flash_attn") is not None

    @property
    def accumulation(self) -> int:
        """Forward passes of an optimizer step."""
        return max(1, self.batch // self.micro_batch)


def versions() -> dict[str, str]:
    """What this environment holds of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Train, and write what was measured."""
    from torch.utils.flop_counter import FlopCounterMode

    side, warm, timed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["jobs"]
    program: Any = importlib.import_module(f"peers.{side}_sft")
    measure.install()
    on_gpu, bf16 = Job(**timed).on_gpu, Job(**timed).bf16
    counter = FlopCounterMode(display=False, custom_mapping=machine.product_flops())
    # Kernels of a GPU's libraries are not all known to the counter: there the arithmetic stands for itself.
    first = measure.Meter(total_flops=None if on_gpu else counter.get_total_flops)
    with nullcontext() if on_gpu else counter, measure.measuring(first):
        program.train(Job(**warm))
    peak = machine.matrix_peak(on_gpu, bf16)
    machine.forget_peak_memory(on_gpu)
    meter = measure.Meter()
    with measure.measuring(meter):
        program.train(Job(**timed))
    result = {
        "side": side,
        "versions": versions(),
        "warm_up": first.result(),
        **meter.result(),
        "peak_memory_bytes": machine.peak_memory_bytes(on_gpu),
        "matrix_peak": max(peak, machine.matrix_peak(on_gpu, bf16)),
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
