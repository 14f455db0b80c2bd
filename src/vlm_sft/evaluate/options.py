"""Options of everything that answers questions, and those of an evaluation; without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.common.options import option
from vlm_sft.data.engine_options import CacheOptions
from vlm_sft.data.prompt import OVERSIZED
from vlm_sft.data.sources.spec import COLUMNS_HELP

ALLOW_OTHER_BASE = "the base may be another one than the adapter was trained on"  # of every verb with --adapter


def unescaped(text: str) -> str:
    """A text as a shell passes it: a backslash and an n stand for a new line."""
    return text.replace("\\n", "\n")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Options of training and evaluation; a prompt or system text of None keeps what base or adapter come with."""

    prompt_template: str | None = option(
        None, "the user's text with {question} in it, \\n for a new line: ", "TEXT", parse=unescaped
    )
    system: str | None = option(None, "system text: ", "TEXT", parse=unescaped)
    max_new_tokens: str | None = option(
        None,
        "limit of an answer in tokens, for all or by benchmark: 32, or chartqa=32,textvqa=16 (default: the "
        "benchmark's; for your own data what its longest answer needs)",
        "N",
    )
    metric: str | None = option(
        None,
        "how answers to your own data are scored: exact_match (default), relaxed_accuracy, vqa_accuracy, anls, "
        "multiple_choice, squad_f1, contains, relaxed_anls, cider, bleu4, rouge_l, judge, or your own "
        "function "
        "module:function; several data sets: NAME=RULE,...",
        "RULE",
    )
    judge: str | None = option(
        None,
        "who grades answers to charxiv, chartmuseum and own data with --metric judge: a command that answers each line "
        "of JSON with one, or the address of an OpenAI-compatible server (http://host:8000/v1)",
        "COMMAND|URL",
    )
    judge_model: str | None = option(None, "the model that is asked at the address of --judge", "NAME")
    shard_weights: str = option(
        "auto",
        "shard the weights over the ranks during the evaluation (FSDP2): auto does so if the model does not fit "
        "on one device (default: %(default)s)",
        choices=("auto", "true", "false"),
    )


PROMPT = ("prompt_template", "system")  # options whose help needs to say what they replace


def oversized_help(policies: Sequence[str]) -> str:
    """What `--oversized` says where only some policies can be chosen; recipes have a key of the same name."""
    said = {
        "keep": "asked as they are",
        "leave_out": "left out",
        "scale": "asked with their images scaled down until they fit",
    }
    return (
        f"what is done with longer questions: {', or '.join(said[name] for name in policies)} (default: as in the "
        "adapter's training, else keep)"
    )


@dataclass(frozen=True, kw_only=True)
class EvalOptions(AnswerOptions):
    """The command line of one evaluation.

    Attributes:
        base_model: "pocket", a folder or a Hub id.
        benchmark: data sets in the grammar of `--dataset`.
        output_dir: folder of the results: <benchmark>/predictions.jsonl and <benchmark>/results.json.
        caches: what is kept on disk; it changes no answer.
    """

    base_model: str
    benchmark: str
    output_dir: Path
    caches: CacheOptions = field(default_factory=CacheOptions)
    adapter: Path | None = option(None, "folder of a LoRA adapter (a run or a checkpoint)", "DIR")
    columns: str | None = option(None, COLUMNS_HELP, "NAME=COLUMN,…")
    limit: int | None = option(None, "at most N questions a benchmark: a seeded sample", "N")
    split: str | None = option(None, "instead of the benchmark's own split", choices=("train", "validation", "test"))
    min_pixels: int | None = option(None, "instead of the adapter's own", "N")
    max_pixels: int | None = option(None, "instead of the adapter's own", "N")
    max_length: int | None = option(
        None,
        "tokens of a question with its images and expected answer (default: as in the adapter's training, else "
        "what the model's positions reach)",
        "N",
    )
    oversized: str | None = option(None, oversized_help(OVERSIZED), choices=OVERSIZED)
    allow_prompt_mismatch: bool = option(
        False, "prompt and image settings may differ from those of the adapter's training"
    )
    allow_other_base: bool = option(False, ALLOW_OTHER_BASE)
    tokens_per_pack: int | None = option(None, "token budget of one forward pass", "N")
    flash_attn: bool = option(False, "FlashAttention (bfloat16, GPUs from Ampere on)")
    load_in_4bit: bool = option(
        False, "hold the language model in 4 bits, as a training with load_in_4bit does (extra vlm-sft[qlora])"
    )
    backend: str = option(
        "transformers",
        "what generates; vllm needs a GPU and the optional extra vlm-sft[vllm] (default: %(default)s)",
        choices=("transformers", "vllm"),
    )
    tensor_parallel_size: int = option(1, "GPUs over which vLLM splits the model (default: %(default)s)", "N")
    max_left_out: float = option(0.01, "share of unusable questions", "SHARE")
    local_rank: int | None = option(None, argparse.SUPPRESS, names=("--local_rank", "--local-rank"))
