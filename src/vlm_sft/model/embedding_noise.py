"""NEFTune: noise on the embeddings of a model in training (Jain et al. 2023, arXiv:2310.05914).

A token's noise is uniform between plus and minus alpha / sqrt(L C), for L tokens of C channels. It is a hash of what
the masks of dropout are a hash of (`dropout.py`): not a random stream, so a resumed run, other ranks and other packs
draw the same. The questions of an image share its prefix and so the noise there: L of a token in the prefix is the
prefix's length, L of a question's own token is that of the question's whole sequence. Images have no noise: what the
vision tower gives takes the place of the embeddings of their tokens, as with transformers' `neftune_noise_alpha`.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_sft.model.dropout import step_seed, uniform_noise
from vlm_sft.model.pack_context import current_pack
from vlm_sft.model.vision_features import unwrap

_STREAM = 0x4E454654  # apart from the seeds of dropout, which count modules


class EmbeddingNoise:
    """A hook that adds noise to what an embedding gives for a pack in training.

    Args:
        alpha: strength of the noise.
        seed: of the run.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha = alpha
        self.seed = step_seed(seed, _STREAM)

    def __call__(self, module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        """Add the noise to (1, L, C) or (B, T, C) embeddings; outside of packs and of training there is none."""
        pack = current_pack()
        tokens, channels = embedded.shape[:-1].numel(), embedded.shape[-1]
        # Some models look up single tokens, e.g. that of the image, besides those of the pack.
        if not module.training or pack.keys is None or tokens != len(pack.keys):
            return embedded
        size = self.alpha * (pack.lengths(embedded.device) * channels).float().rsqrt()
        noise = uniform_noise(pack.keys, channels, step_seed(self.seed, pack.step)) * size[:, None]
        return embedded + noise.to(embedded.dtype).view_as(embedded)


def add_noise(model: Any, alpha: float, seed: int) -> None:
    """Let a model in training embed tokens with noise; nothing of it is saved.

    Args:
        model: wrapped or not.
        alpha: `neftune_noise_alpha`, above 0.
        seed: of the run.
    """
    unwrap(model).get_input_embeddings().register_forward_hook(EmbeddingNoise(alpha, seed))
