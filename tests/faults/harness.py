"""Runs of the launch line that are killed, starved of disk space and damaged; for the tests and bench/faults.py."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load

from tests.pictures import COLOURS, png
from tests.processes import Started
from tests.tiny_models import save
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.train.checkpoint.directory import checkpoint_problems, checkpoints

STEPS, SAVE_STEPS = 8, 2
TIMES = ("time", "questions_per_second", "eval_seconds", "eval_questions_per_second", "eval_answer_seconds")
FINISH_SECONDS = 1200  # for what is left after the last kill; a soak on a busy machine has hundreds of steps left


def make_place(folder: Path) -> Path:
    """A folder with a tiny random model and 24 questions on 8 images."""
    save("qwen2_5_vl", folder / "model")
    for index, colour in enumerate(COLOURS):
        (folder / f"{index}.png").write_bytes(png(colour, (56 + 14 * (index % 3), 70)))
    for name, count in (("train", 3), ("validation", 1)):
        rows = [
            {"image": f"../{index}.png", "question": f"{name} {number}?", "answer": f"{index} {number}"}
            for index in range(len(COLOURS))
            for number in range(count)
        ]
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    """The launch line's flags: dropout on, evaluation with answers, the best checkpoint kept, rotation."""
    return [
        "--base_model",
        str(place / "model"),
        "--dataset",
        str(place / "data"),
        "--output_dir",
        str(output),
        "--cache_dir",
        str(place / "cache"),
        "--max_steps",
        str(STEPS),
        "--save_steps",
        str(SAVE_STEPS),
        "--eval_steps",
        str(SAVE_STEPS),
        "--logging_steps",
        "3",
        "--global_batch_size",
        "5",
        "--learning_rate",
        "0.01",
        "--adam_epsilon",
        "1e-5",  # above the roundings of small gradients, which Adam would make steps of
        "--lora_dropout",
        "0.1",
        "--save_total_limit",
        "2",
        "--load_best_model_at_end",
        "true",
        "--eval_samples",
        "2",
        "--eval_benchmarks",
        "none",
        "--report_to",
        "none",
        "--resume",
        "auto",
        *more,
    ]


# What is being done when a run is killed: a file that shows it, and how long it may go on, in seconds.
MOMENTS: dict[str, tuple[str, float]] = {
    "caching": ("*/*/*", 0.15),
    "training": ("metrics.jsonl", 0.5),
    "saving": ("checkpoint-*.partial/*", 0.03),
    "sealing": ("checkpoint-*.partial/trainer_state.json", 0.01),
    "rotating": ("checkpoint-*.removed", 0.002),
    "evaluating": ("validation/step-*", 0.3),
    "finishing": (".adapter.partial/*", 0.02),
    "anywhere": ("run.json", 5.0),
}


