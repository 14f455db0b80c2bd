"""Devices: peak rates, memory and bandwidth, with sources; rates of a machine that was measured.

An unknown device is never taken for a known one: it is measured (`vlm_sft.planning.device_rates`) or asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_sft.common.errors import RunError, nearest

GIB = 1024**3


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


# Marketing figures "with sparsity" are halved. Memory is what PyTorch reports, rounded down. A plain name is the card
# with less memory.
DEVICES = (
    Device(
        "A100-40GB",
        r"a100(sxm4?|pcie)?(40gb?)?(sxm4?|pcie)?",
        312e12,
        39 * GIB,
        1.555e12,
        "NVIDIA A100 data sheet, 2021",
    ),
    Device(
        "A100-80GB",
        r"a100(sxm4?|pcie)?80gb?(sxm4?|pcie)?",
        312e12,
        79 * GIB,
        2.039e12,
        "NVIDIA A100 data sheet, 2021 (SXM)",
    ),
    Device(
        "H100", r"h100(sxm5?)?(80gb?)?(sxm5?)?(hbm3)?", 989e12, 79 * GIB, 3.35e12, "NVIDIA H100 data sheet, 2023 (SXM)"
    ),
    Device("H100-PCIe", r"h100(80gb?)?pcie(80gb?)?", 756e12, 79 * GIB, 2.0e12, "NVIDIA H100 data sheet, 2022 (PCIe)"),
    Device("H100-NVL", r"h100(94gb?)?nvl(94gb?)?", 835e12, 93 * GIB, 3.9e12, "NVIDIA H100 data sheet, 2023 (NVL)"),
    Device(
        "H200",
        r"h200(sxm5?)?(141gb?)?(sxm5?)?(hbm3e)?",
        989e12,
        139 * GIB,
        4.8e12,
        "NVIDIA H200 data sheet, 2024 (SXM)",
    ),
    Device("H200-NVL", r"h200(141gb?)?nvl(141gb?)?", 835e12, 139 * GIB, 4.8e12, "NVIDIA H200 data sheet, 2024 (NVL)"),
    Device(
        "B200",
        r"b200(sxm6?)?(180gb?|192gb?)?(sxm6?)?(hbm3e)?",
        2250e12,
        178 * GIB,
        8.0e12,
        "NVIDIA DGX B200 data sheet, 2024, an eighth",
    ),
    Device(
        "GB200",
        r"gb200(nvl(4|72))?(18[69]gb?|192gb?)?",
        2500e12,
        184 * GIB,
        8.0e12,
        "NVIDIA GB200 NVL72 data sheet, 2024, a 72nd",
    ),
    Device("L4", r"l4(24gb?)?", 121e12, 22 * GIB, 300e9, "NVIDIA L4 data sheet, 2023"),
    Device("L40S", r"l40s(48gb?)?", 362e12, 44 * GIB, 864e9, "NVIDIA L40S data sheet, 2023"),
    Device("A10", r"a10(24gb?)?", 125e12, 22 * GIB, 600e9, "NVIDIA A10 data sheet, 2021"),
    Device("A10G", r"a10g(24gb?)?", 70e12, 22 * GIB, 600e9, "NVIDIA A10G data sheet, 2021"),
    Device("RTX3090", r"(rtx)?3090(24gb?)?", 71e12, 23 * GIB, 936e9, "NVIDIA GA102 whitepaper, 2020, table 2"),
    Device("RTX4090", r"(rtx)?4090(24gb?)?", 165.2e12, 23 * GIB, 1.008e12, "NVIDIA Ada whitepaper, 2022, appendix A"),
    Device(
        "RTX5090",
        r"(rtx)?5090(32gb?)?",
        209.5e12,
        31 * GIB,
        1.792e12,
        "NVIDIA RTX Blackwell whitepaper, 2025, appendix A",
    ),
    Device("A6000", r"(rtx)?a6000(48gb?)?", 154.8e12, 47 * GIB, 768e9, "NVIDIA RTX A6000 data sheet, 2021"),
    Device(
        "RTX6000-Ada",
        r"(rtx)?6000ada(generation)?(48gb?)?",
        364.2e12,
        47 * GIB,
        960e9,
        "NVIDIA RTX 6000 Ada data sheet, 2023: a quarter of 1,457 TFLOP/s in sparse fp8",
    ),
    Device(
        "RTX-PRO-6000",
        r"(rtx)?(pro6000|6000pro|6000blackwell)(blackwell)?(workstation)?(edition)?(96gb?)?",
        500e12,
        94 * GIB,
        1.792e12,
        "NVIDIA RTX PRO 6000 Blackwell Workstation data sheet, 2025: an eighth of 4,000 TFLOP/s in sparse fp4",
    ),
    Device(
        "RTX-PRO-6000-Server",
        r"(rtx)?(pro6000|6000pro)(blackwell)?server(edition)?(96gb?)?",
        500e12,
        94 * GIB,
        1.597e12,
        "NVIDIA RTX PRO 6000 Blackwell Server data sheet, 2025: an eighth of 4,000 TFLOP/s in sparse fp4",
    ),
    Device("MI300X", r"mi300x(oam)?(192gb?)?", 1307.4e12, 191 * GIB, 5.3e12, "AMD Instinct MI300X data sheet, 2023"),
    Device("T4", r"t4(1[56]gb?)?", 8.1e12, 14 * GIB, 320e9, "NVIDIA T4 data sheet, 2019 (float32)", bf16=False),
    Device(
        "V100-16GB",
        r"v100(sxm[23]?|pcie|fhhl|dgxs)?(16gb?)?",
        15.7e12,
        15 * GIB,
        900e9,
        "NVIDIA V100 data sheet, 2020 (float32)",
        bf16=False,
    ),
    Device(
        "V100-32GB",
        r"v100(s?pcie|sxm[23]?|dgxs)?32gb?(ls)?",
        15.7e12,
        31 * GIB,
        900e9,
        "NVIDIA V100 data sheet, 2020 (float32)",
        bf16=False,
    ),
)
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
        device.name,
        GPU_FLOPS_SHARE * device.flops,
        GPU_BANDWIDTH_SHARE * device.bandwidth,
        GPU_LAUNCH_SECONDS,
        device.memory,
        True,
        assumed,
        GPU_SPREAD,
    )
