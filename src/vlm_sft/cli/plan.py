"""`vlm-sft plan`: what a training would take, without starting it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_sft.cli.train import add_run_arguments, train_options
from vlm_sft.common.idle import refuse_idle
from vlm_sft.common.options import add_options, read_options
from vlm_sft.planning.options import PLAN_IDLE, HypotheticalData, PlanOptions
from vlm_sft.recipe.load import add_recipe_arguments

HELP = "forecast time, memory and disk of a training from your data and machine, without starting it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb; those of training are taken too."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the forecast as JSON")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/planned"),
        metavar="DIR",
        help="where the run would go: only the free space of its disk is read (default: %(default)s)",
    )
    add_device_arguments(parser)
    add_hypothetical_arguments(parser)
    add_run_arguments(parser)
    add_recipe_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the devices; `vlm-sft recommend` has them too."""
    add_options(parser, PlanOptions)


def add_hypothetical_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stand for a data set that does not exist yet."""
    add_options(parser, HypotheticalData)


def plan_options(args: argparse.Namespace) -> PlanOptions:
    """The options that the flags mean.

    Raises:
        DataError: `--image_size` is not a size.
    """
    refuse_idle(args, PLAN_IDLE, args.given)
    data = None if args.questions is None else read_options(HypotheticalData, args)
    return read_options(PlanOptions, args, train=train_options(args), hypothetical=data)


def run(args: argparse.Namespace) -> int:
    """Forecast."""
    from vlm_sft.common.console import say
    from vlm_sft.planning.dry_run import plan
    from vlm_sft.planning.plan_report import write_plan

    planned = plan(plan_options(args))
    if args.output is not None:
        say(f"forecast: {write_plan(planned, args.output)}")
    say("next: the same flags with vlm-sft train" + ("" if args.probe else ", or with --probe for a closer forecast"))
    return 0
