"""How far the forecast of a GPU is from what was recorded and published there: speed and memory of single passes.

    python bench/forecast_gpu.py

Nothing is measured: every source in bench/results is forecast from the table of devices, and the errors are written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from common import RESULTS, write_block
from vlm_sft.common.artifacts import read_json
from vlm_sft.data.token_estimate import EXPECTED
from vlm_sft.forecast.flops import Adapter, Work
from vlm_sft.forecast.hardware import device_named, table_rates
from vlm_sft.forecast.memory import peak_items
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.shapes import ModelShape, TextShape, VisionShape, find_published
from vlm_sft.forecast.time import tower_seconds, training_seconds

TITLE = "Forecast of GPUs against recorded and published passes"
SOME = ("q_proj", "v_proj", "o_proj")
# Modes of gpu_check: dropout, liger-kernel, checkpointing, kept features. Of the others the frozen tower kept its
# activations by mistake (see the note above their table), or its libraries' modules are not what a training runs.
MODES = {
    "dropout 0.05, without liger-kernel": (True, False, False, False),
    "dropout 0": (False, True, False, False),
    "dropout 0.05": (True, True, False, False),
    "dropout 0, checkpointing": (False, True, True, False),
    "kept features": (True, True, False, True),
}


@dataclass(frozen=True)
class Compared:
    """One pass: tokens per second and bytes, forecast and in fact."""

    what: str
    said_speed: float
    speed: float
    said_bytes: float
    peak_bytes: float

    @property
    def speed_error(self) -> float:
        """Relative to what was measured."""
        return self.said_speed / self.speed - 1

    @property
    def memory_error(self) -> float:
        """Relative to what was measured."""
        return self.said_bytes / self.peak_bytes - 1


def recorded() -> list[Compared]:
    """The pack of `gpu_check` on an H100."""
    steps = read_json(RESULTS / "gpu_check-nvidia_h100_80gb_hbm3.json")["steps"]
    shape = find_published("Qwen/Qwen2.5-VL-7B-Instruct").shape
    pack = recorded_pack(steps["modes"], shape)
    rows = {row["mode"]: row for step in ("modes", "features") for row in steps[step]["rows"]}
    found = []
    for mode, (dropout, fused, again, features) in MODES.items():
        setting = Setting(
            shape,
            Adapter(16, SOME, dropout),
            2,
            again,
            table_rates(device_named("H100")),
            fused=fused,
            flash_heads=shape.text.heads,
        )
        tower = 0.0 if features else tower_seconds(setting, pack, training=True)
        found.append(_compared(f"H100, Qwen2.5-VL-7B: {mode}", setting, pack, tower, features, rows[mode]))
    return found


def recorded_pack(modes: dict[str, Any], shape: ModelShape) -> Work:
    """The work of the pack that `gpu_check` measured; its images are about alike."""
    tokens, images, questions = modes["tokens"], modes["images"], modes["questions"]
    visual = modes["patches"] / shape.vision.patches_per_token
    prefix = visual / images + EXPECTED.prefix
    return Work(
        1,
        tokens,
        tokens**2 / images,
        modes["supervised"],
        questions,
        images,
        visual,
        visual**2 / images,
        tokens + questions * prefix,
    )


def published() -> list[Compared]:
    """LoRA of Qwen-VL-Chat on an A100, as its README has it: plain transformers, every score of the vocabulary."""
    source = read_json(RESULTS / "published_speeds.json")
    shape = qwen_vl()
    adapter = Adapter(64, tuple(name for name in shape.text.linears if name != "down_proj"))
    rates = table_rates(device_named(source["device"]))
    setting = Setting(shape, adapter, 2, True, rates, flash_heads=shape.text.kv_heads)
    visual = source["patches"] / shape.vision.patches_per_token
    found = []
    for row in source["rows"]:
        tokens = row["tokens"]
        work = Work(1, tokens, tokens**2, tokens, 1, 1, visual, visual**2, tokens)
        actual = {"tokens_per_second": source["sequences"] * tokens / row["seconds"], "peak_bytes": row["peak_bytes"]}
        what = f"A100, {source['model']}: {tokens:,} tokens, checkpointing"
        found.append(_compared(what, setting, work, tower_seconds(setting, work), False, actual))
    return found


def qwen_vl() -> ModelShape:
    """Qwen-7B with a tower of ViT-bigG (Bai et al. 2023, arXiv:2308.12966, table 1: 7.7, 1.9 and 0.08 billion)."""
    text = TextShape(32, 4096, 11008, 32, 32, 128, 151_936, 0, False)
    text = replace(text, parameters=text.layers * text.layer_weights)
    vision = VisionShape(48, 1664, 1_850_000_000, 80_000_000, 1_930_000_000, 4, 0, 48, 588)
    return ModelShape("qwen_vl", text, vision)


def _compared(
    what: str, setting: Setting, work: Work, tower: float, features: bool, actual: dict[str, Any]
) -> Compared:
    seconds = training_seconds(setting, work) + tower
    held = sum(peak_items(setting, work, 0, features).values())
    return Compared(what, work.tokens / seconds, actual["tokens_per_second"], held, actual["peak_bytes"])


def table(rows: list[Compared]) -> str:
    """The errors as Markdown."""
    lines = [
        "| pass | tokens/s forecast | tokens/s | error | GB forecast | GB | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.what} | {row.said_speed:,.0f} | {row.speed:,.0f} | {100 * row.speed_error:+.0f} % | "
        f"{row.said_bytes / 1e9:.1f} | {row.peak_bytes / 1e9:.1f} | {100 * row.memory_error:+.0f} % |"
        for row in rows
    ]
    source = read_json(RESULTS / "published_speeds.json")
    return "\n".join(
        [
            *lines,
            "",
            "H100: `gpu_check` below; its numbers set the rates of GPUs in `forecast/time.py`, so these errors "
            "are those of a fit. "
            f"A100: {source['source']}; the seconds of a launch were set by its shortest sequences.",
        ]
    )


def main() -> None:
    """Write the table."""
    write_block("forecast_gpu", TITLE, table([*recorded(), *published()]))


if __name__ == "__main__":
    main()
