"""`vlm-sft eval`: answer benchmarks with a base model or an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from vlm_sft.common.options import add_options, read_options
from vlm_sft.data.engine_options import CacheOptions
from vlm_sft.data.sources.spec import KNOWN
from vlm_sft.evaluate.options import PROMPT, AnswerOptions, EvalOptions

HELP = "answer benchmarks with a base model or an adapter and score the answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument(
        "--base_model", metavar="MODEL", help="Hub id, folder, or 'pocket' (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--benchmark",
        required=True,
        metavar="SETS",
        help=f"comma separated: {', '.join(KNOWN)}, each with an optional @PATH, or your own data",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the results")
    add_options(parser, EvalOptions, but=tuple(AnswerOptions.__dataclass_fields__))
    add_prompt_arguments(parser, "instead of the adapter's or the base's own")
    add_options(parser, AnswerOptions, only=("shard_weights",))
    add_options(parser, CacheOptions)


def add_prompt_arguments(parser: argparse.ArgumentParser, note: str, but: Collection[str] = ()) -> None:
    """Add the flags that say how a question is put to the model and scored, `but` some; training has them too."""
    add_options(parser, AnswerOptions, only=PROMPT, note=note)
    add_options(parser, AnswerOptions, only=("max_new_tokens", "metric", "judge", "judge_model"), but=but)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    from vlm_sft.common.errors import RunError
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.evaluate.run import IDLE, evaluate
    from vlm_sft.model.saved_adapter import base_of_adapter

    if args.base_model is None and args.adapter is None:
        raise RunError("nothing is said about which model answers", "pass --base_model MODEL, --adapter DIR, or both")
    refuse_idle(args, IDLE, args.given)
    if args.adapter is not None:
        args.base_model = base_of_adapter(args.adapter, args.base_model)
    asked = {name: getattr(args, name) for name in ("base_model", "benchmark", "output_dir")}
    evaluate(read_options(EvalOptions, args, caches=read_options(CacheOptions, args), **asked))
    return 0
