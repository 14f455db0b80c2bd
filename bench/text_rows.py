"""What many text-only rows cost before and while they are trained: time and memory of `vlm-sft train` on pocket.

    python bench/text_rows.py [--rows 1000,100000] [--note TEXT] [--work DIR]
    python bench/text_rows.py --tables     writes the table into docs/DATA.md from the result file

Rows are seeded sums in words, no two alike. Each number of rows is a process of its own with an empty cache: it reads
the rows, counts and keeps their tokens, plans the epochs, and takes 20 optimizer steps of 64 rows. Times are those of
the run's own record; memory is the most that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit, device_of, origin, write_block, write_record
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

RESULT = RESULTS / "text_rows.json"
PAGE = ROOT / "docs" / "DATA.md"
STEPS, BATCH = 20, 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1000,100000", help="numbers of rows, with commas (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the result file says about the machine")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "text_rows", help="of data, caches and runs")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    return parser.parse_args()


def write_rows(folder: Path, count: int) -> None:
    """Write `count` training rows, and a few for the other splits, which are not used."""
    draw = random.Random(0)
    for split, rows in (("train", count), ("validation", 2), ("test", 2)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for number in range(rows):
                digits = [draw.randrange(10) for _ in range(6)]
                asked = f"Row {split} {number}: add {', '.join(WORDS[digit] for digit in digits)}."
                stream.write(json.dumps({"question": asked, "answer": str(sum(digits))}) + "\n")


def measure(work: Path, count: int) -> dict[str, Any]:
    """Train on so many rows in a process of its own."""
    place = work / str(count)
    shutil.rmtree(place, ignore_errors=True)
    (place / "rows").mkdir(parents=True)
    write_rows(place / "rows", count)
    run = place / "run"
    settings = {
        "base_model": "pocket",
        "dataset": str(place / "rows"),
        "output_dir": str(run),
        "cache_dir": str(place / "cache"),
        "max_steps": str(STEPS),
        "global_batch_size": str(BATCH),
        "eval_strategy": "no",
        "eval_benchmarks": "none",
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "vlm_sft", "train", *flags], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest so far: rows ascend
    record = artifacts.read_json(run / artifacts.RUN)
    facts = artifacts.read_json(run / artifacts.DATA)["train"]
    return {
        "rows": facts["samples"],
        "text_rows": facts["text_rows"],
        "tokens": facts["prefix_tokens"] + facts["prompt_tokens"] + facts["supervised_tokens"],
        "data_bytes": (place / "rows" / "train.jsonl").stat().st_size,
        "cache_bytes": sum(path.stat().st_size for path in (place / "cache").rglob("*") if path.is_file()),
        "seconds": {name: round(value, 2) for name, value in record["seconds"].items()},
        "wall_seconds": round(record["wall_seconds"], 2),
        "peak_bytes": peak,
        "steps": record["steps"],
    }


def table(result: dict[str, Any]) -> str:
    """The table of docs/DATA.md."""
    lines = [
        "| rows | tokens | read, s | tokenize and plan, s | train 20 steps of 64 rows, s | peak memory | cache "
        "| device | commit |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for one in result["runs"]:
        seconds = one["seconds"]
        lines.append(
            f"| {one['rows']:,} | {one['tokens']:,} | {seconds['data']:.1f} | {seconds['load']:.1f} | "
            f"{seconds['train']:.1f} | {one['peak_bytes'] / 1e9:.2f} GB | {one['cache_bytes'] / 1e6:.1f} MB | "
            f"{device_of(result)} | {commit(result)} |"
        )
    return "\n".join(lines) + (f"\n\n{result['note']}" if result["note"] else "")


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: numbers of rows."""
    return {f"{run['rows']:,} rows": 1 for run in result["runs"]}


def main() -> None:
    """Measure and write the result file and the table."""
    args = parse()
    if not args.tables:
        counts = sorted(map(int, args.rows.split(",")))
        runs = [measure(args.work, count) for count in counts]
        result = origin() | {"note": args.note, "steps": STEPS, "batch": BATCH, "runs": runs}
        say(f"result: {write_record(RESULT, result, covered, args.work)}")
    write_block("text_rows", "Many text rows", table(artifacts.read_json(RESULT)), PAGE)
    say(f"table: {PAGE}")


if __name__ == "__main__":
    main()
