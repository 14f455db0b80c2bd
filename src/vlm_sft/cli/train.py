"""`vlm-sft train`: fine-tune a model; the same code runs under deepspeed, torchrun and plain python."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from vlm_sft.cli.eval import add_prompt_arguments
from vlm_sft.common.idle import refuse_idle
from vlm_sft.common.options import add_options, read_options
from vlm_sft.data.engine_options import CacheOptions, EngineOptions
from vlm_sft.evaluate.options import AnswerOptions
from vlm_sft.planning.options import IDLE, TrainOptions
from vlm_sft.recipe.load import add_recipe_arguments, overrides_from

HELP = "fine-tune a vision-language model, evaluate it against its base, and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb, and one flag for every recipe key."""
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="folder of this run (default: outputs/ and the recipe's name)"
    )
    add_run_arguments(parser)
    add_options(parser, TrainOptions, only=("local_rank",))
    add_recipe_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser, but: Collection[str] = ()) -> None:
    """Add the flags that say what is trained and how, the recipe's keys aside; `vlm-sft plan` takes them too.

    Args:
        parser: gets them.
        but: names of options whose flag has another meaning there.
    """
    add_options(parser, TrainOptions, but=(*AnswerOptions.__dataclass_fields__, "local_rank"))
    add_prompt_arguments(parser, "instead of the base's own; saved with the adapter", but)
    add_options(parser, CacheOptions)
    add_options(parser, AnswerOptions, only=("shard_weights",))
    add_options(parser, EngineOptions, but=tuple(CacheOptions.__dataclass_fields__))


def train_options(args: argparse.Namespace) -> TrainOptions:
    """The options that the flags of `add_run_arguments` and of the recipe mean."""
    others = {"base_model": _base_of(args)} if args.adapter is not None and "base_model" not in args.given else {}
    return read_options(
        TrainOptions,
        args,
        output_dir=args.output_dir,
        overrides=overrides_from(args),
        engine=read_options(EngineOptions, args),
        **others,
    )


def _base_of(args: argparse.Namespace) -> str:
    """The base that the adapter names."""
    from vlm_sft.model.saved_adapter import base_of_adapter

    return base_of_adapter(args.adapter, None)


def run(args: argparse.Namespace) -> int:
    """Train.

    Raises:
        VlmSftError: a mistake of the user in any of what a training takes.
    """
    from vlm_sft.train.run import train

    refuse_idle(args, IDLE, args.given)
    if args.output_dir is None:
        args.output_dir = Path("outputs", Path(args.sft_config).stem if args.sft_config else "run")
    train(train_options(args))
    return 0
