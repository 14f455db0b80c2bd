"""`vlm-sft train`: fine-tune a model; the same code runs under deepspeed, torchrun and plain python."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_sft.cli.eval import add_cache_arguments, add_prompt_arguments, add_shard_argument
from vlm_sft.recipe.builtin import RECIPES, locate_recipe
from vlm_sft.recipe.load import add_recipe_arguments, overrides_from

if TYPE_CHECKING:
    from vlm_sft.planning.options import TrainOptions

SFT_CONFIG_HELP = (
    "recipe: a JSON file such as configs/sft_config_best.json, or one of the package by its name: "
    + ", ".join(RECIPES.values())
)
HELP = "fine-tune a vision-language model, evaluate it against its base, and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb, and one flag for every recipe key."""
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of this run")
    add_run_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    add_recipe_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained and how, the recipe's keys aside; `vlm-sft plan` takes them too."""
    parser.add_argument("--sft_config", type=Path, metavar="FILE", help=SFT_CONFIG_HELP)
    parser.add_argument(
        "--base_model",
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        metavar="MODEL",
        help="Hub id or folder of the base model, or 'pocket' for the embedded one (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        default="chartqa,textvqa",
        metavar="SETS",
        help="NAME[@PATH][:WEIGHT], comma separated: chartqa, textvqa, easy_vqa, demo, demo_charts, demo_text, or a "
        "path to your own JSONL or parquet; chartqa@stream fetches --max_train rows only (default: %(default)s)",
    )
    parser.add_argument("--flash_attn", action="store_true", help="FlashAttention (bfloat16, GPUs from Ampere on)")
    parser.add_argument(
        "--deepspeed",
        metavar="CONFIG",
        help="zero2, zero3 or a DeepSpeed JSON file (default: zero2 under the deepspeed launcher, else none)",
    )
    _add_safety_arguments(parser)
    parser.add_argument(
        "--eval_benchmarks",
        metavar="SETS",
        help="benchmarks of the final evaluation, or 'none' (default: those of --dataset)",
    )
    parser.add_argument(
        "--max_left_out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of unusable samples that does not stop the run, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--eval_samples",
        type=int,
        metavar="N",
        help="questions a benchmark, drawn with a fixed seed from the validation split, that are answered at each "
        "evaluation (default: 200 where metric_for_best_model or --guard needs them)",
    )
    parser.add_argument(
        "--guard",
        metavar="BENCHMARK:POINTS",
        help="a checkpoint that loses more points than this against the base cannot be the best, e.g. textvqa:2.0; "
        "several with commas; exit code 3 when none is left",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="run a few passes first, a minute at most, to forecast time and memory from them",
    )
    parser.add_argument(
        "--ignore_forecast",
        action="store_true",
        help="start although memory or disk surely do not suffice (without it: exit code 4)",
    )
    add_prompt_arguments(parser, "instead of what the base comes with; saved with the adapter")
    _add_engine_arguments(parser)


def _add_safety_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of going on after a stop, and of what to do when something is broken."""
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint of --output_dir that verifies, or from the folder given; with nothing "
        "to go on from, 'auto' starts from the beginning, so it can stand in every launch line",
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="start over in a folder that holds another run"
    )
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="resume although recipe, data, base model or prompt are not those of the checkpoint; the differences are "
        "listed either way",
    )
    parser.add_argument(
        "--on_save_error",
        choices=("continue", "stop"),
        default="continue",
        help="when a checkpoint cannot be written (disk full, read-only, broken): train on and try again at the next "
        "one, or end with an error; earlier checkpoints stay as they are (default: %(default)s)",
    )
    parser.add_argument(
        "--on_bad_sample",
        choices=("stop", "replace"),
        default="stop",
        help="when an image cannot be read during the training: end with an error that names it, or train another "
        "sample of the same data set and record both in anomalies.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--max_bad_steps",
        type=int,
        default=3,
        metavar="N",
        help="end the training after N steps in a row whose loss or gradient is not finite; each one is passed over "
        "and its samples are named in anomalies.jsonl (default: %(default)s)",
    )


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the switches that change speed, disk and memory, and no result."""
    group = parser.add_argument_group("engine", "these change speed, disk and memory; the loss stays the same")
    add_cache_arguments(group)
    add_shard_argument(group)
    group.add_argument(
        "--share_images",
        default="true",
        metavar="true|false",
        help="compute an image once for all its questions of a step (default: %(default)s)",
    )
    group.add_argument(
        "--packing",
        default="on",
        metavar="on|off",
        help="put several images into one forward pass (default: %(default)s)",
    )


def train_options(args: argparse.Namespace) -> TrainOptions:
    """The options that the flags of `add_run_arguments` and of the recipe mean."""
    from vlm_sft.model.caches import EngineOptions
    from vlm_sft.planning.options import TrainOptions

    return TrainOptions(
        output_dir=args.output_dir,
        sft_config=args.sft_config and locate_recipe(args.sft_config),
        overrides=overrides_from(args),
        base_model=args.base_model,
        dataset=args.dataset,
        flash_attn=args.flash_attn,
        deepspeed=args.deepspeed,
        local_rank=getattr(args, "local_rank", None),
        resume=args.resume,
        overwrite=args.overwrite_output_dir,
        allow_changes=args.allow_changes,
        on_save_error=args.on_save_error,
        on_bad_sample=args.on_bad_sample,
        max_bad_steps=args.max_bad_steps,
        eval_benchmarks=args.eval_benchmarks,
        max_left_out=args.max_left_out,
        eval_samples=args.eval_samples,
        guard=args.guard,
        prompt_template=args.prompt_template,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        shard_weights=args.shard_weights,
        probe=args.probe,
        ignore_forecast=args.ignore_forecast,
        engine=EngineOptions.parse(
            args.cache_dir, args.prepared_cache, args.feature_cache, args.share_images, args.packing
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Train.

    Raises:
        VlmSftError: a mistake of the user in any of what a training takes.
    """
    from vlm_sft.cli.parser import refuse_idle
    from vlm_sft.train.run import train

    if args.resume is None:
        refuse_idle(args, ("allow_changes",), "without --resume", "add --resume, or leave it out")
    else:
        refuse_idle(args, ("overwrite_output_dir",), "beside --resume, which goes on with the run", "keep one of them")
    train(train_options(args))
    return 0
