"""`vlm-sft plan`: what a training would take, without starting it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_sft.cli.train import add_run_arguments, train_options
from vlm_sft.common.errors import DataError
from vlm_sft.recipe.load import add_recipe_arguments

if TYPE_CHECKING:
    from vlm_sft.planning.dry_run import PlanOptions

IMAGINED = ("images", "image_size", "question_tokens", "answer_tokens")
READ_DATA = (
    "dataset",
    "eval_benchmarks",
    "eval_samples",
    "max_eval",
    "max_left_out",
    "max_new_tokens",
    "prompt_template",
    "system",
)
HELP = "forecast time, memory and disk of a training from your data and machine, without starting it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb; those of training are taken too."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the forecast as JSON")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/planned"),
        metavar="DIR",
        help="where the run would go: its disk is looked at, nothing is written (default: %(default)s)",
    )
    add_device_arguments(parser)
    add_imagined_arguments(parser)
    add_run_arguments(parser)
    add_recipe_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the devices; `vlm-sft recommend` has them too."""
    group = parser.add_argument_group("devices", "without them: this machine")
    group.add_argument("--gpus", type=int, metavar="N", help="number of devices (default: 1)")
    group.add_argument(
        "--gpu_type", metavar="NAME", help="a device of the table, e.g. A100-80GB; a wrong name lists them"
    )


def add_imagined_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stand for a data set that is not there yet."""
    group = parser.add_argument_group("imagined data", "instead of --dataset: questions that nobody has yet")
    group.add_argument("--questions", type=int, metavar="N", help="number of training questions")
    group.add_argument("--images", type=int, metavar="N", help="number of images (default: one a question)")
    group.add_argument(
        "--image_size", default="850x600", metavar="WxH", help="of every image in pixels (default: %(default)s)"
    )
    group.add_argument("--question_tokens", type=int, default=30, metavar="N", help="(default: %(default)s)")
    group.add_argument("--answer_tokens", type=int, default=5, metavar="N", help="(default: %(default)s)")


def plan_options(args: argparse.Namespace) -> PlanOptions:
    """The options that the flags mean.

    Raises:
        DataError: an image size that is none.
    """
    from vlm_sft.cli.parser import refuse_idle
    from vlm_sft.planning.dry_run import PlanOptions
    from vlm_sft.planning.hypothetical_data import Imagined

    imagined = None
    if args.questions is None:
        refuse_idle(args, IMAGINED, "without --questions", "add --questions N, or leave it out to read --dataset")
    else:
        refuse_idle(args, READ_DATA, "with --questions, which stands for data without evaluations", "leave it out")
        width, _, height = args.image_size.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise DataError(f"--image_size {args.image_size} is no size", "pass WIDTHxHEIGHT in pixels, e.g. 850x600")
        images = args.questions if args.images is None else args.images
        imagined = Imagined(
            args.questions, images, (int(width), int(height)), max(1, args.question_tokens), max(1, args.answer_tokens)
        )
    return PlanOptions(train_options(args), args.gpus, args.gpu_type, imagined)


def run(args: argparse.Namespace) -> int:
    """Forecast."""
    from vlm_sft.common.console import say
    from vlm_sft.planning.dry_run import plan, write_plan

    planned = plan(plan_options(args))
    if args.output is not None:
        say(f"forecast: {write_plan(planned, args.output)}")
    say("next: the same flags with vlm-sft train" + ("" if args.probe else ", or with --probe for a closer forecast"))
    return 0
