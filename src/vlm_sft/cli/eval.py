"""`vlm-sft eval`: answer benchmarks with a base model or an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from vlm_sft.common.options import add_options, read_options
from vlm_sft.data.engine_options import CacheOptions
from vlm_sft.data.prompt import OVERSIZED
from vlm_sft.data.sources.spec import COLUMNS_HELP, KNOWN
from vlm_sft.evaluate.options import PROMPT, AnswerOptions

HELP = "answer benchmarks with a base model or an adapter and score the answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument(
        "--base_model", metavar="MODEL", help="Hub id, folder, or 'pocket' (default: the one that the adapter names)"
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder of a LoRA adapter (a run or a checkpoint)")
    parser.add_argument(
        "--benchmark",
        required=True,
        metavar="SETS",
        help=f"comma separated: {', '.join(KNOWN)}, each with an optional @PATH, or your own data",
    )
    parser.add_argument("--columns", metavar="NAME=COLUMN,…", help=COLUMNS_HELP)
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions a benchmark: a seeded sample")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="instead of the benchmark's own split")
    add_prompt_arguments(parser, "instead of the adapter's or the base's own")
    parser.add_argument("--min_pixels", type=int, metavar="N", help="instead of the adapter's own")
    parser.add_argument("--max_pixels", type=int, metavar="N", help="instead of the adapter's own")
    add_length_arguments(parser, OVERSIZED)
    parser.add_argument(
        "--allow_prompt_mismatch",
        action="store_true",
        help="prompt and image settings may differ from those of the adapter's training",
    )
    add_other_base_argument(parser)
    parser.add_argument("--tokens_per_pack", type=int, metavar="N", help="token budget of one forward pass")
    parser.add_argument("--flash_attn", action="store_true", help="FlashAttention (bfloat16, GPUs from Ampere on)")
    parser.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="hold the language model in 4 bits, as a training with load_in_4bit does (extra vlm-sft[qlora])",
    )
    parser.add_argument(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what generates; vllm needs a GPU and the optional extra vlm-sft[vllm] (default: %(default)s)",
    )
    parser.add_argument(
        "--tensor_parallel_size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs over which vLLM splits the model (default: %(default)s)",
    )
    add_options(parser, AnswerOptions, only=("shard_weights",))
    add_options(parser, CacheOptions)
    parser.add_argument("--max_left_out", type=float, default=0.01, metavar="SHARE", help="share of unusable questions")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_length_arguments(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Add the flags of questions that are too long; recipes have keys of the same names."""
    said = {
        "keep": "asked as they are",
        "leave_out": "left out",
        "scale": "asked with their images scaled down until they fit",
    }
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of a question with its images and expected answer (default: as in the adapter's training, else "
        "what the model's positions reach)",
    )
    parser.add_argument(
        "--oversized",
        choices=policies,
        help=f"what is done with longer questions: {', or '.join(said[name] for name in policies)} (default: as in the "
        "adapter's training, else keep)",
    )


def add_other_base_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that opens an adapter on a base which is not its own; every verb with --adapter has it."""
    parser.add_argument(
        "--allow_other_base", action="store_true", help="the base may be another one than the adapter was trained on"
    )


def add_prompt_arguments(parser: argparse.ArgumentParser, note: str, but: Collection[str] = ()) -> None:
    """Add the flags that say how a question is put to the model and scored, `but` some; training has them too."""
    add_options(parser, AnswerOptions, only=PROMPT, note=note)
    add_options(parser, AnswerOptions, only=("max_new_tokens", "metric", "judge", "judge_model"), but=but)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    from vlm_sft.common.errors import RunError
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.evaluate.run import IDLE, EvalOptions, evaluate
    from vlm_sft.model.saved_adapter import base_of_adapter

    if args.base_model is None and args.adapter is None:
        raise RunError("nothing is said about which model answers", "pass --base_model MODEL, --adapter DIR, or both")
    refuse_idle(args, IDLE, args.given)
    if args.adapter is not None:
        args.base_model = base_of_adapter(args.adapter, args.base_model)
    caches = read_options(CacheOptions, args)
    names = [name for name in EvalOptions.__dataclass_fields__ if name != "caches"]
    evaluate(EvalOptions(caches=caches, **{name: getattr(args, name) for name in names}))
    return 0
