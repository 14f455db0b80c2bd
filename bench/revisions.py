"""Training speed of this checkout beside earlier revisions of it, paired: whether a change slows the plain path.

    python bench/revisions.py REVISION [REVISION …] [--case easy_vqa] [--shape small] [--rounds 10] [--epochs 4]
    python bench/revisions.py --tables     writes the table into bench/README.md from the result files

Every revision is checked out into a folder of its own and trains the same rows and model with its own benchmark worker
and package, in the environment of this one. In every round each side trains once, in an order that turns, and a
round's ratios are taken between neighbours in time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy import stats

import throughput
from common import README, RESULTS, ROOT, commit, origin, write_block
from throughput_results import OURS, summary
from vlm_sft.common import artifacts
from vlm_sft.common.console import say

HEAD = "HEAD"
SPEEDS = ("cold", "warm")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what it does not name is as in the throughput benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="what this checkout is compared with")
    parser.add_argument("--case", default="easy_vqa", help="rows (default: %(default)s)")
    parser.add_argument("--shape", default="small", help="model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="trainings of each revision (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes of a training (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="only write the table from the result files")
    args = parser.parse_args(words)
    if not args.revisions and not args.tables:
        parser.error("name a revision to compare with, for example HEAD~20")
    if args.rounds < 2:
        parser.error("--rounds: an interval needs two rounds")
    return args


@contextmanager
def checkouts(revisions: list[str]) -> Iterator[dict[str, Path]]:
    """Folders of revisions by their short hash, removed afterwards; this checkout is `HEAD`, with its changes."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as name:
        found = {HEAD: ROOT}
        try:
            for revision in revisions:
                command = [*git, "rev-parse", "--short", f"{revision}^{{commit}}"]
                known = subprocess.run(command, text=True, capture_output=True)
                if known.returncode:
                    raise SystemExit(f"error: {revision} is not a commit of this repository")
                short = known.stdout.strip()
                found[short] = Path(name) / short
                subprocess.run([*git, "worktree", "add", "--quiet", "--detach", found[short], short], check=True)
            yield found
        finally:
            for folder in list(found.values())[1:]:
                subprocess.run([*git, "worktree", "remove", "--force", folder], check=False)


def known_to(tree: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The keys of a job that a revision's worker has; an older one has fewer."""
    worker = (tree / "bench" / "peers" / "worker.py").read_text(encoding="utf-8")
    fields = set(re.findall(r"^    (\w+): ", worker, re.MULTILINE))
    return {key: value for key, value in job.items() if key in fields}


def measure(
    args: argparse.Namespace, settings: argparse.Namespace, trees: dict[str, Path]
) -> dict[str, dict[str, list[float]]]:
    """Questions/s of every round by revision and speed.

    Args:
        args: the command line.
        settings: that of the throughput benchmark.
        trees: the checkouts by revision.
    """
    work = throughput.prepare(settings, args.case, args.shape)
    found: dict[str, dict[str, list[float]]] = {name: {speed: [] for speed in SPEEDS} for name in trees}
    names = list(trees)
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            jobs = [known_to(trees[name], job) for job in work.jobs(settings, OURS, args.epochs)]
            path = work.results / f"revision-{name}-round{number + 1}.json"
            result = throughput.run_side(settings, OURS, jobs, path, trees[name])
            if result is None:
                raise SystemExit(f"error: {name} did not train; see above")
            row = summary(result, work.expected, work.sizes, args.epochs)
            for speed in SPEEDS:
                found[name][speed].append(row[speed])
            say(f"round {number + 1}, {name}: {row['cold']:.2f} questions/s cold, {row['warm']:.2f} warm")
    return found


def ratio(new: list[float], old: list[float]) -> dict[str, float]:
    """Geometric mean of paired ratios of speeds, with its 95 % interval (Student's t on the logarithms)."""
    logs = np.log(new) - np.log(old)
    reach = float(stats.t.ppf(0.975, len(logs) - 1)) * stdev(logs) / len(logs) ** 0.5
    mean = fmean(logs)
    return {"ratio": float(np.exp(mean)), "low": float(np.exp(mean - reach)), "high": float(np.exp(mean + reach))}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table: the median speeds, and this checkout by the earlier one."""
    lines = [
        "| rows | model | earlier | rounds | cold: earlier, now | now / earlier [95 %] | warm: earlier, now "
        "| now / earlier [95 %] | device | commit |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for result in results:
        speeds = result["questions_per_second"]
        for name in (name for name in speeds if name != HEAD):
            cells = [result["case"], result["shape"], name, str(len(speeds[name]["cold"]))]
            for speed in SPEEDS:
                now, before = speeds[HEAD][speed], speeds[name][speed]
                one = ratio(now, before)
                cells.append(f"{median(before):.2f}, {median(now):.2f}")
                cells.append(f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]")
            lines.append("| " + " | ".join([*cells, result["device"], commit(result)]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, and write the result file and the table."""
    args = parse()
    if not args.tables:
        settings = throughput.parse(["--sides", OURS, "--epochs", str(args.epochs)])
        with checkouts(args.revisions) as trees:
            speeds = measure(args, settings, trees)
        what = {"case": args.case, "shape": args.shape, "epochs": args.epochs}
        folder = settings.work_dir if args.shape in throughput.TRIALS else RESULTS
        path = folder / f"revisions_{args.case}_{args.shape}.json"
        say(f"written: {artifacts.write_json(path, origin() | what | {'questions_per_second': speeds})}")
    results = [artifacts.read_json(path) for path in sorted(RESULTS.glob("revisions_*.json"))]
    write_block("revisions", "Training speed beside earlier revisions", table(results))
    say(f"written: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
