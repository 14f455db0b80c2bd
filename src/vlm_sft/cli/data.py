"""`vlm-sft data`: `check` loads a data set and writes a preview; `import`, `export`, `cache` are beside it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vlm_sft.cli.data_cache import add_cache_arguments, run_cache
from vlm_sft.cli.data_exchange import add_exchange_arguments, run_export, run_import
from vlm_sft.data.sources.spec import COLUMNS_HELP

HELP = "check a data set, import and export other programs' data sets, list and clear the cache of prepared data"
CHECK_HELP = "check a data set without training: read everything, decode every image, write a preview"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_cache_arguments(actions)
    add_exchange_arguments(actions)
    check = actions.add_parser("check", help=CHECK_HELP, description=CHECK_HELP)
    check.add_argument(
        "dataset",
        metavar="DATASET",
        help="NAME[@PATH][:WEIGHT], comma separated: chartqa, textvqa, "
        "easy_vqa, demo, chartqa@FOLDER of parquet, your own data as of vlm-sft train, or hub:ORG/NAME",
    )
    check.add_argument("--columns", metavar="NAME=COLUMN,…", help=COLUMNS_HELP)
    check.add_argument(
        "--split",
        default="train",
        choices=("train", "validation", "test", "all"),
        help="which split to check (default: train)",
    )
    check.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="folder to write to (default: outputs/data_check/NAME-SPLIT)"
    )
    check.add_argument(
        "--base_model",
        metavar="MODEL",
        help="Hub id, folder, or 'pocket': also look for images and texts that this model's processor cannot take",
    )
    check.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="with --base_model: name the samples of more than N tokens (default: what the model's positions reach)",
    )
    check.add_argument("--limit", type=int, metavar="N", help="check a seeded sample of at most N questions")
    check.add_argument(
        "--max_left_out",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="share of samples that may be unusable, 0 to 1 (default: 0.01)",
    )


def run(args: argparse.Namespace) -> int:
    """Run one action of `data`; see the function of each for what it raises."""
    return {"cache": run_cache, "import": run_import, "export": run_export, "check": _check}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    """Run `data check`; see `planning.data_check.check_data` for what it raises."""
    from vlm_sft.common.console import say
    from vlm_sft.planning.data_check import CheckRequest, check_data

    names = ("dataset", "split", "columns", "output_dir", "base_model", "max_length", "limit", "max_left_out")
    check_data(CheckRequest(**{name: getattr(args, name) for name in names}))
    recipe = f"--sft_config smoketest{f' --base_model {shlex.quote(args.base_model)}' if args.base_model else ''}"
    named = f" --columns {shlex.quote(args.columns)}" if args.columns else ""
    say(f"next: vlm-sft train {recipe} --dataset {shlex.quote(args.dataset)}{named} --output_dir outputs/first")
    return 0
