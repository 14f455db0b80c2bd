"""`vlm-sft compare`: compare runs on the same items, with tests. Heavy imports stay inside run()."""

from __future__ import annotations

import argparse

HELP = "Compare runs on the same items: differences with intervals, tests, verdicts, items that changed."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a training run, or a folder with <benchmark>/predictions.jsonl; one training run alone is compared with "
        "its own base model",
    )
    parser.add_argument("--baseline", metavar="RUN", help="the run to compare with (default: the first RUN)")
    parser.add_argument(
        "--metric",
        metavar="RULE",
        help="score the answers to your own data anew, with a rule as of vlm-sft eval (default: the recorded scores)",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        default="outputs/compare",
        help="where compare.json and compare.md are written (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write both files; 0 whatever the verdicts."""
    from vlm_sft.common import console
    from vlm_sft.evaluate.compare import compare_runs
    from vlm_sft.evaluate.comparison_table import comparison_tones, format_table, write_comparison

    result = compare_runs(args.runs, args.baseline, args.metric)
    files = write_comparison(result, args.output_dir)
    console.say(format_table(result), comparison_tones(result))
    console.say("written: " + ", ".join(str(path) for path in files))
    return 0
