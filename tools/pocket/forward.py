"""The training pass of pocket over one batch of `batches`.

The stock vision tower loops over pictures in Python under SDPA; here the pictures of a batch have one size and are
attended together, with the same weights and the same result. Shapes as in `batches`; D is the width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from tools.pocket.canvas import CHARACTER_CLASSES, THING_CLASSES
from tools.pocket.labels import COLOUR_FACT, FACT_CLASSES, FACTS, PLACE_FACT, RANK_FACTS, SPELLING_FACTS, UNKNOWN

SLOTS = 8
# Most slots hold nothing; at full weight the head would learn to answer that first.
_NONE_WEIGHT = 0.15
# Layers and heads of the language model that are shown where to look: three for labels, then two for marks.
LOOKING = ((3, 0), (3, 1), (3, 2), (4, 0), (4, 1))
LOOKING_WEIGHT = 0.5
SPELLING_WEIGHT = 0.5  # of the facts how a label is spelled, beside all other facts


class SlotHead(nn.Module):
    """Names the character and the thing under each of the eight slots of a visual token, and the facts about its label.

    Used in training only.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.characters = nn.Linear(width, SLOTS * CHARACTER_CLASSES)
        self.things = nn.Linear(width, SLOTS * THING_CLASSES)
        self.facts = nn.Linear(width, FACTS * FACT_CLASSES)

    def forward(self, features: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of both losses, and the share of written characters and of things that are named right.

        Args:
            features: (B, N, D).
            slots: (2, B, N, 8), characters before things; a map that names nothing adds nothing.
        """
        loss, right = features.new_zeros(()), {}
        for name, head, truth in (("characters", self.characters, slots[0]), ("things", self.things, slots[1])):
            logits = head(features).reshape(truth.numel(), -1)
            flat = truth.reshape(-1)
            present = (flat != 0) & (flat != UNKNOWN)
            if not present.any():
                continue
            weight = logits.new_ones(logits.shape[1])
            weight[0] = _NONE_WEIGHT
            loss = loss + functional.cross_entropy(logits, flat, weight=weight, ignore_index=UNKNOWN)
            right[name] = (logits.argmax(-1) == flat)[present].float().mean().item()
        return loss, right

    def fact_loss(self, features: torch.Tensor, facts: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of the facts about labels, the mean over spelling and over the others added up with `SPELLING_WEIGHT`.

        Right shares are those of values' characters, colours, places, ranks (with order) and spelling.

        Args:
            features: (B, N, D).
            facts: (FACTS, B, N); some are known.
        """
        under = (facts != UNKNOWN).any(0)
        truth = facts[:, under].T
        logits = self.facts(features[under]).reshape(*truth.shape, FACT_CLASSES)
        known, loss = truth != UNKNOWN, logits.new_zeros(())
        hits, right = logits.argmax(-1) == truth, {}
        for name, rows in (
            ("values", slice(COLOUR_FACT)),
            ("colours", slice(COLOUR_FACT, COLOUR_FACT + 1)),
            ("places", slice(PLACE_FACT, PLACE_FACT + 1)),
            ("ranks", slice(RANK_FACTS, SPELLING_FACTS)),
            ("spelling", slice(SPELLING_FACTS, FACTS)),
        ):
            if known[:, rows].any():
                right[name] = hits[:, rows][known[:, rows]].float().mean().item()
        for rows, weight in ((slice(SPELLING_FACTS), 1.0), (slice(SPELLING_FACTS, FACTS), SPELLING_WEIGHT)):
            there = known[:, rows]
            if there.any():
                loss = loss + weight * functional.cross_entropy(logits[:, rows][there], truth[:, rows][there])
        return loss, right


def vision_features(tower: Any, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Visual tokens of pictures of one size.

    Args:
        tower: the stock Qwen2.5-VL vision tower, full attention in every block.
        patches: (B, P, 384).
        grid: rows and columns of visual tokens; both sides below the tower's attention window.

    Returns:
        (B, N, D of the language model), equal to the tower's own output.
    """
    count, length, _ = patches.shape
    rows, columns = grid
    spots = torch.stack(torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"))
    spots = spots.reshape(2, rows, 2, columns, 2).permute(0, 1, 3, 2, 4).reshape(2, length)
    kernel = tower.patch_embed.proj.weight
    hidden = functional.linear(patches, kernel.reshape(kernel.shape[0], -1))
    cos, sin = tower.rotary_pos_emb(hidden, spots.T)
    for block in tower.blocks:
        attention = block.attn
        query, key, value = (
            attention.qkv(block.norm1(hidden)).reshape(count, length, 3, attention.num_heads, -1).unbind(2)
        )
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden).reshape(count, length // 4, -1)


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, features: torch.Tensor, batch: dict[str, Any]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Scores of the vocabulary wherever an answer token is predicted: (S, V); and what enters every layer."""
    embedded = model.get_input_embeddings()(batch["input_ids"])
    length = features.shape[1]
    start = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0])
    embedded = torch.cat([embedded[:, :start], features, embedded[:, start + length :]], dim=1)
    outputs = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=batch["mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        output_hidden_states=True,
    )
    picked = batch["picked"]
    logits = model.lm_head(outputs.last_hidden_state[picked[:, 0], picked[:, 1]])
    return logits, outputs.hidden_states


