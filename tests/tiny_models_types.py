"""Tiny random models of families that differ more from the others: states, codebooks, patches without a tower."""

from __future__ import annotations

from typing import Any

import transformers

from tests.tiny_models_ocr import CHATML, Builders, Built, chatml, lacking, named_tokenizer
from tests.tiny_models_parts import llama_text, token_ids


def _text(tokenizer: Any, kind: str, **more: Any) -> dict[str, Any]:
    return llama_text(tokenizer) | {"model_type": kind, **more}


def nemotron_h_omni() -> Built:
    """A Nemotron-H Omni: layers of Mamba-2, experts, attention or an MLP alone, behind a RADIO tower."""
    names = {
        "image_token": "<image>",
        "image_start_token": "<img>",
        "image_end_token": "</img>",
        "video_token": "<video>",
        "audio_token": "<so_embedding>",
    }
    tokenizer = named_tokenizer(CHATML, names, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(
        transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=14, min_num_patches=4, max_num_patches=24),
        transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tokenizer,
        transformers.ParakeetFeatureExtractor(),
        chat_template=chatml("<image>"),
    )
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=_text(
            tokenizer,
            "nemotron_h",
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=32,
            n_routed_experts=4,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
        ),
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "patch_size": 14,
            "max_img_size": 112,
            "video_temporal_patch_size": 2,
        },
        audio_config=None,
        vision_hidden_size=32,
        projector_hidden_size=48,
        **token_ids(tokenizer, image_token_id="<image>", video_token_id="<video>", audio_token_id="<so_embedding>"),
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config), processor


# Family to the class that a transformers which has it exports, and its builder.
_BUILDERS: Builders = {"nemotron_h_omni": ("NemotronH_Omni_Reasoning_V3", nemotron_h_omni)}
LACKING = lacking(_BUILDERS)
FAMILIES = {name: build for name, (_, build) in _BUILDERS.items() if name not in LACKING}
