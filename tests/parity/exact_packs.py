"""A pack in float64 beside what plain transformers gives each of its questions alone."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.test_exactness import Gradients, gradients, undiminished
from tests.questions import pack
from vlm_sft.data.encode import EncodedGroup
from vlm_sft.data.packing import Bundle
from vlm_sft.model import packed_forward
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import set_attention

LIMIT = 1e-10
Truth = list[list[tuple[torch.Tensor, Gradients]]]  # by group and question: token losses and gradients of their sum


def assert_exact(model: Any, groups: list[EncodedGroup], truth: Truth, bundles: list[Bundle], mode: PackMode) -> None:
    """Losses and gradients of a pack are those of its questions alone."""
    set_attention(model.get_base_model(), SHARED_SDPA if mode.kind == "blockwise" else "sdpa")
    batch = pack(bundles, groups, torch.float64)
    with undiminished(), packed_forward.packed(batch, mode, 0):
        losses = packed_forward.token_losses(model, batch, mode)
        found = gradients(model, losses.sum())
    expected = [truth[bundle.group][number] for bundle in bundles for number in bundle.questions]
    torch.testing.assert_close(losses, torch.cat([one for one, _ in expected]), rtol=LIMIT, atol=LIMIT)
    for name, gradient in found.items():
        total = torch.stack([one[name] for _, one in expected]).sum(0)
        assert (gradient - total).norm() <= LIMIT * total.norm(), name
