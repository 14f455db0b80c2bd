"""Versions of what is installed, and the attention kernels of packs and of vision towers against SDPA."""

from __future__ import annotations

import platform
from typing import Any

import torch

import attention
from gpu_steps.context import Context, median_seconds, relative
from peers.machine import now
from vlm_sft.common.record import versions
from vlm_sft.model.attention import PackLayout, shared_sdpa, shared_windows
from vlm_sft.model.gpu.flash import flash_problem, flash_windows, shared_flash

HEADS, WIDTH = (28, 4, 4), 128  # of the 7B's language model
TOWER_HEADS, TOWER_WIDTH, WINDOW = 16, 80, 64  # of its vision tower; patches of a window
# Images, tokens of a prefix, questions an image, tokens of a question.
PACKS = ((8, 700, 2, 40), (2, 3800, 4, 60), (16, 256, 10, 24), (1, 8000, 3, 60), (20, 380, 1, 30), (4, 1500, 12, 45))
TOWERS = ((2560,), (2400, 2800, 3000), (10_000,))  # patches of each image
TRIAL_PACKS, TRIAL_TOWERS = ((2, 20, 2, 5), (1, 33, 3, 4)), ((128,), (70, 190))


def installed(context: Context) -> None:
    """Versions, the device, and what stands in the way of FlashAttention."""
    facts: dict[str, Any] = {"python": platform.python_version(), "versions": versions()}
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability()),
        }
    context.note(**facts, flash_problem=flash_problem(context.dtype), peaks=context.peaks)


def kernels(context: Context) -> None:
    """The language model's attention over packs, and the tower's over windows and whole images."""
    for sizes in PACKS if context.on_gpu else TRIAL_PACKS:
        images, prefix, questions, question = sizes
        branches = attention.branches(*sizes)
        layout = PackLayout(branches[-1][-1], branches)
        states = _states(context, HEADS, layout.length, WIDTH)
        both = {"sdpa": attention.ours(shared_sdpa, layout), "flash": attention.ours(shared_flash, layout)}
        where = f"{images} x ({prefix} + {questions} x {question})"
        context.row(what="pack", sizes=where, tokens=layout.length, **_compare(both, states))
    for lengths in TOWERS if context.on_gpu else TRIAL_TOWERS:
        for kind, ends in (("windows", _windows(lengths)), ("images", _ends(lengths))):
            states = _states(context, (TOWER_HEADS,) * 3, sum(lengths), TOWER_WIDTH)
            where = f"{', '.join(map(str, lengths))} patches"
            context.row(
                what=f"tower, {kind}",
                sizes=where,
                tokens=sum(lengths),
                **_compare(_tower(ends.to(context.device)), states),
            )


def _states(context: Context, heads: tuple[int, ...], length: int, width: int) -> list[torch.Tensor]:
    """Random queries, keys and values, (1, H, L, D)."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn((1, count, length, width), generator=generator) for count in heads]
    return [one.to(context.device, context.dtype) for one in made]


def _ends(lengths: tuple[int, ...]) -> torch.Tensor:
    """Cumulative lengths, int32."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _windows(lengths: tuple[int, ...]) -> torch.Tensor:
    """The ends of windows in which images are cut."""
    sizes: list[int] = []
    for length in lengths:
        sizes += [WINDOW] * (length // WINDOW) + ([length % WINDOW] if length % WINDOW else [])
    return _ends(tuple(sizes))


def _tower(ends: torch.Tensor) -> dict[str, attention.Kernel]:
    """Both functions of the tower."""

    def of(function: Any) -> attention.Kernel:
        return lambda states: function(torch.nn.Module(), *states, None, cu_seq_lens_q=ends)[0]

    return {"sdpa": of(shared_windows), "flash": of(flash_windows)}


def _compare(both: dict[str, attention.Kernel], states: list[torch.Tensor]) -> dict[str, Any]:
    """Milliseconds of first and later calls, forward and with backward, and errors against float64."""
    row: dict[str, Any] = {}
    exact = attention.run(both["sdpa"], [state.double() for state in states], True)
    for name, kernel in both.items():
        began = now()
        found = attention.run(kernel, states, True)
        row[f"{name}_first_ms"] = 1e3 * (now() - began)
        row[f"{name}_errors"] = relative(found, exact)
        for key, backward in (("forward", False), ("both", True)):
            row[f"{name}_{key}_ms"] = 1e3 * median_seconds(lambda k=kernel, b=backward: attention.run(k, states, b))[1]
    return row
