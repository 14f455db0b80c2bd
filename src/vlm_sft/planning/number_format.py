"""Whether a training on a CPU computes in bfloat16: measured, where the processor has instructions for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_sft.common.console import detail
from vlm_sft.common.manifest import read_manifest
from vlm_sft.common.record import bfloat16_flags
from vlm_sft.distributed.collectives import agree
from vlm_sft.forecast.shapes import ModelShape
from vlm_sft.model.cpu.fuse import gated_rows
from vlm_sft.model.cpu.matmul import narrows
from vlm_sft.model.families import FAMILIES
from vlm_sft.model.load import Base
from vlm_sft.planning.device_rates import rates_here
from vlm_sft.planning.run_setting import shape_of
from vlm_sft.recipe.schema import Recipe

PRODUCTS_PAY = 1.5  # products in bfloat16 must be this many times faster
LAYERS_PAY = 1.2  # and a gated MLP, forward and backward, with what is rounded and activated in between
NARROWEST = 256  # channels; in narrower models (pocket: 192) the work between the products hides what they gain
SECONDS = 0.12  # of comparing the MLP, about
_ROWS = 512
_WIDEST = 1024  # wider MLPs compare alike and take longer
_FEWEST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class FormatRates:
    """What this processor reaches in both number formats, at the sizes of a model.

    Attributes:
        float32_flops, bfloat16_flops: operations per second of products.
        layer_ratio: how many times faster a gated MLP is in bfloat16, forward and backward.
        flags: the processor's instructions for bfloat16.
    """

    float32_flops: float
    bfloat16_flops: float
    layer_ratio: float
    flags: tuple[str, ...]

    @property
    def product_ratio(self) -> float:
        """How many times faster products are in bfloat16."""
        return self.bfloat16_flops / self.float32_flops

    @property
    def pays(self) -> bool:
        """Whether bfloat16 is used."""
        return self.product_ratio >= PRODUCTS_PAY and self.layer_ratio >= LAYERS_PAY

    def line(self) -> str:
        """The choice with its reason."""
        chosen = "bfloat16" if self.pays else "float32"
        products = f"{self.bfloat16_flops / 1e9:.0f} GFLOP/s in bfloat16, {self.float32_flops / 1e9:.0f} in float32"
        layer = f"a gated MLP {self.layer_ratio:.1f} times as fast in bfloat16"
        return f"computing in {chosen}: products {products}, {layer} (processor: {', '.join(self.flags)})"


def settle_format(base: Base, recipe: Recipe, engine: bool, checkpoint: Path | None) -> tuple[Base, dict[str, Any]]:
    """The base in the number format that a run computes in; every rank must call it.

    Args:
        base: found with the recipe's `bf16`. Where that decides, or a GPU computes, it is returned as it is.
        recipe: of the run.
        engine: whether DeepSpeed computes.
        checkpoint: what the run resumes from: its number format is gone on with.

    Returns:
        The base; and for run.json what was measured, or why nothing was; {} where there was nothing to choose.
    """
    if recipe.bf16 != "auto" or not narrows("cpu"):
        return base, {}
    saved = read_manifest(checkpoint).get("identity", {}).get("dtype") if checkpoint else None
    if saved is not None:
        return replace(base, dtype=torch.bfloat16 if saved == "bfloat16" else torch.float32), {}
    found = decide_format(shape_of(base), recipe, engine)
    if isinstance(found, str):
        return base, {"reason": found}
    return replace(base, dtype=torch.bfloat16) if found.pays else base, asdict(found)


def decide_format(model: ModelShape, recipe: Recipe, engine: bool) -> FormatRates | str:
    """Measure on rank 0 and say what is chosen, on a CPU that `narrows`.

    Args:
        model: its sizes.
        recipe: of the run, with `bf16` at "auto".
        engine: whether DeepSpeed or FSDP computes.

    Returns:
        What was measured, or why float32 is computed without a measurement.
    """
    if reason := _unmeasured(model, recipe, engine):
        detail(f"computing in float32: {reason}")
        return reason
    rates = agree(lambda: measure_formats(model))
    detail(rates.line())
    return rates


def _unmeasured(model: ModelShape, recipe: Recipe, engine: bool) -> str:
    """Why float32 is computed without a measurement; "" where both formats are measured."""
    if not bfloat16_flags():
        return "this processor has no instructions for bfloat16"
    if engine:  # which would compute norms and activations in bfloat16, too, and they are slower
        return "DeepSpeed and FSDP take no products in bfloat16 alone"
    if "all" in recipe.train or recipe.load_in_4bit:
        return "only frozen weights of 16 bits and more are multiplied in bfloat16"
    if model.text.hidden < NARROWEST:
        return f"in models of less than {NARROWEST} channels bfloat16 gains nothing"
    return "" if model.kind in FAMILIES else f"products of the family '{model.kind}' were not compared in bfloat16"


@torch.no_grad()
def measure_formats(model: ModelShape) -> FormatRates:
    """Time products and a gated MLP at the sizes of a model in both number formats, in turn.

    The products are those that a forecast counts with, which finds them measured then. Of the MLP the quickest call
    counts: another program slows some down, and none of it is the processor's.
    """
    rounded, exact = (rates_here(model, dtype).flops for dtype in (torch.bfloat16, torch.float32))
    hidden, inner = min(model.text.hidden, _WIDEST), min(model.text.intermediate, _WIDEST)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, hidden, generator=generator)
    wide = [torch.randn(inner, hidden, generator=generator) / hidden**0.5 for _ in range(2)]
    back = torch.randn(hidden, inner, generator=generator) / inner**0.5
    narrow = [one.bfloat16() for one in (*wide, back)]
    wide_seconds, narrow_seconds = quickest(
        lambda: _layer(rows, wide[0], wide[1], back), lambda: _layer(rows, narrow[0], narrow[1], narrow[2])
    )
    return FormatRates(exact, rounded, wide_seconds / narrow_seconds, bfloat16_flags())


def _layer(rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """Forward and backward of a gated MLP of (T, C) rows."""
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        output = gated_rows(leaf, [gate, None, up, None, down, None])
    torch.autograd.grad(output, leaf, rows)


def quickest(*works: Callable[[], object]) -> list[float]:
    """Seconds of the quickest call of some pieces of work, called in turn so that all meet the same disturbances."""
    for work in works:
        work()
    best = [float("inf")] * len(works)
    began, rounds = time.perf_counter(), 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() - began < SECONDS:
        for index, work in enumerate(works):
            before = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - before)
        rounds += 1
    return best
