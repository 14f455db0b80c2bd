"""`vlm-sft data`: `check` loads a data set and writes a preview; `import`, `export`, `cache` are beside it."""

from __future__ import annotations

import argparse
import shlex

from vlm_sft.cli.data_cache import add_cache_arguments, run_cache
from vlm_sft.cli.data_exchange import add_exchange_arguments, run_export, run_import
from vlm_sft.common.options import add_options, read_options
from vlm_sft.planning.options import CheckRequest

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
    add_options(check, CheckRequest)


def run(args: argparse.Namespace) -> int:
    """Run one action of `data`; see the function of each for what it raises."""
    return {"cache": run_cache, "import": run_import, "export": run_export, "check": _check}[args.action](args)


def _check(args: argparse.Namespace) -> int:
    """Run `data check`; see `planning.data_check.check_data` for what it raises."""
    from vlm_sft.common.console import say
    from vlm_sft.planning.data_check import check_data

    check_data(read_options(CheckRequest, args, dataset=args.dataset))
    recipe = f"--sft_config smoketest{f' --base_model {shlex.quote(args.base_model)}' if args.base_model else ''}"
    named = f" --columns {shlex.quote(args.columns)}" if args.columns else ""
    say(f"next: vlm-sft train {recipe} --dataset {shlex.quote(args.dataset)}{named} --output_dir outputs/first")
    return 0
