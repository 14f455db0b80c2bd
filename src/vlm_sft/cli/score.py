"""`vlm-sft score`: score anyone's predictions by the rules of a benchmark. Heavy imports stay inside run()."""

from __future__ import annotations

import argparse
import json

from vlm_sft.common.options import add_options
from vlm_sft.evaluate.judge import parse_judge
from vlm_sft.evaluate.metrics import BENCHMARKS, get_benchmark
from vlm_sft.evaluate.options import AnswerOptions
from vlm_sft.evaluate.own_metrics import RULE_NAMES, SIGNATURE, judged_by, rule_of

HELP = "Score a file of predictions by the rules of a benchmark."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    rules = parser.add_mutually_exclusive_group(required=True)
    rules.add_argument(
        "--benchmark",
        choices=list(BENCHMARKS),
        help="whose rules to apply: "
        + "; ".join(f"{benchmark.name} = {benchmark.description}" for benchmark in BENCHMARKS.values()).replace(
            "%", "%%"
        ),
    )
    rules.add_argument(
        "--metric",
        metavar="RULE",
        help=f"the rule alone: {', '.join(RULE_NAMES)}, or your own module:function ({SIGNATURE})",
    )
    add_options(parser, AnswerOptions, only=("judge", "judge_model"))
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        help='JSON lines: {"id": text or integer, "prediction": text, "answers": [texts], "split": text, optional}',
    )
    parser.add_argument("--per_item", metavar="FILE", help='write one {"id", "score"} a line here')
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument(
        "--skip_bad_lines", action="store_true", help="score the other lines when some cannot be scored, and count them"
    )


def run(args: argparse.Namespace) -> int:
    """Score the file and print the result; 0 when it was scored."""
    from vlm_sft.common import console
    from vlm_sft.evaluate import scoring

    rules = rule_of(args.metric) if args.metric else get_benchmark(args.benchmark)
    (rules,) = judged_by(parse_judge(args.judge, args.judge_model), {rules.name: rules}).values()
    result = scoring.score_file(rules, args.predictions, args.per_item, args.skip_bad_lines)
    console.say(json.dumps(result, indent=2, allow_nan=False) if args.json else scoring.format_score(result))
    return 0
