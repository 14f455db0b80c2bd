"""pocket on real ChartQA rows: base and fine-tuned, on all validation questions, as they are.

    python bench/real_chartqa.py [--data DIR] [--sft_config FILE] [--learning_rate X] [--work_dir DIR]
    python bench/real_chartqa.py --tables     writes the table into bench/README.md from the result files

The rows are the train and validation parquet files of a ChartQA folder in the Hub's schema.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import DATA, README, RESULTS, ROOT, commit, origin, write_block, write_record
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.formats import percent, percent_interval, points, points_interval


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="ChartQA parquet files (default: %(default)s)")
    parser.add_argument("--sft_config", type=Path, default=ROOT / "configs" / "sft_config.json", help="recipe")
    parser.add_argument("--learning_rate", default="2e-3", help="pocket is small: its rates are higher (%(default)s)")
    parser.add_argument("--work_dir", type=Path, help="folder of the run (default: a temporary one)")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result files")
    return parser.parse_args()


def tables() -> str:
    """The table of all result files, as Markdown."""
    lines = [
        "| recipe | split | questions | base | tuned | difference | verdict | commit |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for path in sorted(RESULTS.glob("real_chartqa_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        row = result["benchmark"]
        base, tuned = (
            f"{percent(row[side]['accuracy'])} {percent_interval(row[side]['interval'])}" for side in ("base", "tuned")
        )
        difference = f"{points(row['difference'])} {points_interval(row['difference_interval'])}"
        lines.append(
            f"| {result['recipe']} | all | {row['n']} | {base} | {tuned} | {difference} | {row['verdict']} "
            f"| {commit(result)} |"
        )
        for split, part in row["splits"].items():
            lines.append(
                f"| | {split} | {part['n']} | {percent(part['base'])} | {percent(part['tuned'])} "
                f"| {points(part['tuned'] - part['base'])} | | |"
            )
    return "\n".join(lines)


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: questions and steps."""
    return {"questions": result["benchmark"]["n"], "steps": result["steps"]}


def main() -> int:
    """Train, evaluate, write the result file and the table."""
    from vlm_sft.planning.options import TrainOptions
    from vlm_sft.train.run import train

    args = parse()
    if not args.tables:
        if not args.data.is_dir():
            say(f"skipped: {args.data} is not there; pass --data with a folder of ChartQA parquet files")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            run = args.work_dir or Path(folder) / "run"
            results = train(
                TrainOptions(
                    output_dir=run,
                    sft_config=args.sft_config,
                    overrides={"learning_rate": args.learning_rate},
                    base_model="pocket",
                    dataset=f"chartqa@{args.data}",
                )
            )
            facts = artifacts.read_json(run / artifacts.RUN)
        result = origin() | {
            "recipe": args.sft_config.name,
            "learning_rate": args.learning_rate,
            "steps": facts["steps"],
            "train_seconds": facts["seconds"]["train"],
            "benchmark": results["benchmarks"]["chartqa"],
        }
        result["benchmark"].pop("analysis", None)
        path = RESULTS / f"real_chartqa_{args.sft_config.stem}.json"
        say(f"result: {write_record(path, result, covered)}")
    write_block("real_chartqa", "pocket on real ChartQA rows", tables())
    say(f"table: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
