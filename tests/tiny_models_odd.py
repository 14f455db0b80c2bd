"""Tiny random models, with real processors, of types that are trained undeclared, separately, or not at all."""

from __future__ import annotations

from typing import Any

import transformers

from tests import tiny_models_gemma as gemma
from tests.tiny_models_experts import OCR2_TEMPLATE
from tests.tiny_models_more import mistral3
from tests.tiny_models_newest import BUILDERS, EXPERTS, MUSE_TOKENS
from tests.tiny_models_ocr import PERCEPTION_TEMPLATE
from tests.tiny_models_parts import (
    CHATML,
    LLAVA_TEMPLATE,
    TOWER,
    Builders,
    Built,
    byte_tokenizer,
    chatml,
    lacking,
    named_tokenizer,
    qwen_ids,
    text_of,
    token_ids,
)
from tests.tiny_models_recurrent import QWEN3_5_TOWER, qwen3_5_processor, qwen3_5_text

M3_TOKENS = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
LLAMA_TURNS = ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>"]
CODES = {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}


def muse_glimmer() -> Built:
    """A Muse Glimmer: layers that look back 24 tokens, features that are normed where they enter."""
    tokenizer = byte_tokenizer([*CHATML, *MUSE_TOKENS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.MuseGlimmerProcessor(
        transformers.MuseGlimmerImageProcessor(max_image_tokens=24),
        transformers.MuseGlimmerVideoProcessor(),
        tokenizer,
        chat_template=chatml("<|patch|>"),
    )
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.MuseGlimmerConfig(
        text_config=text_of(tokenizer, num_hidden_layers=3, head_dim=16, sliding_window=24, layer_types=layers),
        vision_config=TOWER | {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
        out_hidden_size=128,
        projector_hidden_size=48,
        **token_ids(tokenizer, image_token_id="<|patch|>", video_token_id="<|video|>"),
    )
    return transformers.MuseGlimmerForConditionalGeneration(config), processor


def gemma4_unified() -> Built:
    """A Gemma 4 without a tower, whose image tokens see each other in both directions."""
    _, larger = gemma.gemma4_larger()
    tokenizer = larger.tokenizer
    pictures = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}
    processor = transformers.Gemma4UnifiedProcessor(
        transformers.Gemma4UnifiedAudioFeatureExtractor(),
        transformers.Gemma4UnifiedImageProcessor(**pictures),
        tokenizer,
        transformers.Gemma4UnifiedVideoProcessor(**pictures),
        chat_template=gemma.GEMMA_TEMPLATE,
        image_seq_length=70,
    )
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4UnifiedConfig(
        text_config=text_of(
            tokenizer, num_hidden_layers=4, head_dim=16, global_head_dim=32, sliding_window=24, layer_types=layers
        ),
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "mm_embed_dim": 32,
            "mm_posemb_size": 128,
            "output_proj_dims": 32,
            "num_soft_tokens": 70,
        },
        audio_config=None,
        **token_ids(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            audio_token_id="<|audio|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
        ),
    )
    return transformers.Gemma4UnifiedForConditionalGeneration(config), processor


def minimax_m3_vl() -> Built:
    """A MiniMax M3: experts, and layers of sparse attention with an index."""
    tokenizer = byte_tokenizer([*CHATML, *M3_TOKENS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 32}
    processor = transformers.MiniMaxM3VLProcessor(
        transformers.MiniMaxM3VLImageProcessor(size=size),
        tokenizer,
        transformers.MiniMaxM3VLVideoProcessor(),
        chat_template=chatml(M3_TOKENS[0]),
    )
    index = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2}
    experts = {"dense_intermediate_size": 48, "shared_intermediate_size": 24, "num_local_experts": 4}
    layers = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    config = transformers.MiniMaxM3VLConfig(
        text_config=text_of(
            tokenizer,
            num_hidden_layers=3,
            layer_types=layers,
            head_dim=16,
            rotary_dim=8,
            num_experts_per_tok=2,
            **experts,
            **index,
        ),
        vision_config=TOWER | {"image_size": 112, "patch_size": 14},
        projector_hidden_size=48,
        **token_ids(tokenizer, image_token_index=M3_TOKENS[0], video_token_index=M3_TOKENS[1]),
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config), processor


def mistral_large4() -> Built:
    """A Mistral Large 4: latent attention to the eight tokens that an index chooses, experts."""
    _, processor = mistral3()
    latent = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 8}
    config = transformers.MistralLarge4Config(
        text_config=text_of(
            processor.tokenizer,
            num_hidden_layers=3,
            num_key_value_heads=4,
            n_shared_experts=1,
            n_routed_experts=4,
            **EXPERTS,
            **latent,
            **index,
        ),
        vision_config=TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 112, "patch_size": 14},
        **token_ids(processor.tokenizer, image_token_index="[IMG]"),
    )
    return transformers.MistralLarge4ForConditionalGeneration(config), processor


