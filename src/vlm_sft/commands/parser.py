"""The parser of the whole command line, put together from the verbs. Imports the verbs, which are light."""

from __future__ import annotations

import argparse
import importlib

from vlm_sft import __version__

VERBS = (
    "train", "verify", "plan", "recommend", "eval", "score", "compare", "data", "report", "export", "ask", "demo",
    "completion",
)  # fmt: skip


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; with a verb only its flags are filled in, so that `--help` stays fast."""
    parser = argparse.ArgumentParser(
        prog="vlm-sft", description="Fine-tune vision-language models to answer questions about images."
    )
    parser.add_argument("--version", action="version", version=f"vlm-sft {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = importlib.import_module(f"vlm_sft.commands.{name}")
        child = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        if verb in (name, None):
            module.add_arguments(child)
    return parser
