"""Training speed of this package and of its peers on the same rows, model, LoRA and batch, on a CPU or one GPU.

    python bench/throughput.py [--sides ours,trl,llamafactory,msswift] [--cases chartqa,easy_vqa,k1]
        [--shapes small,medium] [--device cpu|cuda] [--formats float32,bfloat16] [--rounds N]
        [--rounds_of SIDE=N,…] [--epochs N] [--peer_epochs N] [--questions N] [--batch N] [--micro_batch N]
        [--threads N] [--data DIR] [--envs DIR] [--work_dir DIR]
    python bench/throughput.py --tables     writes the tables into bench/README.md from the result files

Every training is a process of its own; its log and its result stay in the work folder to be looked at, and no later
command takes them for its own: the rounds of all sides are one run. Peers get environments of their own
(`bench/peers/environment.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

import cases as benchcases
import shapes as benchshapes
from common import DATA, README, RESULTS, ROOT, origin, write_block, write_record
from peers.environment import DEFAULT_FOLDER, REQUIREMENTS, make
from throughput_results import (
    OURS,
    check,
    covered,
    is_narrow,
    label_of,
    median_row,
    readme_table,
    side_of,
    summary,
    tables,
)
from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn

SIDES = (OURS, *REQUIREMENTS)
FORMATS = ("float32", "bfloat16")
QUESTIONS = {"small": 128, "medium": 48, "7b": 512, "qwen3_5": 128, "paligemma": 128}
# They tell whether everything works; their numbers say nothing and stay in the work folder.
TRIALS = ("tiny", "qwen3_5_tiny", "paligemma_tiny")
QUESTIONS |= dict.fromkeys(TRIALS, 16)
WARM_UP_QUESTIONS = 4
# So small that the loss of an epoch does not depend on the order of its rows: all sides must agree.
LEARNING_RATE = 1e-6
# Questions of a peer's forward pass. LLaMA-Factory computes the vocabulary at every position: its logits of four
# questions are 0.7 GB, and it is faster with one.
MICRO_BATCH = {"ours": 4, "trl": 4, "llamafactory": 1, "msswift": 4}
LORA = {"rank": 16, "alpha": 32}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", default=",".join(SIDES), help="who trains, in turn (default: %(default)s)")
    parser.add_argument(
        "--cases",
        default="chartqa,easy_vqa,k1",
        help="rows; native: ChartQA's images in their own size (default: %(default)s)",
    )
    parser.add_argument("--shapes", default="small,medium", help=f"{', '.join(QUESTIONS)} (default: %(default)s)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="cpu, or one GPU, in bfloat16 (default: %(default)s)"
    )
    parser.add_argument(
        "--formats",
        default="float32",
        help="number formats of every side on a CPU: float32,bfloat16; compared are the fastest (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each side trains (default: %(default)s)")
    parser.add_argument("--rounds_of", default="", help="fewer rounds of some sides, e.g. trl=1,llamafactory=1")
    parser.add_argument("--epochs", type=int, default=6, help="passes of our side (default: %(default)s)")
    parser.add_argument(
        "--peer_epochs",
        type=int,
        default=1,
        help="passes of a peer; its time over all epochs is then extrapolated from them (default: %(default)s)",
    )
    parser.add_argument("--questions", type=int, help=f"an epoch (default by shape: {QUESTIONS})")
    parser.add_argument("--batch", type=int, default=16, help="questions of an optimizer step (default: %(default)s)")
    parser.add_argument("--micro_batch", type=int, help=f"questions of a forward pass (default: {MICRO_BATCH})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="ChartQA parquet files (default: %(default)s)")
    parser.add_argument("--envs", type=Path, default=DEFAULT_FOLDER, help="peers' environments (default: %(default)s)")
    parser.add_argument("--work_dir", type=Path, help="models, rows and single results (default: work/ under --envs)")
    parser.add_argument("--tables", action="store_true", help="only write the tables from the result files")
    args = parser.parse_args(words)
    for name, known in (
        ("sides", SIDES),
        ("cases", benchcases.CASES),
        ("shapes", benchshapes.SHAPES),
        ("formats", FORMATS),
    ):
        values = getattr(args, name).split(",")
        if unknown := sorted(set(values) - set(known)):
            parser.error(f"--{name} {','.join(unknown)}: not one of {', '.join(known)}")
        setattr(args, name, values)
    try:
        pairs = (one.split("=") for one in args.rounds_of.split(",") if one)
        args.rounds_of = {side: int(count) for side, count in pairs}
    except ValueError:
        parser.error(f"--rounds_of {args.rounds_of}: not of the form SIDE=N,SIDE=N")
    if unknown := sorted(set(args.rounds_of) - set(SIDES)):
        parser.error(f"--rounds_of {','.join(unknown)}: not one of {', '.join(SIDES)}")
    args.work_dir = args.work_dir or args.envs / "work"
    return args


def job(args: argparse.Namespace, label: str, model: Path, rows: Path, max_pixels: int, epochs: int) -> dict[str, Any]:
    """What one side is asked to train, but for the output folder; `model` is from `shapes.build`."""
    side = side_of(label)
    shape = benchshapes.SHAPES[artifacts.read_json(model / "bench.json")["shape"]]
    return {
        "model": str(model),
        "rows": str(rows),
        "epochs": epochs,
        "batch": args.batch,
        "micro_batch": args.micro_batch or MICRO_BATCH[side],
        "max_pixels": max_pixels,
        "learning_rate": LEARNING_RATE,
        "device": args.device,
        "cpu_format": "bfloat16" if is_narrow(label) else "float32",
        "family": shape.family,
        "patch": shape.patch,
        "targets": shape.targets,
        **LORA,
    }


def rows_of(
    args: argparse.Namespace, name: str, questions: int, processor: Any, family: str
) -> tuple[Path, dict[str, int]]:
    """The folder of a case, and the work of one of its epochs as the family's processor alone tells it."""
    folder = args.work_dir / "cases" / f"{name}-{questions}"
    rows = benchcases.write(benchcases.CASES[name], questions, folder, args.data)
    path = folder / f"expected-{family}.json"
    if not path.is_file():
        artifacts.write_json(path, benchcases.expected_work(rows, processor, family != "paligemma"))
    return folder, artifacts.read_json(path)