def qwen4_exp() -> Built:
    """A Qwen 4 preview: Gated DeltaNet, indexed attention, several residual streams, embeddings of n-grams."""
    processor = qwen3_5_processor()
    text = qwen3_5_text(processor.tokenizer)
    del text["intermediate_size"]
    streams = {"hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 8, "heads_per_ngram": 2, "ngram_vocab_size_base": 64}
    words = {"make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1}
    index = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 64, "compress_ratio": 2}
    text |= EXPERTS | streams | words | {f"indexer_{name}": value for name, value in index.items()}
    config = transformers.Qwen4ExpConfig(
        text_config=text | {"num_experts": 4, "shared_expert_intermediate_size": 24},
        vision_config=QWEN3_5_TOWER,
        **qwen_ids(processor.tokenizer),
    )
    return transformers.Qwen4ExpForConditionalGeneration(config), processor


def unlimited_ocr() -> Built:
    """An Unlimited-OCR: DeepSeek-OCR's tower, and answers that look back 8 of their own tokens."""
    names = ["<image>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"]
    tokenizer = byte_tokenizer(names, eos_token="<|end_of_sentence|>", pad_token="<|pad|>")
    processor = transformers.UnlimitedOcrProcessor(
        transformers.UnlimitedOcrImageProcessor(), tokenizer, chat_template=OCR2_TEMPLATE
    )
    details = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "global_attn_indexes": [1],
        "mlp_dim": 24,
        "downsample_channels": [16, 32],
    }
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    config = transformers.UnlimitedOcrConfig(
        text_config=text_of(tokenizer, num_hidden_layers=3, sliding_window=8, **EXPERTS, **experts),
        vision_config={"sam_config": details, "encoder_config": TOWER},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers.UnlimitedOcrForConditionalGeneration(config), processor


def emu3() -> Built:
    """An Emu 3: an image as tokens of a codebook."""
    names = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
        "eol_token": "<|extra_200|>",
    }
    codes = [f"<|visual token {number:06d}|>" for number in range(32)]
    tokenizer = named_tokenizer(
        [*CHATML, *codes], names, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    processor = transformers.Emu3Processor(
        transformers.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64, spatial_factor=8),
        tokenizer,
        chat_template=chatml("<image>"),
    )
    places = {name: tokenizer.convert_tokens_to_ids(name) for name in (*codes, "<image>", "<|extra_200|>")}
    book = CODES | {
        "codebook_size": 32,
        "embed_dim": 4,
        "latent_channels": 4,
        "hidden_size": 32,
        "attn_resolutions": [3],
    }
    config = transformers.Emu3Config(
        text_config=text_of(tokenizer), vq_config=book | {"num_attention_heads": 1}, vocabulary_map=places
    )
    return transformers.Emu3ForConditionalGeneration(config), processor


