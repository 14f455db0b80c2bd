"""Time until a report is loaded in Chromium: many runs, and one run with many predictions.

    python bench/report.py RUN [RUN…] [--runs N] [--predictions N] [--repeat N]
    python bench/report.py --tables     writes the table into bench/README.md from the result files

The runs are copies of the recorded ones that are given: other names, seeds and learning rates, metrics scaled by a few
percent, and the evaluated questions repeated under new ids, with their own pictures, until there are enough. A load is
timed over Chromium's DevTools, from the start of the navigation until the page's script has run and the page is laid
out; the median of several fresh browsers is recorded, and the largest.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import README, RESULTS, ROOT, commit, origin, write_block
from tests import chromium
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.report.html import write_report

GOAL_SECONDS = 3.0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, metavar="RUN", help="recorded runs with an evaluation")
    parser.add_argument("--runs", type=int, default=100, help="copies in one page (default: %(default)s)")
    parser.add_argument("--predictions", type=int, default=10_000, help="questions in a page (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="loads a page (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result files")
    return parser.parse_args()


def copy(source: Path, target: Path, seed: int, questions: int) -> Path:
    """A run like `source`, with another seed and `questions` evaluated questions of each model."""
    target.mkdir(parents=True)
    draw = random.Random(seed)
    factor = draw.uniform(0.9, 1.1)
    for name in (artifacts.DATA, artifacts.LEFT_OUT, artifacts.GUARD):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    recipe = artifacts.read_json(source / artifacts.RECIPE)
    artifacts.write_json(
        target / artifacts.RECIPE,
        recipe | {"seed": seed, "learning_rate": recipe["learning_rate"] * draw.choice([0.5, 1, 2])},
    )
    record = artifacts.read_json(source / artifacts.RUN)
    record["seconds"]["train"] *= draw.uniform(0.5, 5)
    artifacts.write_json(target / artifacts.RUN, record)
    rows = artifacts.read_jsonl(source / artifacts.METRICS)
    artifacts.write_jsonl(
        target / artifacts.METRICS,
        [{key: value * factor if "loss" in key else value for key, value in row.items()} for row in rows],
    )
    results = artifacts.read_json(source / artifacts.RESULTS)
    for row in results["benchmarks"].values():
        row["tuned"]["accuracy"] = min(1.0, row["tuned"]["accuracy"] * factor)
    artifacts.write_json(target / artifacts.RESULTS, results)
    copy_predictions(source / artifacts.EVALUATION_FOLDER, target / artifacts.EVALUATION_FOLDER, questions)
    return target


def copy_predictions(source: Path, target: Path, questions: int) -> None:
    """The predictions of both sides, repeated under new ids until there are enough; the pictures are linked."""
    (target / "images").mkdir(parents=True)
    files = sorted(source.glob(f"*/*/{artifacts.PREDICTIONS}"))
    benchmarks = sorted({path.parent.name for path in files})
    for path in files:
        rows = list(artifacts.read_jsonl(path))
        place = benchmarks.index(path.parent.name)
        wanted = questions * (place + 1) // len(benchmarks) - questions * place // len(benchmarks)
        repeated = []
        for number in range(wanted):
            row, turn = rows[number % len(rows)], number // len(rows)
            image = row["image"] and f"images/{turn}_{Path(row['image']).name}"
            if image and not (target / image).exists() and (source / row["image"]).is_file():
                (target / image).symlink_to((source / row["image"]).resolve())
            repeated.append(row | {"id": f"{row['id']}/{turn}", "image": image})
        artifacts.write_jsonl(target / path.parent.relative_to(source) / artifacts.PREDICTIONS, repeated)


def measure(folders: list[Path], repeat: int, page: Path) -> dict[str, Any]:
    """Write the page and load it in fresh browsers."""
    began = time.perf_counter()
    write_report(folders, page)
    written = time.perf_counter() - began
    loads, cards = [], 0
    for _ in range(repeat):
        with chromium.Chromium() as browser:
            loads.append(browser.open(page))
            cards = browser.run("document.querySelectorAll('.card').length")
    return {
        "runs": len(folders),
        "bytes": page.stat().st_size,
        "write_seconds": round(written, 2),
        "load_seconds": [round(load, 3) for load in loads],
        "cards_shown": cards,
    }


def tables() -> str:
    """The table of all result files, as Markdown."""
    lines = [
        "| runs | predictions | size, MB | written in, s | loaded in (median), s | loaded in (largest), s "
        "| below 3 s | device | commit |",
        "|---:|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("report_*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for row in run["rows"]:
            loads = row["load_seconds"]
            lines.append(
                f"| {row['runs']} | {row['predictions']:,} | {row['bytes'] / 1e6:.1f} | {row['write_seconds']:.1f} "
                f"| {statistics.median(loads):.2f} | {max(loads):.2f} | {'yes' if max(loads) < GOAL_SECONDS else 'no'} "
                f"| {run['device']} | {commit(run)} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Measure, write the result file, and write the table."""
    args = parse()
    if args.tables:
        write_block("report", "Reports", tables())
        return 0
    if not args.sources or chromium.find() is None:
        say("skipped: give recorded runs, and install Chromium")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (args.runs, 1):
            each = args.predictions // count
            folders = [
                copy(args.sources[number % len(args.sources)], Path(folder) / f"{count}_{number:03d}", number, each)
                for number in range(count)
            ]
            row = measure(folders, args.repeat, Path(folder) / f"{count}.html")
            rows.append(row | {"predictions": each * count})
            say(json.dumps(rows[-1]))
    path = artifacts.write_json(RESULTS / f"report_{args.runs}_{args.predictions}.json", origin() | {"rows": rows})
    write_block("report", "Reports", tables())
    say(f"written: {path.relative_to(ROOT)} and {README.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
