"""`vlm-sft export`: a merged model or an adapter folder that other programs open, verified and with a card."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_sft.common.options import add_options
from vlm_sft.evaluate.options import EvalOptions

HELP = "make a merged model or an adapter folder that other programs open, verified, with a model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="a run's folder, or a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--merge", action="store_true", help="merge the adapter into the base's weights: a complete model"
    )
    parser.add_argument(
        "--base_model", metavar="MODEL", help="Hub id, folder, or 'pocket' (default: the one that the adapter names)"
    )
    add_options(parser, EvalOptions, only=("allow_other_base",))
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="number format of merged weights (default: that of the base; float32 where that rounds the update away)",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=8,
        metavar="N",
        help="questions that the export and the adapter are compared on (default: %(default)s)",
    )
    parser.add_argument(
        "--peft_only", action="store_true", help="export an adapter that vLLM does not load (DoRA, trained projector)"
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the result to the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")


def run(args: argparse.Namespace) -> int:
    """Export."""
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.export.run import IDLE, ExportOptions, export

    options = ExportOptions(
        adapter=args.adapter,
        output_dir=args.output_dir,
        merge=args.merge,
        base_model=args.base_model,
        allow_other_base=args.allow_other_base,
        dtype=args.dtype,
        questions=args.questions,
        peft_only=args.peft_only,
        repository=args.push_to_hub,
        public=args.public,
    )
    refuse_idle(options, IDLE, args.given)
    export(options)
    return 0
