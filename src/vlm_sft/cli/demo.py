"""`vlm-sft demo`: a local page to upload an image, ask, and compare a base with its adapter (Gradio, optional)."""

from __future__ import annotations

import argparse

from vlm_sft.cli.ask import MODEL_FLAGS, add_model_arguments
from vlm_sft.evaluate.demo_page import PORT

HELP = "open a local page to upload an image, ask, and compare base and tuned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="of the page (default: %(default)s)")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    from vlm_sft.evaluate.demo_page import open_page, require_gradio
    from vlm_sft.evaluate.interactive import open_asker

    require_gradio()
    asker = open_asker(**{name: getattr(args, name) for name in MODEL_FLAGS})
    open_page(asker, args.port).block_thread()
    return 0
