"""Whether bfloat16 on a CPU learns the same: trainings that differ in the number format alone, paired by seed.

    python bench/number_formats.py [--models pocket,small] [--seeds 5]
    python bench/number_formats.py --tables     writes the table into docs/HYPERPARAMETER_GUIDE.md from the result file

Every training and its evaluation is a run of the command line with `--bf16 true` or `--bf16 false`. `pocket` is the
embedded base. `small` is the shape of the throughput benchmark: its random weights are first all trained in float32, on
the same questions, so that LoRA has something to tune. Finished runs are kept in the work folder,
so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from common import RESULTS, ROOT, commit, origin, write_block, write_record
from recipe_results import averaged
from shapes import build, fetch_tokenizer
from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.evaluate.compare import compare_rows

RESULT = RESULTS / "number_formats.json"
PAGE = ROOT / "docs" / "HYPERPARAMETER_GUIDE.md"
FORMATS = {"float32": "false", "bfloat16": "true"}
COMMON = ["--sft_config", str(ROOT / "configs" / "sft_config_1epoch.json"), "--learning_rate", "2e-3"]
MAX_PIXELS = 64 * 28 * 28
TRAINING = ["--dataset", "easy_vqa,demo_charts:1", "--max_train", "4000", "--global_batch_size", "32"]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="pocket,small", help="models to train (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each format (default: %(default)s)")
    parser.add_argument("--max_eval", type=int, default=1500, help="held-out questions per benchmark")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "number_formats", help="folder of the runs")
    parser.add_argument("--note", metavar="TEXT", help="what a reader has to know")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result file")
    return parser.parse_args()


def run(flags: list[str], folder: Path) -> Path:
    """The folder of a finished training; one that is there is not repeated."""
    if (folder / artifacts.RESULTS).is_file():
        return folder
    flags = [*COMMON, *TRAINING, *flags, "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]
    flags += ["--load_best_model_at_end", "false", "--output_dir", str(folder), "--overwrite_output_dir"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sft", "train", *flags], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return folder


def base_of(args: argparse.Namespace, model: str) -> str:
    """What `--base_model` takes: the embedded base, or the folder of a shape whose weights have all been trained."""
    if model == "pocket":
        return model
    random = build(model, args.work / model, fetch_tokenizer(args.work / "tokenizer"), MAX_PIXELS)
    flags = ["--base_model", str(random), "--train", "all", "--bf16", "false", "--seed", "0", "--max_eval", "100"]
    return str(run([*flags, "--learning_rate", "5e-4"], args.work / f"{model}-trained"))


def train(args: argparse.Namespace, model: str, name: str, seed: int) -> Path:
    """The folder of one finished run."""
    flags = ["--base_model", base_of(args, model), "--seed", str(seed), "--bf16", FORMATS[name]]
    flags += ["--max_eval", str(args.max_eval), "--cache_dir", str(args.work / "cache")]
    return run(flags, args.work / f"{model}-{name}-seed-{seed}")


def compared(folders: dict[str, list[Path]], benchmark: str) -> dict[str, Any]:
    """One row: the accuracies by seed, and bfloat16 minus float32, paired by question and by seed."""
    rows, by_seed = {}, {}
    for name, runs in folders.items():
        rows[name], by_seed[name] = averaged(runs, benchmark)
    found = compare_rows(rows["float32"], rows["bfloat16"])
    apart = [after - before for before, after in zip(by_seed["float32"], by_seed["bfloat16"], strict=True)]
    reach = float(stats.t.ppf(0.975, len(apart) - 1)) * stdev(apart) / len(apart) ** 0.5
    base = artifacts.read_json(folders["float32"][0] / artifacts.RESULTS)["benchmarks"][benchmark]["base"]["accuracy"]
    return {
        "benchmark": benchmark,
        "n": found["n"],
        "base": base,
        "by_seed": by_seed,
        "difference": found["difference"],
        "interval": found["interval"],
        "interval_over_seeds": [fmean(apart) - reach, fmean(apart) + reach],
        "p_value": found["p_value"],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown table of the differences."""
    lines = [
        f"{result['seeds']} seeds of each format, {result['device']}, commit {commit(result)}.",
        "",
        "| model | benchmark, questions | base | float32 (sd) | bfloat16 (sd) | difference [95 % over questions] "
        "| 95 % over seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [row["model"], f"{row['benchmark']}, {row['n']:,}", f"{100 * row['base']:.1f} %"]
        cells += [f"{100 * fmean(by):.1f} % ({100 * stdev(by):.1f})" for by in row["by_seed"].values()]
        low, high = (100 * bound for bound in row["interval"])
        cells += [f"{100 * row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"]
        low, high = (100 * bound for bound in row["interval_over_seeds"])
        lines.append("| " + " | ".join([*cells, f"[{low:+.2f}, {high:+.2f}]"]) + " |")
    return "\n".join(lines)


def covered(result: dict[str, Any]) -> dict[str, float]:
    """What a result is about: questions of each row, seeds."""
    return {f"{row['model']} {row['benchmark']}": row["n"] for row in result["rows"]} | {"seeds": result["seeds"]}


def main() -> None:
    """Run what is missing and write the result file and the table."""
    args = parse()
    if not args.tables:
        rows = []
        for model in args.models.split(","):
            folders: dict[str, list[Path]] = {name: [] for name in FORMATS}
            for seed in range(1, args.seeds + 1):
                for name in FORMATS:
                    folders[name].append(train(args, model, name, seed))
                    results = artifacts.read_json(folders[name][-1] / artifacts.RESULTS)["benchmarks"]
                    scores = {key: round(100 * value["tuned"]["accuracy"], 1) for key, value in results.items()}
                    say(f"{model}, {name}, seed {seed}: {scores}")
            rows += [{"model": model, **compared(folders, benchmark)} for benchmark in results]
        settings = {
            "seeds": args.seeds,
            "max_eval": args.max_eval,
            "training": [*COMMON[2:], *TRAINING],
            "note": args.note,
        }
        say(f"result: {write_record(RESULT, origin() | settings | {'rows': rows}, covered, args.work)}")
    write_block("number_formats", "", table(json.loads(RESULT.read_text(encoding="utf-8"))), PAGE)
    say(f"table: {PAGE}")


if __name__ == "__main__":
    main()
