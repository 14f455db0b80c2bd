"""How good forecasts are: varied real trainings, each forecast from the table and with --probe, against their outcome.

    python bench/forecast.py [--cases 0,3,7] [--work DIR]

Every case is trained twice through the command line, with a cache of its own: first without anything known of the
machine, then with a probe. A case that was measured before is replaced in the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit, origin, write_block
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

# name: flags beside the common ones
CASES = {
    "charts, 2 epochs": ["--dataset", "demo_charts", "--max_train", "192", "--num_train_epochs", "2"],
    "charts, 5 epochs, small batch": [
        "--dataset",
        "demo_charts",
        "--max_train",
        "96",
        "--num_train_epochs",
        "5",
        "--global_batch_size",
        "16",
    ],
    "signs, 2 epochs": ["--dataset", "demo_text", "--max_train", "192", "--num_train_epochs", "2"],
    "easy-VQA, 1 epoch": ["--dataset", "easy_vqa", "--max_train", "800", "--num_train_epochs", "1"],
    "easy-VQA, 3 epochs, rank 64": [
        "--dataset",
        "easy_vqa",
        "--max_train",
        "300",
        "--num_train_epochs",
        "3",
        "--lora_r",
        "64",
        "--lora_alpha",
        "128",
    ],
    "charts, no feature cache": [
        "--dataset",
        "demo_charts",
        "--max_train",
        "256",
        "--num_train_epochs",
        "2",
        "--feature_cache",
        "off",
    ],
    "charts, no sharing": [
        "--dataset",
        "demo_charts",
        "--max_train",
        "128",
        "--num_train_epochs",
        "2",
        "--share_images",
        "false",
    ],
    "mixture, small packs, no dropout": [
        "--dataset",
        "demo_charts,easy_vqa",
        "--max_train",
        "512",
        "--num_train_epochs",
        "2",
        "--tokens_per_pack",
        "1024",
        "--lora_dropout",
        "0",
    ],
    "easy-VQA, checkpointing": [
        "--dataset",
        "easy_vqa",
        "--max_train",
        "300",
        "--num_train_epochs",
        "2",
        "--gradient_checkpointing",
        "true",
    ],
    "charts, task metric": [
        "--dataset",
        "demo_charts",
        "--max_train",
        "256",
        "--num_train_epochs",
        "3",
        "--metric_for_best_model",
        "demo_charts_relaxed_accuracy",
        "--eval_samples",
        "40",
    ],
}
RECIPE = ROOT / "configs" / "sft_config_5epoch.json"
COMMON = ["--base_model", "pocket", "--sft_config", str(RECIPE), "--max_eval", "64"]
GOALS = {
    "probe": {"time_seconds": 0.10, "peak_bytes": 0.10, "disk_bytes": 0.02},
    "table": {"time_seconds": 0.30, "peak_bytes": 0.30, "disk_bytes": 0.30},
}
LABELS = {"time_seconds": "time", "peak_bytes": "memory", "disk_bytes": "disk"}


def measure(flags: list[str], work: Path, probe: bool) -> dict[str, Any]:
    """Train once; what was forecast and what it came to."""
    output = work / ("probe" if probe else "table")
    line = [
        sys.executable,
        "-m",
        "vlm_sft",
        "train",
        *COMMON,
        *flags,
        "--output_dir",
        str(output),
        "--cache_dir",
        str(work / f"cache-{probe}"),
        *(["--probe"] if probe else []),
    ]
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout[-3000:])
    forecast = json.loads((output / artifacts.RUN).read_text(encoding="utf-8"))["forecast"]
    row = {
        "basis": forecast["basis"],
        "items": forecast["items"]["time_seconds"],
        "actual_items": forecast["actual"]["items"]["time_seconds"],
    }
    for name in LABELS:
        said, came = forecast[name], forecast["actual"][name]
        row[name] = {
            **said,
            "actual": came,
            "error": said["value"] / came - 1,
            "inside": said["low"] <= came <= said["high"],
        }
    return row


def table(result: dict[str, Any]) -> str:
    """The errors of every case as Markdown, and how many keep to the goals."""
    lines = [
        "| run | basis | time forecast | time | error | memory error | disk error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in result["cases"].items():
        for basis, row in rows.items():
            time = row["time_seconds"]
            lines.append(
                f"| {name} | {basis} | {time['value']:.1f} s | {time['actual']:.1f} s | {100 * time['error']:+.1f} % | "
                f"{100 * row['peak_bytes']['error']:+.1f} % | {100 * row['disk_bytes']['error']:+.1f} % |"
            )
    for basis, goals in GOALS.items():
        rows = [rows[basis] for rows in result["cases"].values() if basis in rows]
        kept = {name: sum(abs(row[name]["error"]) <= goal for row in rows) for name, goal in goals.items()}
        counts = [f"{LABELS[name]} within {100 * goals[name]:.0f} %: {kept[name]} of {len(rows)}" for name in goals]
        lines += ["", f"{basis}: " + "; ".join(counts)]
    return "\n".join([*lines, "", f"{result['device']}, commit {commit(result)}."])


def main() -> None:
    """Measure the cases that are asked for, keep the others' results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="numbers, comma separated (default: all)")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--tables", action="store_true", help="write the table from the recorded result only")
    args = parser.parse_args()
    path = RESULTS / "forecast.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    names = list(CASES)
    chosen = [] if args.tables else [names[int(number)] for number in args.cases.split(",")] if args.cases else names
    for name in chosen:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            kept[name] = {basis: measure(CASES[name], Path(folder), basis == "probe") for basis in ("table", "probe")}
        ordered = {known: kept[known] for known in names if known in kept}
        result = origin() | {"cases": ordered}
        artifacts.write_json(path, result)
        errors = {basis: round(100 * row["time_seconds"]["error"], 1) for basis, row in kept[name].items()}
        say(f"{name}: error of time in percent: {errors}")
    result = json.loads(path.read_text(encoding="utf-8"))
    write_block("forecast", "Forecast against outcome", table(result))


if __name__ == "__main__":
    main()
