"""Whether grouping the questions of an image in one optimizer step costs quality: the same run under several caps.

    python bench/grouping.py [--caps none,4,1] [--seeds 5] [--dataset easy_vqa] [--work DIR]
    python bench/grouping.py --tables     writes the table into bench/README.md from the result file

Every arm is a run of the command line on the embedded base with the same recipe, questions and number of steps; only
`max_questions_per_image` differs. A cap of 1 is what a trainer without grouping does: a step holds no two questions of
one image (where there are enough images). Differences are paired by seed. Finished runs are kept in the work folder,
so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

from common import README, RESULTS, ROOT, commit, origin, write_block, write_record
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

RESULT = RESULTS / "grouping.json"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caps", default="none,4,1", help="caps to compare, the last one is the baseline")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--dataset", default="easy_vqa", help="data set and benchmark (default: %(default)s)")
    parser.add_argument("--max_train", type=int, default=2000, help="training questions (default: %(default)s)")
    parser.add_argument("--max_eval", type=int, default=400, help="held-out questions (default: %(default)s)")
    parser.add_argument("--global_batch_size", type=int, default=32, help="questions a step (default: %(default)s)")
    parser.add_argument("--learning_rate", default="2e-3", help="of all arms (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "grouping", help="folder of the runs")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    return parser.parse_args()


def run(args: argparse.Namespace, cap: str, seed: int) -> dict[str, Any]:
    """Accuracy of one run; a finished one is read."""
    folder = args.work / f"{args.dataset}-cap-{cap}-seed-{seed}"
    results = folder / artifacts.RESULTS
    if not results.is_file():
        flags = [
            "--base_model",
            "pocket",
            "--dataset",
            args.dataset,
            "--output_dir",
            str(folder),
            "--seed",
            str(seed),
            "--max_train",
            str(args.max_train),
            "--max_eval",
            str(args.max_eval),
            "--num_train_epochs",
            "1",
            "--learning_rate",
            args.learning_rate,
            "--global_batch_size",
            str(args.global_batch_size),
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
            "--overwrite_output_dir",
            "--report_to",
            "none",
        ]
        flags += [] if cap == "none" else ["--max_questions_per_image", cap]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-m", "vlm_sft", "train", *flags], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
    benchmark = json.loads(results.read_text(encoding="utf-8"))["benchmarks"][args.dataset]
    record = json.loads((folder / artifacts.RUN).read_text(encoding="utf-8"))
    return {
        "cap": cap,
        "seed": seed,
        "base": accuracy(benchmark["base"]),
        "tuned": accuracy(benchmark["tuned"]),
        "questions_seen": record["questions_seen"],
    }


def accuracy(scores: dict[str, Any]) -> float:
    """The main score of a benchmark in points."""
    return 100.0 * scores["accuracy"]


def table(result: dict[str, Any]) -> str:
    """Markdown table of the arms."""
    caps = result["caps"]
    by_cap = {cap: [row for row in result["runs"] if row["cap"] == cap] for cap in caps}
    seeds = len(by_cap[caps[0]])
    lines = [
        f"{result['dataset']}, {result['max_train']:,} questions seen, {result['max_eval']} held-out questions, "
        f"{seeds} seeds, {result['device']}, commit {commit(result)}.",
        "",
        "| questions of one image in a step | accuracy, mean over seeds (sd) | difference to the last row [95 %] |",
        "|---|---:|---:|",
    ]
    for cap in caps:
        tuned = [row["tuned"] for row in by_cap[cap]]
        apart = [row["tuned"] - other["tuned"] for row, other in zip(by_cap[cap], by_cap[caps[-1]], strict=True)]
        name = "no cap" if cap == "none" else f"at most {cap}"
        spread = f"{statistics.mean(tuned):.1f} % ({statistics.stdev(tuned):.1f})"
        lines.append(f"| {name} | {spread} | {'' if cap == caps[-1] else interval(apart)} |")
    return "\n".join(lines)


def interval(differences: list[float]) -> str:
    """Mean of paired differences with Student's 95 % interval over seeds."""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return f"{mean:+.1f} [{mean - reach:+.1f}, {mean + reach:+.1f}]"


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: seeds of each cap, questions."""
    caps = {f"cap {cap}": result["seeds"] for cap in result["caps"]}
    return caps | {name: result[name] for name in ("max_train", "max_eval")}


def main() -> None:
    """Run what is missing and write the result file and the table."""
    args = parse()
    if not args.tables:
        caps = args.caps.split(",")
        runs = []
        for seed in range(1, args.seeds + 1):
            for cap in caps:
                runs.append(run(args, cap, seed))
                say(f"cap {cap}, seed {seed}: {runs[-1]['base']:.1f} -> {runs[-1]['tuned']:.1f} %")
        settings = ("dataset", "max_train", "max_eval", "global_batch_size", "learning_rate", "seeds")
        result = origin() | {name: getattr(args, name) for name in settings} | {"caps": caps, "runs": runs}
        say(f"result: {write_record(RESULT, result, covered, args.work)}")
    write_block("grouping", "Questions of one image in one step", table(json.loads(RESULT.read_text(encoding="utf-8"))))
    say(f"table: {README}")


if __name__ == "__main__":
    main()
