"""`vlm-sft sweep`: which learning rate, rank, number of epochs or data sets suit one's own data."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_sft.cli.train import add_run_arguments, train_options
from vlm_sft.common.options import add_options, read_options
from vlm_sft.recipe.load import add_recipe_arguments

if TYPE_CHECKING:
    from vlm_sft.search.request import SweepOptions

HELP = "train settings of a recipe side by side on your data, forecast first, and say which one to take"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb; those of training say what all trials share."""
    from vlm_sft.search.request import SweepOptions

    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/sweep"),
        metavar="DIR",
        help="folder of the sweep; the same command goes on with it (default: %(default)s)",
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values of a recipe key, or of dataset, to compare; once a key; with semicolons where a value has commas: "
        "dataset=a.jsonl;a.jsonl,b.jsonl:0.2",
    )
    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="KEY=LOW:HIGH[:log]",
        help="numbers that --search optuna chooses from; once a key",
    )
    add_options(parser, SweepOptions)
    add_run_arguments(parser, but=("metric",))
    add_recipe_arguments(parser)


def sweep_options(args: argparse.Namespace) -> SweepOptions:
    """The options that the flags mean.

    Raises:
        RunError: a flag that the sweep decides for its trials, or values that cannot be varied.
    """
    from vlm_sft.common.idle import refuse_idle
    from vlm_sft.search.request import IDLE, SweepOptions, grid_values, read_grid

    refuse_idle(args, IDLE, args.given)
    train = replace(train_options(args), metric=None)  # --metric is the sweep's
    grid = {key: grid_values(text) for key, text in read_grid(args.grid, "grid").items()}
    return read_options(SweepOptions, args, train=train, grid=grid, ranges=read_grid(args.range, "range"))


def run(args: argparse.Namespace) -> int:
    """Sweep; 1 when a trial failed and the others were compared."""
    from vlm_sft.search.sweep import sweep

    return int(bool(sweep(sweep_options(args)).values.get("failed")))