def await_moment(moment: str, output: Path, cache: Path, run: Started, rng: random.Random) -> bool:
    """Wait for a moment that had not begun before, then for a random part of it; False when the run ended first."""
    pattern, seconds = MOMENTS[moment]
    folder = cache if moment == "caching" else output
    seen = set(folder.glob(pattern)) if moment in ("caching", "evaluating") else set()
    written = _bytes(output / "metrics.jsonl")
    while True:
        found = set(folder.glob(pattern)) - seen if folder.is_dir() else set()
        if moment == "training":
            found = {folder} if _bytes(output / "metrics.jsonl") > written else set()
        if found:
            time.sleep(rng.random() * seconds)
            return True
        if run.wait(0.0005) is not None:
            return False


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@dataclass
class Reference:
    """What an uninterrupted run comes to."""

    adapter: bytes
    rows: list[dict[str, Any]]
    best: Any

    @classmethod
    def of(cls, output: Path) -> Reference:
        """Read a finished run."""
        facts = json.loads((output / "run.json").read_text())
        assert facts["status"] == "finished", facts["notes"]
        return cls((output / "adapter_model.safetensors").read_bytes(), metrics(output), facts["best"])

    def differences(self, output: Path) -> list[str]:
        """In what a finished run differs; empty when it is bit-identical."""
        other = Reference.of(output)
        pairs = {
            "adapter": (self.adapter, other.adapter),
            "metrics": (self.rows, other.rows),
            "best": (self.best, other.best),
        }
        return [name for name, (left, right) in pairs.items() if left != right]

    def distance(self, output: Path) -> float:
        """The largest difference between trained weights, or between losses, of this run and another finished one."""
        other = Reference.of(output)
        ours, theirs = load(self.adapter), load(other.adapter)
        losses = [[row["loss"] for row in rows if "loss" in row] for rows in (self.rows, other.rows)]
        weights = max(float((ours[name] - theirs[name]).abs().max()) for name in ours | theirs)
        return max(weights, *(abs(left - right) for left, right in zip(*losses, strict=True)))


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@dataclass
class Tally:
    """What a torture came to."""

    kills: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    identical: int = 0
    trouble: list[str] = field(default_factory=list)
    most_lost_steps: int = 0
    left_over: int = 0
    peaks_mib: list[int] = field(default_factory=list)

    def count(self, moment: str) -> None:
        """One more kill at a moment."""
        self.kills[moment] = self.kills.get(moment, 0) + 1

    def compare(self, reference: Reference, output: Path, what: str) -> None:
        """One more training that finished, held against an uninterrupted one."""
        self.finished += 1
        different = reference.differences(output)
        self.identical += not different
        if different:
            self.trouble.append(f"{what}: {', '.join(different)} differ")


def check_folder(output: Path, tally: Tally, before: int) -> int:
    """After a kill: what has a checkpoint's name verifies, and at most one save interval is lost.

    Args:
        output: the run's folder.
        tally: takes what is wrong.
        before: the step of the newest checkpoint before the run that was killed.

    Returns:
        The step of the newest checkpoint.
    """
    for path in checkpoints(output):
        problems = checkpoint_problems(path)
        if problems:
            tally.trouble.append(f"{path.name} after a kill: {problems}")
    newest = checkpoint_step(checkpoints(output)[-1]) if checkpoints(output) else 0
    if newest < before:
        tally.trouble.append(f"checkpoint {before} was there and {newest} is the newest")
    steps = [row["step"] for row in map(_row, _lines(output / "metrics.jsonl")) if row]
    tally.most_lost_steps = max(tally.most_lost_steps, max(steps, default=0) - newest)
    return newest


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _row(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def torture(
    begin: Callable[[list[str], Path], Started],
    place: Path,
    reference: Reference,
    moments: list[str],
    folder: Path,
    tally: Tally,
    rng: random.Random,
    more: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Kill one training at each of some moments, resume it every time, and compare what it comes to.

    Args:
        begin: starts a run.
        place: model and data.
        reference: of the uninterrupted run.
        moments: names of `MOMENTS`; those that the rest of the training does not reach again are not counted.
        folder: for this training; `cache` in it is its own cache.
        tally: counts.
        rng: draws the time of each kill within its moment.
        more: further flags.
        tell: told about each kill.
    """
    output, cache, log = folder / "run", folder / "cache", folder / "log"
    folder.mkdir(parents=True)
    flags = arguments(place, output, "--cache_dir", str(cache), *more)
    newest = 0
    for moment in [*moments, ""]:
        run = begin(flags, log)
        if moment and await_moment(moment, output, cache, run, rng):
            run.kill()
            run.wait(30)
            if run.peak_mib:
                tally.peaks_mib.append(run.peak_mib)
            newest = check_folder(output, tally, newest)
            tally.count(moment)
            tell(f"killed while {moment}; newest checkpoint {newest}")
            continue
        code = run.wait(FINISH_SECONDS)
        if code is None:
            run.kill()
        if code != 0:
            tally.trouble.append(f"exit code {code}: {log.read_text()[-1500:]}")
            return
        break
    tally.compare(reference, output, f"{folder.name} after {moments}")
    left = [path.name for path in output.iterdir() if path.name.endswith((".partial", ".removed", ".replaced", ".tmp"))]
    tally.left_over += len(left)
