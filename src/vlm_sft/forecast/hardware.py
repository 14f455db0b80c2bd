"""Devices: peak rates, memory and bandwidth, with sources; rates of a machine that was measured.

An unknown device is never taken for a known one: it is measured (`vlm_sft.planning.device_rates`) or refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.errors import RunError, nearest

PUBLISHED = Path(__file__).parent / "published" / "devices.json"


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the table.

    Attributes:
        name: what tells it from the others; one spelling of it.
        spelled: pattern of its name, whole, as drivers report it and people write it, after `_plain`.
        flops: dense bfloat16 products with float32 accumulation, operations per second; of float32 where the device
            has no bfloat16.
        memory: bytes.
        bandwidth: of its memory, bytes per second.
        source: of these numbers.
        bf16: whether it computes in bfloat16.
    """

    name: str
    spelled: str
    flops: float
    memory: int
    bandwidth: float
    source: str
    bf16: bool = True


def _published_devices() -> tuple[Device, ...]:
    """The built-in table."""
    return tuple(
        Device(
            row["name"],
            row["spelled"],
            row["tflops"] * 1e12,
            row["memory_gib"] * 1024**3,
            row["gb_per_second"] * 1e9,
            row["source"],
            row.get("bf16", True),
        )
        for row in read_json(PUBLISHED)["devices"]
    )


DEVICES = _published_devices()
_PASSED_OVER = r"\b(nvidia|amd|geforce|tesla|instinct|hgx|dgx|gpu)\b"


def find_device(name: str) -> Device | None:
    """Find a device by a name that its driver reports or people write; None for one that the table does not hold."""
    return next((device for device in DEVICES if re.fullmatch(device.spelled, _plain(name))), None)


def device_named(name: str) -> Device:
    """Look up what `--gpu_type` names.

    Raises:
        RunError: the table does not hold it.
    """
    device = find_device(name)
    if device is not None:
        return device
    known = {_plain(device.name): device.name for device in DEVICES}
    near = nearest(_plain(name), known, "{}")
    meant = f"; did you mean {known[near]}?" if near else ""
    raise RunError(
        f"--gpu_type {name} is not in the table of devices{meant}", f"choose from {', '.join(known.values())}"
    )


def _plain(name: str) -> str:
    """A name in small letters and digits, without its maker: `NVIDIA H100 80GB HBM3` is `h10080gbhbm3`."""
    words = re.sub(r"[\s_-]+", " ", name.lower())
    return re.sub(_PASSED_OVER, "", words).replace(" ", "")


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one device of a run.

    Attributes:
        name: of the device.
        flops: products of matrices of the model's sizes, operations per second, as they are reached in training.
        bandwidth: of simple operations on large tensors, bytes read and written per second.
        launch: seconds of starting one operation, whatever its size.
        memory: bytes that a process may use.
        gpu: whether it is a GPU.
        source: where the numbers come from, for the list of assumptions.
        spread: how much slower or faster a run may be (a factor above 1).
        unrest: how much slower the same work was on average while this was measured, because other programs held the
            machine; 1 on a free one.
        float32_flops: of products in float32, where others are in bfloat16; None where all are in one format.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    memory: int
    gpu: bool
    source: str
    spread: float
    unrest: float = 1.0
    float32_flops: float | None = None


# Shares of the peaks that kernels reach, before anything was measured. Products: 202 TFLOP in 0.269 s on an H100 of 989
# TFLOP/s (bench/results/gpu_check-nvidia_h100_80gb_hbm3.json); what a whole training reaches of it is lower, as simple
# operations come on top. A launch: short sequences on an A100 (bench/results/published_speeds.json), whose time is
# launches. `bench/forecast_gpu.py` states the errors against every source; the interval is wider, as models differ.
GPU_FLOPS_SHARE = 0.75
GPU_BANDWIDTH_SHARE = 0.7
GPU_LAUNCH_SECONDS = 5e-6
GPU_SPREAD = 1.5


def table_rates(device: Device) -> Rates:
    """The rates of a device of the table, before anything was measured on it."""
    assumed = f"{100 * GPU_FLOPS_SHARE:.0f} % of {device.flops / 1e12:g} TFLOP/s ({device.source})"
    return Rates(
        device.name,
        GPU_FLOPS_SHARE * device.flops,
        GPU_BANDWIDTH_SHARE * device.bandwidth,
        GPU_LAUNCH_SECONDS,
        device.memory,
        True,
        assumed,
        GPU_SPREAD,
    )