def looking_loss(
    model: Qwen2_5_VLForConditionalGeneration, hidden: Sequence[torch.Tensor], batch: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """How far the heads of LOOKING look past what the questions are about.

    To find the place in a picture that a question names is learned very slowly from answers alone: until it works, the
    answer gives no hint of where to look. Each head looks for a label or a mark of its own, see `labels`.

    Args:
        hidden: (B, L, width) what enters each layer.
        batch: with seekers and places.

    Returns:
        mean over the seekers of -log(share of attention on the right tokens), and the mean of that share.
    """
    language = model.model.language_model
    rotation = language.rotary_emb(hidden[0], batch["position_ids"])
    projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    found = []
    for look, (layer, head) in enumerate(LOOKING):
        mine = batch["seekers"][:, 0] == look
        if not mine.any():
            continue
        attention = language.layers[layer].self_attn
        if layer not in projected:
            normed = language.layers[layer].input_layernorm(hidden[layer])
            query, key = (
                projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj)
            )
            projected[layer] = apply_rotary_pos_emb(query, key, *rotation)
        query, key = projected[layer]
        _, rows, columns = batch["seekers"][mine].T
        towards = query[:, head] @ key[:, head // attention.num_key_value_groups].transpose(1, 2)
        scores = attention.scaling * towards[rows, columns]
        scores = scores.masked_fill(~batch["mask"][rows, 0, columns], -torch.inf)
        found.append(scores.masked_fill(~batch["places"][mine], -torch.inf).logsumexp(-1) - scores.logsumexp(-1))
    shares = torch.cat(found)
    return -shares.mean(), shares.detach().exp().mean().item()


def batch_loss(
    model: Qwen2_5_VLForConditionalGeneration, head: SlotHead, batch: dict[str, Any], slot_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean loss over the supervised tokens, plus those of slots, of the facts about labels and of where to look.

    Args:
        slot_weight: of the loss of slots, where there are questions.

    Returns:
        the loss, and numbers for the log: answer (nats a token), slots (nats), and the shares
            tokens_right, characters, things, values (of their characters), colours, places, ranks, spelling, looking
            (of attention).
    """
    features = vision_features(model.model.visual, batch["patches"], batch["grid"])
    loss = features.new_zeros(())
    log: dict[str, float] = {}
    if batch["slots"] is not None:
        slot_loss, right = head(features, batch["slots"])
        loss = loss + (slot_weight if "input_ids" in batch else 1.0) * slot_loss
        log |= {"slots": slot_loss.item()} | right
    if batch["facts"] is not None and (batch["facts"] != UNKNOWN).any():
        fact_loss, right = head.fact_loss(features, batch["facts"])
        loss = loss + fact_loss
        log |= right
    if "input_ids" in batch:
        logits, hidden = answer_logits(model, features, batch)
        answer = functional.cross_entropy(logits, batch["targets"])
        loss = loss + answer
        log |= {"answer": answer.item(), "tokens_right": (logits.argmax(-1) == batch["targets"]).float().mean().item()}
        if "seekers" in batch:
            looked, log["looking"] = looking_loss(model, hidden, batch)
            loss = loss + LOOKING_WEIGHT * looked
    return loss, log
