"""Devices: peak rates, memory and bandwidth, with sources; rates of a machine that was measured. Imports errors only.

An unknown device is never taken for a known one: it is measured (`vlm_sft.train.measure`) or asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_sft.errors import RunError

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the table.

    Attributes:
        name: what `--gpu_type` calls it.
        matches: a pattern of the name that its driver reports.
        flops: dense bfloat16 products with float32 accumulation, operations per second; of float32 where the device
            has no bfloat16.
        memory: bytes.
        bandwidth: of its memory, bytes per second.
        source: of these numbers.
        bf16: whether it computes in bfloat16.
    """

    name: str
    matches: str
    flops: float
    memory: int
    bandwidth: float
    source: str
    bf16: bool = True


# Marketing figures "with sparsity" are halved. Memory is what the driver reports, rounded down.
DEVICES = (
    Device("A100-40GB", r"A100.*40GB", 312e12, 39 * GIB, 1.555e12, "NVIDIA A100 data sheet, 2021"),
    Device("A100-80GB", r"A100.*80GB", 312e12, 79 * GIB, 2.039e12, "NVIDIA A100 data sheet, 2021 (SXM)"),
    Device("H100", r"H100(?!.*(PCIe|NVL))", 989e12, 79 * GIB, 3.35e12, "NVIDIA H100 data sheet, 2023 (SXM)"),
    Device("H100-PCIe", r"H100.*PCIe", 756e12, 79 * GIB, 2.0e12, "NVIDIA H100 data sheet, 2022 (PCIe)"),
    Device("H200", r"H200(?!.*NVL)", 989e12, 139 * GIB, 4.8e12, "NVIDIA H200 data sheet, 2024 (SXM)"),
    Device("L4", r"\bL4\b", 121e12, 22 * GIB, 300e9, "NVIDIA L4 data sheet, 2023"),
    Device("L40S", r"\bL40S\b", 362e12, 44 * GIB, 864e9, "NVIDIA L40S data sheet, 2023"),
    Device("A10", r"\bA10\b", 125e12, 22 * GIB, 600e9, "NVIDIA A10 data sheet, 2021"),
    Device("A10G", r"\bA10G\b", 70e12, 22 * GIB, 600e9, "NVIDIA A10G data sheet, 2021"),
    Device("RTX3090", r"RTX 3090(?! Ti)", 71e12, 23 * GIB, 936e9, "NVIDIA GA102 whitepaper, 2020, table 2"),
    Device("RTX4090", r"RTX 4090", 165.2e12, 23 * GIB, 1.008e12, "NVIDIA Ada whitepaper, 2022, appendix A"),
    Device("A6000", r"RTX A6000", 154.8e12, 47 * GIB, 768e9, "NVIDIA RTX A6000 data sheet, 2021"),
    Device("T4", r"\bT4\b", 8.1e12, 14 * GIB, 320e9, "NVIDIA T4 data sheet, 2019 (float32)", bf16=False),
    Device("V100-16GB", r"V100.*16GB", 15.7e12, 15 * GIB, 900e9, "NVIDIA V100 data sheet, 2020 (float32)", bf16=False),
    Device("V100-32GB", r"V100.*32GB", 15.7e12, 31 * GIB, 900e9, "NVIDIA V100 data sheet, 2020 (float32)", bf16=False),
)


def find_device(reported: str) -> Device | None:
    """Find a device by the name that its driver reports; None for one that the table does not hold."""
    return next((device for device in DEVICES if re.search(device.matches, reported, re.IGNORECASE)), None)


def device_named(name: str) -> Device:
    """Look up what `--gpu_type` names.

    Raises:
        RunError: the table does not hold it.
    """
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise RunError(f"--gpu_type {name} is not in the table of devices", f"choose from {known}")


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device of a run does in a second.

    Attributes:
        name: of the device.
        flops: products of matrices of the model's sizes, operations per second, as they are reached in training.
        bandwidth: of simple operations on large tensors, bytes read and written per second.
        launch: seconds that a small operation takes, whatever its size.
        memory: bytes that a process may use.
        gpu: whether it is a GPU.
        source: where the numbers come from, for the list of assumptions.
        spread: how much slower or faster the outcome may be (a factor above 1).
        unrest: how many times longer the same work took on average while this was measured, because other programs
            held the machine; 1 where it was free.
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
        device.name, GPU_FLOPS_SHARE * device.flops, GPU_BANDWIDTH_SHARE * device.bandwidth, GPU_LAUNCH_SECONDS,
        device.memory, True, assumed, GPU_SPREAD,
    )  # fmt: skip