def chameleon() -> Built:
    """A Chameleon: an image as tokens of a codebook, inside the language model."""
    codes = [f"IMGIMGBS{chr(ord('A') + number)}Z" for number in range(26)]
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = named_tokenizer(
        ["<pad>", "</s>", "<sep>", *codes], names, eos_token="</s>", pad_token="<pad>", sep_token="<sep>"
    )
    size = {"height": 32, "width": 32}
    processor = transformers.ChameleonProcessor(
        transformers.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer, image_seq_length=16
    )
    processor.chat_template = LLAVA_TEMPLATE
    config = transformers.ChameleonConfig(
        **text_of(tokenizer),
        vq_config=CODES | {"embed_dim": 8, "num_embeddings": 26, "resolution": 32},
        vocabulary_map={name: tokenizer.convert_tokens_to_ids(name) for name in (*codes, "<image>")},
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.ChameleonForConditionalGeneration(config), processor


def fuyu() -> Built:
    """A Fuyu: patches of the picture are tokens of the language model; its processor knows no chat template."""
    names = ["|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>"]
    tokenizer = byte_tokenizer(names, eos_token="|ENDOFTEXT|", pad_token="|ENDOFTEXT|", bos_token="<s>")
    side = {"height": 15, "width": 15}
    processor = transformers.FuyuProcessor(
        transformers.FuyuImageProcessor(size={"height": 60, "width": 60}, patch_size=side), tokenizer
    )
    config = transformers.FuyuConfig(
        text_config=text_of(tokenizer, "persimmon"),
        image_size=60,
        patch_size=15,
        **token_ids(tokenizer, image_token_id="|SPEAKER|"),
    )
    return transformers.FuyuForCausalLM(config), processor


def got_ocr2() -> Built:
    """A GOT-OCR 2: SAM, which takes no SDPA, and Qwen2; its processor writes the whole prompt itself."""
    tokenizer = byte_tokenizer(
        [*CHATML, "<img>", "</img>", "<imgpad>"], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    processor = transformers.GotOcr2Processor(
        transformers.GotOcr2ImageProcessor(size={"height": 64, "width": 64}), tokenizer
    )
    tower = {"output_channels": 16, "global_attn_indexes": [1], "mlp_dim": 24, "image_size": 64, "patch_size": 16}
    config = transformers.GotOcr2Config(
        text_config=text_of(tokenizer, "qwen2"),
        vision_config=tower | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1},
        image_seq_length=1,
        **token_ids(tokenizer, image_token_index="<imgpad>"),
    )
    return transformers.GotOcr2ForConditionalGeneration(config), processor


def mllama() -> Built:
    """A Llama 3.2 Vision: the language model looks at the picture by cross-attention."""
    tokenizer = byte_tokenizer(
        [*LLAMA_TURNS, "<|image|>", "<|python_tag|>"],
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        bos_token="<|begin_of_text|>",
    )
    processor = transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=2),
        tokenizer,
        chat_template=PERCEPTION_TEMPLATE,
    )
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 48,
        "vision_output_dim": 64,
        "image_size": 56,
        "patch_size": 14,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        text_config=text_of(tokenizer, num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=rope),
        vision_config=tower,
        **token_ids(tokenizer, image_token_index="<|image|>"),
    )
    return transformers.MllamaForConditionalGeneration(config), processor


# Type to the class that a transformers which has it exports, and its builder.
_BUILDERS: Builders = {
    **BUILDERS,
    "muse_glimmer": ("MuseGlimmerForConditionalGeneration", muse_glimmer),
    "gemma4_unified": ("Gemma4UnifiedForConditionalGeneration", gemma4_unified),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", minimax_m3_vl),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", mistral_large4),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", qwen4_exp),
    "unlimited_ocr": ("UnlimitedOcrForConditionalGeneration", unlimited_ocr),
    "emu3": ("Emu3ForConditionalGeneration", emu3),
    "chameleon": ("ChameleonForConditionalGeneration", chameleon),
    "fuyu": ("FuyuForCausalLM", fuyu),
    "got_ocr2": ("GotOcr2ForConditionalGeneration", got_ocr2),
    "mllama": ("MllamaForConditionalGeneration", mllama),
}
MODELS = {name: build for name, (_, build) in _BUILDERS.items() if name not in lacking(_BUILDERS)}
