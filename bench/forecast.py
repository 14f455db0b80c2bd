"""How good forecasts are: varied real trainings, each forecast from the table and with --probe, against their outcome.

    python bench/forecast.py [--formats float32,bfloat16] [--cases 0,3,7] [--work DIR] [--tokenizer DIR]
    python bench/forecast.py --tables     writes the table into bench/README.md from the result file

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

from common import RESULTS, ROOT, commit, device_of, origin, write_block
from peers.environment import DEFAULT_FOLDER
from shapes import SHAPES, build, fetch_tokenizer
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

# name: flags beside the common ones; a base other than pocket is a shape of the throughput benchmark, random weights
CASES = {
    "charts, 2 epochs": "--dataset demo_charts --max_train 192 --num_train_epochs 2",
    "charts, 5 epochs, small batch": (
        "--dataset demo_charts --max_train 96 --num_train_epochs 5 --global_batch_size 16"
    ),
    "signs, 2 epochs": "--dataset demo_text --max_train 192 --num_train_epochs 2",
    "easy-VQA, 1 epoch": "--dataset easy_vqa --max_train 800 --num_train_epochs 1",
    "easy-VQA, 3 epochs, rank 64": (
        "--dataset easy_vqa --max_train 300 --num_train_epochs 3 --lora_r 64 --lora_alpha 128"
    ),
    "charts, no feature cache": "--dataset demo_charts --max_train 256 --num_train_epochs 2 --feature_cache off",
    "charts, no sharing": "--dataset demo_charts --max_train 128 --num_train_epochs 2 --share_images false",
    "mixture, small packs, no dropout": (
        "--dataset demo_charts,easy_vqa --max_train 512 --num_train_epochs 2 --tokens_per_pack 1024 --lora_dropout 0"
    ),
    "easy-VQA, checkpointing": (
        "--dataset easy_vqa --max_train 300 --num_train_epochs 2 --gradient_checkpointing true"
    ),
    "charts, task metric": (
        "--dataset demo_charts --max_train 256 --num_train_epochs 3 "
        "--metric_for_best_model demo_charts_relaxed_accuracy --eval_samples 40"
    ),
    "Qwen2.5-VL of 48 M, charts": (
        "--base_model small --dataset demo_charts --max_train 128 --num_train_epochs 2 --eval_benchmarks none"
    ),
    "Qwen3.5 of 51 M, charts": (
        "--base_model qwen3_5 --dataset demo_charts --max_train 128 --num_train_epochs 2 --eval_benchmarks none"
    ),
}
FORMATS = {"float32": "false", "bfloat16": "true"}
MAX_PIXELS = 200_704
RECIPE = ROOT / "configs" / "sft_config_5epoch.json"
COMMON = ["--sft_config", str(RECIPE), "--max_eval", "64"]
GOALS = {
    "probe": {"time_seconds": 0.10, "peak_bytes": 0.10, "disk_bytes": 0.02},
    "table": {"time_seconds": 0.30, "peak_bytes": 0.30, "disk_bytes": 0.30},
}
LABELS = {"time_seconds": "time", "peak_bytes": "memory", "disk_bytes": "disk"}


def flags_of(case: str, work: Path, tokenizer: Path) -> list[str]:
    """The flags of a case; a shape as its base is built in the work folder."""
    flags = CASES[case].split()
    if "--base_model" not in flags:
        return ["--base_model", "pocket", *flags]
    place = flags.index("--base_model") + 1
    assert flags[place] in SHAPES
    flags[place] = str(build(flags[place], work / flags[place], fetch_tokenizer(tokenizer), MAX_PIXELS))
    return flags


def measure(flags: list[str], work: Path, probe: bool) -> dict[str, Any]:
    """Train once; what was forecast and what it came to."""
    output = work / ("probe" if probe else "table")
    paths = ["--output_dir", str(output), "--cache_dir", str(work / f"cache-{probe}")]
    line = [sys.executable, "-m", "vlm_sft", "train", *COMMON, *flags, *paths, *(["--probe"] if probe else [])]
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
    formats = result["formats"]
    shown = [f"{name}: {column}" for name in formats for column in ("time", "error", "memory error")]
    lines = [f"| run | basis | {' | '.join(shown)} | disk error |", f"|---|---|{'---:|' * (len(shown) + 1)}"]
    for case in CASES:
        for basis in GOALS:
            rows = [one["cases"].get(case, {}).get(basis) for one in formats.values()]
            if any(rows):
                disk = next(row["disk_bytes"]["error"] for row in rows if row)
                cells = [cell for row in rows for cell in _cells(row)]
                lines.append(f"| {case} | {basis} | {' | '.join(cells)} | {100 * disk:+.1f} % |")
    for name, one in formats.items():
        lines += ["", *(f"{name}, {basis}: {_kept(one['cases'], basis)}" for basis in GOALS)]
    made = "; ".join(f"{name}: {device_of(one)}, commit {commit(one)}" for name, one in formats.items())
    return "\n".join([*lines, "", f"{made}."])


def _cells(row: dict[str, Any] | None) -> list[str]:
    """Time, its error and that of memory of one run."""
    if row is None:
        return ["", "", ""]
    time = row["time_seconds"]
    return [f"{time['actual']:.1f} s", f"{100 * time['error']:+.1f} %", f"{100 * row['peak_bytes']['error']:+.1f} %"]


def _kept(cases: dict[str, Any], basis: str) -> str:
    """How many cases keep to the goals of a basis."""
    rows = [rows[basis] for rows in cases.values() if basis in rows]
    goals = GOALS[basis].items()
    kept = {name: sum(abs(row[name]["error"]) <= goal for row in rows) for name, goal in goals}
    return "; ".join(f"{LABELS[name]} within {100 * goal:.0f} %: {kept[name]} of {len(rows)}" for name, goal in goals)


def main() -> None:
    """Measure the cases that are asked for, keep the others' results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="number formats (default: %(default)s)")
    parser.add_argument("--cases", default="", help="numbers, comma separated (default: all)")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_FOLDER / "tokenizer", help="Qwen's tokenizer.json")
    parser.add_argument("--tables", action="store_true", help="write the table from the recorded result only")
    args = parser.parse_args()
    path = RESULTS / "forecast.json"
    result: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema": 2, "formats": {}}
    )
    names = list(CASES)
    chosen = [] if args.tables else [names[int(number)] for number in args.cases.split(",")] if args.cases else names
    for name in chosen:
        for number_format in args.formats.split(","):
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                flags = [*flags_of(name, Path(folder), args.tokenizer), "--bf16", FORMATS[number_format]]
                found = {basis: measure(flags, Path(folder), basis == "probe") for basis in ("table", "probe")}
            kept = result["formats"].get(number_format, {}).get("cases", {}) | {name: found}
            ordered = {known: kept[known] for known in names if known in kept}
            result["formats"][number_format] = origin() | {"cases": ordered}
            artifacts.write_json(path, result)
            errors = {
                f"{basis}: {LABELS[item]}": round(100 * row[item]["error"], 1)
                for basis, row in found.items()
                for item in LABELS
            }
            say(f"{name}, {number_format}: errors in percent: {errors}")
    write_block("forecast", "Forecast against outcome", table(result))


if __name__ == "__main__":
    main()
