"""`vlm-sft ask`: questions about an image, answered in the terminal by a base and its adapter side by side."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vlm_sft.common.options import add_options
from vlm_sft.evaluate.options import EvalOptions, oversized_help

MODEL_FLAGS = ("base_model", "adapter", "flash_attn", "max_new_tokens", "allow_other_base", "max_length", "oversized")

HELP = "ask questions about an image; with an adapter, base and tuned answer side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture: PNG, JPEG, WebP, …")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="one or several; the image is computed once")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        dest="others",
        metavar="IMAGE",
        help="another picture shown with the first, may be repeated; <image> in a question says where each one stands",
    )
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say who answers; the demo has them too."""
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder of an adapter (a run or a checkpoint)")
    parser.add_argument(
        "--base_model",
        metavar="MODEL",
        help="Hub id, folder, or 'pocket' (default: the one that the adapter names; 'pocket' without an adapter)",
    )
    add_options(parser, EvalOptions, only=("allow_other_base", "max_length", "flash_attn"))
    policies = ("keep", "scale")
    parser.add_argument("--oversized", choices=policies, help=oversized_help(policies))
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="limit of an answer in tokens (default: that of the adapter's training, or of the base)",
    )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a path
        return False


def run(args: argparse.Namespace) -> int:
    """Ask."""
    from vlm_sft.common.console import say, warn
    from vlm_sft.common.errors import DataError, bounded
    from vlm_sft.data.images import check_image
    from vlm_sft.data.sample import ImageRef
    from vlm_sft.data.video import VIDEO, VIDEO_FIX, is_video_name
    from vlm_sft.evaluate.interactive import open_asker

    swapped = [place for place, text in enumerate(args.questions) if not args.image.exists() and _is_file(text)]
    if len(swapped) == 1:
        args.questions[swapped[0]], args.image = str(args.image), Path(args.questions[swapped[0]])
        warn(f"{args.image} is taken for the image: the image comes first, then the questions")
    images = []
    for path in (args.image, *args.others):
        if is_video_name(path.name):
            raise DataError(f"{bounded(str(path), 200)}: {VIDEO}", VIDEO_FIX)
        try:
            images.append(check_image(ImageRef.from_path(path)))
        except OSError as error:
            what = f"{bounded(str(path), 200)}: {error.strerror or error}"
            raise DataError(what, "pass the path of a picture") from error
    asker = open_asker(**{name: getattr(args, name) for name in MODEL_FLAGS})
    shown = [f"{image.source}, {image.width} x {image.height} pixels" for image in images]
    say(f"{'; '.join(shown)}, asked of {asker.title}")
    for answer in asker.ask(images, args.questions):
        say(f"\n{answer.question}")
        if answer.tuned is None:
            say(f"  {answer.base}")
        else:
            say(f"  base:  {answer.base}")
            say(f"  tuned: {answer.tuned}")
    say("")
    words = ["--base_model", asker.base_name, *(["--adapter", str(args.adapter)] if args.adapter else [])]
    flags = shlex.join([*words, *(["--allow_other_base"] if args.allow_other_base else [])])
    say(
        f"nothing was written; next: measure it (vlm-sft eval {flags} --benchmark SETS --output_dir DIR), or see it in "
        f"a page (vlm-sft demo {flags})"
    )
    return 0
