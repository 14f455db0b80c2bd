"""Queries that grow with their token's place in the sequence (Nakanishi 2025, arXiv:2501.19399), as in Llama 4.

transformers counts the place from the beginning of what it is given. In a pack, and behind its cache, that is not the
place in the sequence that a question alone would be, so there the scale is computed from the pack's own index.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vlm_sft.model.forward_patch import is_exchanged, replace_forward
from vlm_sft.model.pack_context import current_pack


def scale_by_index(modules: Iterable[torch.nn.Module]) -> None:
    """Let the attention layers among some modules scale the queries of a pack by its index, once."""
    for module in modules:
        tuned = getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
        if tuned and not is_exchanged(module):
            replace_forward(module, _forward)


def _forward(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention over (1, L, C); nothing is rotated or normed here, so queries are scaled as they come out."""
    index = current_pack().index
    if index is None or hidden_states.shape[1] != len(index):
        return module.forward_stepwise(hidden_states, *args, **kwargs)
    steps = torch.floor((index.float() + 1.0) / module.floor_scale)
    scale = (torch.log1p(steps) * module.attn_scale + 1.0)[None, :, None]
    # Hooked for the call only: the projection may have been wrapped by PEFT since the model was prepared.
    hook = module.q_proj.register_forward_hook(lambda _, inputs, output: (output * scale).to(output.dtype))
    module.attn_temperature_tuning = False
    try:
        return module.forward_stepwise(hidden_states, *args, **kwargs)
    finally:
        module.attn_temperature_tuning = True
        hook.remove()
