"""`vlm-sft export`: a merged model or an adapter folder that other programs open, verified and with a card."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_sft.common.idle import refuse_idle
from vlm_sft.common.options import add_options, read_options
from vlm_sft.export.request import IDLE, ExportOptions

HELP = "make a merged model or an adapter folder that other programs open, verified, with a model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="a run's folder, or a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="the new folder")
    add_options(parser, ExportOptions)


def run(args: argparse.Namespace) -> int:
    """Export."""
    from vlm_sft.export.run import export

    options = read_options(ExportOptions, args, adapter=args.adapter, output_dir=args.output_dir)
    refuse_idle(options, IDLE, args.given)
    export(options)
    return 0
