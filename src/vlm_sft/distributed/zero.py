"""DeepSpeed and its ZeRO stages: configuration, start, weights that are partitioned."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.distributed.tensor import DTensor

from vlm_sft.common.artifacts import read_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import RunError

ZERO_STAGES = {"zero2": 2, "zero3": 3}
OLDEST_DEEPSPEED = "0.19.2"
TO_BE_DIVIDED = "vlm_sft_to_be_divided"  # attribute of a weight that FSDP will divide (`fsdp.py`)
# Of a collective operation of the training itself: no rank may be away for so long there.
STEP_SECONDS = 1800.0


def require_deepspeed() -> None:
    """Raise RunError where DeepSpeed is not installed, or too old."""
    if find_spec("deepspeed") is None:
        raise RunError("DeepSpeed is requested but not installed", "pip install 'vlm-sft[deepspeed]'")
    found = version("deepspeed")
    if Version(found) < Version(OLDEST_DEEPSPEED):
        raise RunError(
            f"DeepSpeed {found} is installed; before {OLDEST_DEEPSPEED} it may round the frequencies of rotary "
            "positions to bfloat16, which moves distant tokens",
            f"pip install 'deepspeed>={OLDEST_DEEPSPEED}'",
        )


def deepspeed_config(name: str, cpu: bool) -> dict[str, Any]:
    """The configuration of one ZeRO stage, or the user's file; transformers fills in the "auto" values."""
    if name not in ZERO_STAGES:
        if not Path(name).is_file():
            raise RunError(f"--deepspeed {name}: no such file", "pass zero2, zero3 or a DeepSpeed JSON file")
        config = read_json(name)
        if not isinstance(config, dict):
            raise RunError(f"--deepspeed {name}: not a JSON object", "pass a DeepSpeed JSON file")
        if config.pop("scheduler", None) is not None:
            warn(f"--deepspeed {name}: its scheduler is ignored; the recipe sets the learning rate schedule")
        return config
    stage = ZERO_STAGES[name]
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": not cpu, "contiguous_gradients": True}
    if stage == 3:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
        }
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        # The trainer takes whole optimizer steps and logs them itself.
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if cpu:
        adamw = {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "AdamW", "params": adamw}
    return config


def join_deepspeed(cpu: bool) -> None:
    """Let DeepSpeed use the process group that is open.

    Args:
        cpu: whether the ranks compute on CPUs.

    Raises:
        RunError: it is not installed, or too old.
    """
    require_deepspeed()
    import deepspeed

    if cpu:
        without_compiler()
    limit = timedelta(seconds=STEP_SECONDS)
    deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False, timeout=limit)


def without_compiler() -> None:
    """Keep DeepSpeed on CPUs from compiling its own shared-memory collectives, which takes minutes and a C++ compiler.

    DeepSpeed has no switch for that. It reads this table of operators once, when it makes its communication backend,
    which for a single rank happens inside of accelerate; so the entry stays out for the life of the process, and gloo
    communicates. Without the table DeepSpeed compiles, and the collectives are the same.
    """
    import deepspeed.ops

    with suppress(AttributeError):
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)


def is_partitioned(*weights: torch.Tensor) -> bool:
    """Whether any of some weights is divided over the ranks: by ZeRO-3, which gives it an id, or by FSDP."""
    return any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") or hasattr(weight, TO_BE_DIVIDED) for weight in weights
    )


def release_weights(model: torch.nn.Module) -> None:
    """Free this rank's share of weights that ZeRO-3 has partitioned, and that nobody needs any more.

    DeepSpeed's hooks keep such a model for the life of the process, also when its engine was destroyed.
    """
    for parameter in model.parameters():
        share = getattr(parameter, "ds_tensor", None)
        if share is None:
            continue
        share.data, parameter.data = share.new_empty(0), parameter.new_empty(0)
