"""Whether ZeRO-3 has shared a weight out among the ranks, so that this process holds a part of it. Imports torch."""

from __future__ import annotations

import torch


def is_partitioned(*weights: torch.Tensor) -> bool:
    """Whether any of some weights is shared out: DeepSpeed then gives it an id."""
    return any(hasattr(weight, "ds_id") for weight in weights)