def suffix(device: str) -> str:
    """What names of models and results end with, so that those of a GPU and of the CPU do not replace each other."""
    return "-cuda" if device == "cuda" else ""


def environment(side: str, threads: int, folder: Path, device: str, tree: Path = ROOT) -> dict[str, str]:
    """The environment variables of a side: its threads, one GPU or none, no hub, no cache of an earlier run.

    Our side is the package of a checkout, whatever the environment has installed.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else ""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": gpu,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "USE_HF": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(tree / "src") if side == OURS else "",
    }


def run_side(
    args: argparse.Namespace, label: str, jobs: list[dict[str, Any]], path: Path, tree: Path = ROOT
) -> dict[str, Any] | None:
    """One training of one side in a process of its own; earlier results are not taken: rounds are paired in time.

    Args:
        args: the command line.
        label: the side and its number format.
        jobs: the small training before, and the one that is timed.
        path: takes the result; the log stands beside it.
        tree: the checkout whose worker and package train.

    Returns:
        Its result; None when it failed: the log's end has been shown.
    """
    side = side_of(label)
    python = Path(sys.executable) if side == "ours" else make(side, args.envs)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        folder = Path(name)
        outputs = [job | {"output": str(folder / part)} for job, part in zip(jobs, ("warm", "timed"), strict=True)]
        artifacts.write_json(folder / "job.json", {"jobs": [side, *outputs]})
        log = path.with_suffix(".log")
        with log.open("w", encoding="utf-8") as stream:
            worker = str(tree / "bench" / "peers" / "worker.py")
            command = [str(python), worker, str(folder / "job.json"), str(folder / "result.json")]
            variables = environment(side, args.threads, folder, args.device, tree)
            code = subprocess.run(command, env=variables, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code:
            end = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-8:])
            warn(f"{label} ended with code {code}; {log} ends with\n{end}")
            return None
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    artifacts.write_json(path, result)
    return result


@dataclass(frozen=True)
class Work:
    """What a case and a shape ask for.

    Attributes:
        model: folder of the model.
        sizes: parameters of its parts.
        expected: the work of an epoch as the family's processor alone tells it.
        warm_up, rows: folders of the small and the timed training.
        max_pixels: bound on an image's area in pixels.
        results: folder of the single results.
    """

    model: Path
    sizes: dict[str, int]
    expected: dict[str, int]
    warm_up: Path
    rows: Path
    max_pixels: int
    results: Path

    def jobs(self, args: argparse.Namespace, label: str, epochs: int) -> list[dict[str, Any]]:
        """The small training and the timed one of a side."""
        return [
            job(args, label, self.model, rows, self.max_pixels, count)
            for rows, count in ((self.warm_up, 1), (self.rows, epochs))
        ]


def prepare(args: argparse.Namespace, case: str, shape: str) -> Work:
    """Build the model and write the rows of a case, where they are not there yet."""
    max_pixels = benchcases.CASES[case].max_pixels
    model = args.work_dir / "models" / f"{shape}-{max_pixels}{suffix(args.device)}"
    benchshapes.build(shape, model, benchshapes.fetch_tokenizer(args.envs / "tokenizer"), max_pixels, args.device)
    processor = AutoProcessor.from_pretrained(model)  # a family may choose another tokenizer than was saved
    family = benchshapes.SHAPES[shape].family
    rows, expected = rows_of(args, case, args.questions or QUESTIONS[shape], processor, family)
    warm_up, _ = rows_of(args, case, WARM_UP_QUESTIONS, processor, family)
    folder = args.work_dir / "results" / f"{case}-{shape}-{expected['questions']}{suffix(args.device)}"
    folder.mkdir(parents=True, exist_ok=True)
    return Work(model, artifacts.read_json(model / "bench.json"), expected, warm_up, rows, max_pixels, folder)


def measure(args: argparse.Namespace, case: str, shape: str) -> dict[str, Any]:
    """All rounds of all sides on one case and shape, the sides in turn."""
    work = prepare(args, case, shape)
    labels = [label_of(side, name) for side in args.sides for name in args.formats]
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for number in range(1, args.rounds + 1):
        for label in (label for label in labels if number <= args.rounds_of.get(side_of(label), args.rounds)):
            epochs = args.epochs if side_of(label) == OURS else args.peer_epochs
            path = work.results / f"{label.replace(' ', '-')}-round{number}.json"
            result = run_side(args, label, work.jobs(args, label, epochs), path)
            if result is None:
                continue
            row = summary(result, work.expected, work.sizes, args.epochs)
            found[label].append(row)
            say(f"{case}, {shape}, round {number}, {label}: {row['cold']:.2f} questions/s cold, {row['warm']:.2f} warm")
    sides = {label: median_row(rounds) for label, rounds in found.items() if rounds}
    refused = check(sides, work.expected)
    for side, reasons in refused.items():
        warn(f"{case}, {shape}: {side} is not reported: {'; '.join(reasons)}")
    return {
        "case": case,
        "shape": shape,
        "sizes": work.sizes,
        "expected": work.expected,
        "rounds": args.rounds,
        "epochs": args.epochs,
        "sides": {side: row for side, row in sides.items() if side not in refused},
        "refused": refused,
    }


def keep(result: dict[str, Any], work_dir: Path, ending: str) -> Path:
    """Record a result where it is a comparison of no less than was recorded; else leave it in the work folder.

    Returns:
        The file.
    """
    path = RESULTS / f"throughput_{result['case']}_{result['shape']}{ending}.json"
    found = {side_of(label) for label in result["sides"]}
    if result["shape"] not in TRIALS and OURS in found and len(found) > 1:
        return write_record(path, result, covered, work_dir)
    warn(f"{result['case']}, {result['shape']}: no comparison for the tables; {path.name} is in the work folder")
    return artifacts.write_json(work_dir / path.name, result)


def main() -> int:
    """Measure, write a result file for each case and shape, and the tables."""
    args = parse()
    written = []
    for shape in [] if args.tables else args.shapes:
        for case in args.cases:
            if benchcases.CASES[case].source == "chartqa" and not args.data.is_dir():
                say(f"{case} is skipped: {args.data} is not there; pass --data with a folder of ChartQA parquet files")
                continue
            result = origin() | {"threads": args.threads, "batch": args.batch} | measure(args, case, shape)
            written.append(keep(result, args.work_dir, suffix(args.device)))
    write_block("throughput", "Training speed beside other trainers", tables(RESULTS))
    write_block("speed", "Speed", readme_table(RESULTS), ROOT / "README.md")
    say(f"written: {', '.join(map(str, [*written, README, ROOT / 'README.md']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
