"""`vlm-sft recommend`: which recipe to take for a given time, disk and machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_sft.cli.plan import add_device_arguments, add_hypothetical_arguments, plan_options
from vlm_sft.cli.train import add_run_arguments
from vlm_sft.common.errors import RunError
from vlm_sft.common.idle import Idle, refuse_idle
from vlm_sft.forecast.recommend import PRIORITIES, worth
from vlm_sft.recipe.load import add_recipe_arguments

if TYPE_CHECKING:
    from vlm_sft.planning.recommendation import Advice

HELP = "recommend a recipe for your time, disk and machine"
FORMATS = (".svg", ".png", ".pdf")
NOTHING_FITS = 4
ALL_RECIPES = Idle(
    ("sft_config",), lambda o: True, "here: all five recipes are compared", "leave it out; --configs names a folder"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb; those of training describe the set-up."""
    parser.add_argument("--hours", type=float, required=True, metavar="H", help="time budget of the training, in hours")
    parser.add_argument("--disk", type=float, metavar="GB", help="disk budget, in gigabytes (10^9 bytes)")
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="balanced",
        help="the best affordable recipe, the cheapest that is not significantly worse, or the cheapest (default: "
        "%(default)s)",
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of your own runs: their quality counts first")
    parser.add_argument(
        "--configs", type=Path, metavar="DIR", help="folder of the five recipes (default: configs, else the package's)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw quality against time: .svg, .png or .pdf")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/planned"), help=argparse.SUPPRESS)
    add_device_arguments(parser)
    add_hypothetical_arguments(parser)
    add_run_arguments(parser)
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Recommend."""
    from vlm_sft.common.console import say
    from vlm_sft.planning.recommendation import advise

    if args.output is not None and args.output.suffix.lower() not in FORMATS:
        raise RunError(f"--output {args.output}: no such format", f"choose {', '.join(FORMATS)}")
    refuse_idle(args, (ALL_RECIPES,), args.given)
    options = plan_options(args)
    advice = advise(options, args.hours, args.disk, args.priority, args.runs, args.configs)
    if args.output is not None:
        draw(advice, args.output)
        say(f"figure: {args.output}")
    return 0 if advice.recommendation.chosen else NOTHING_FITS


def draw(advice: Advice, path: Path) -> None:
    """Draw quality against time with the Pareto front."""
    from matplotlib.figure import Figure

    from vlm_sft.report.label_placement import Label, name_points

    choice = advice.recommendation
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shown = [one for one in advice.candidates if choice.measured is False or one.quality is not None]
    front = sorted((one for one in shown if one.name in choice.front), key=lambda one: one.seconds)
    axes.plot(
        [one.seconds / 3600 for one in front],
        [worth(one, choice.measured) for one in front],
        "--",
        color="#777777",
        label="Pareto front",
    )
    for one in shown:
        chosen = one.name == choice.chosen
        x, y = one.seconds / 3600, worth(one, choice.measured)
        axes.plot([x], [y], marker="D" if chosen else "o", color="#0072B2" if chosen else "#333333", linestyle="")
        if one.quality is not None and choice.measured:
            axes.vlines(x, one.quality.low, one.quality.high, color="#333333", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("forecast time (hours)")
    axes.set_ylabel("accuracy" if choice.measured else "epochs (quality is not measured)")
    axes.margins(0.08, 0.12)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    name_points(
        axes,
        [Label(one.name, one.seconds / 3600, worth(one, choice.measured), "#333333") for one in shown],
        leader_colour="#999999",
        curves=[
            [(one.seconds / 3600, worth(one, choice.measured)) for one in front],
            *(
                [(one.seconds / 3600, one.quality.low), (one.seconds / 3600, one.quality.high)]
                for one in shown
                if one.quality is not None and choice.measured
            ),
        ],
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
