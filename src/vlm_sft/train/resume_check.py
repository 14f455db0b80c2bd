"""`vlm-sft verify`: a short training of a run's own configuration is killed and resumed, and compared.

The run's own command line is repeated in a scratch folder with a few steps: once undisturbed, once killed with SIGKILL
after its first checkpoint and resumed. Everything goes through the launch line, as in the run itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.errors import RunError
from vlm_sft.common.idle import Idle
from vlm_sft.common.record import loaded_in_bfloat16
from vlm_sft.distributed.launch import launch_words
from vlm_sft.train.checkpoint.directory import checkpoint_problems, checkpoints

# Flags of the run that the trial sets by itself, with their number of values (None: up to one).
_OWN = {
    "--output_dir": 1,
    "--max_steps": 1,
    "--save_strategy": 1,
    "--save_steps": 1,
    "--save_total_limit": 1,
    "--logging_steps": 1,
    "--eval_strategy": 1,
    "--eval_benchmarks": 1,
    "--eval_samples": 1,
    "--guard": 1,
    "--load_best_model_at_end": 1,
    "--metric_for_best_model": 1,
    "--report_to": 1,
    "--local_rank": 1,
    "--watch": 0,
    "--overwrite_output_dir": 0,
    "--allow_changes": 0,
    "--resume": None,
}
_LOOK_SECONDS = 0.002
TRIAL_STEPS = 6


IDLE = (
    Idle(
        ("steps", "output_dir"),
        lambda o: o.checkpoints_only,
        "with --checkpoints_only, which trains nothing",
        "leave it out",
    ),
)


@dataclass(frozen=True)
class Verification:
    """What a check of a run found; true where all is as it should be.

    Attributes:
        exact: whether a killed training resumes exactly; None where that was not tried.
        damaged: what does not verify, one text for each problem of a checkpoint.
        folder: of the trial, with both trainings and their logs; None without one.
    """

    exact: bool | None
    damaged: tuple[str, ...]
    folder: Path | None

    def __bool__(self) -> bool:
        return self.exact is not False and not self.damaged


def verify(run: Path, steps: int, output_dir: Path | None, checkpoints_only: bool) -> Verification:
    """Check the checkpoints of a run, then train a few steps of it, kill it, resume it, and compare.

    Args:
        run: the run's folder.
        steps: optimizer steps of the trial, at least 4.
        output_dir: where the trial runs; None for `verify` in the run's folder.
        checkpoints_only: compare checksums, and train nothing.

    Raises:
        RunError: the folder is no run, or the trial does not run.
    """
    if steps < 4:
        raise RunError(f"--steps {steps} is below 4", "the trial needs a checkpoint and steps after it")
    if not (run / artifacts.RUN).is_file():
        raise RunError(f"{run} holds no {artifacts.RUN}", "pass the output folder of a training")
    damaged = tell_checkpoints(run)
    if checkpoints_only:
        return Verification(None, tuple(damaged), None)
    scratch = scratch_folder(output_dir or run / "verify")
    same = verify_run(run, scratch, steps)
    facts = {"schema": 1, "steps": steps, "resume_is_exact": same, "damaged_checkpoints": damaged}
    artifacts.write_json(scratch / artifacts.VERIFY, facts)
    return Verification(same, tuple(damaged), scratch)


def tell_checkpoints(run: Path) -> list[str]:
    """Say of every checkpoint of a run, and of its adapter, whether it verifies; returns what does not."""
    broken = []
    for path in checkpoints(run):
        problems = checkpoint_problems(path)
        say(f"{path}: {'; '.join(problems) if problems else 'all checksums match'}")
        broken += [f"{path.name}: {problem}" for problem in problems]
    return broken


def trial_flags(run: Path, steps: int) -> list[str]:
    """The flags of a run, without those that the trial sets, and with a training of a few steps.

    Raises:
        RunError: run.json does not say how the run was started.
    """
    recorded = artifacts.read_json(run / artifacts.RUN)
    command = recorded.get("command")
    if not isinstance(command, list) or not any(str(word).startswith("--") for word in command):
        raise RunError(f"{run / artifacts.RUN} does not say how the run was started", "pass the folder of a training")
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = words[next(index for index, word in enumerate(words) if word.startswith("--")) :]
    kept: list[str] = []
    while words:
        name = words.pop(0)
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.pop(0))
        flag = name.replace("-", "_").replace("__", "--", 1)
        if flag not in _OWN:
            kept += [name, *values]
    if "flags" in recorded.get("number_format", {}):  # two measurements might choose differently
        kept += ["--bf16", str(loaded_in_bfloat16(recorded)).lower()]
    return [
        *kept,
        "--max_steps",
        str(steps),
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--logging_steps",
        "1",
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--metric_for_best_model",
        "eval_loss",
        "--eval_benchmarks",
        "none",
        "--report_to",
        "none",
        "--resume",
        "auto",
    ]


def verify_run(run: Path, scratch: Path, steps: int) -> bool:
    """Train, kill, resume and compare; says what it finds.

    Args:
        run: a run's folder.
        scratch: an empty folder for the trial.
        steps: of the trial, at least 4.

    Returns:
        Whether the resumed training came to what the undisturbed one did.

    Raises:
        RunError: the trial does not run.
    """
    flags = trial_flags(run, steps)
    facts = artifacts.read_json(run / artifacts.RUN)
    words = launch_words(int(facts.get("world_size", 1)), str(facts.get("parallel", "single")))
    say(f"1 of 3: {steps} steps without interruption")
    whole = _finished(words, flags, scratch / "undisturbed")
    say("2 of 3: the same, killed after its first checkpoint (SIGKILL)")
    _kill_after_a_checkpoint(words, flags, scratch / "resumed")
    say("3 of 3: resumed")
    resumed = _finished(words, flags, scratch / "resumed")
    resumes = artifacts.read_json(scratch / "resumed" / artifacts.RUN)["resumes"]
    rows = [_rows(scratch / name) for name in ("undisturbed", "resumed")]
    distance = _distance(whole, resumed)
    say(f"resumed at step {resumes[-1]['step']} of {steps}; metrics: {_sameness(rows[0] == rows[1])}")
    if distance == 0.0:
        say("adapter: bit-identical")
        return rows[0] == rows[1]
    say(f"adapter: the largest difference of a weight is {distance:.3g}")
    if not torch.cuda.is_available():
        return False
    say("a GPU may add in a different order each time: a second uninterrupted training shows by how much")
    noise = _distance(whole, _finished(words, flags, scratch / "again"))
    say(f"two undisturbed trainings differ by {noise:.3g}")
    return distance <= 2 * noise


def _sameness(same: bool) -> str:
    return "every line is the same, apart from times" if same else "the lines differ"


def _finished(words: list[str], flags: list[str], output: Path) -> dict[str, torch.Tensor]:
    """Run a training to its end; returns its weights."""
    log = output.with_suffix(".log")
    with log.open("ab") as stream:
        done = subprocess.run([*words, *flags, "--output_dir", str(output)], stdout=stream, stderr=stream, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise RunError(f"the trial ended with exit code {done.returncode}: {' '.join(last)}", f"see {log}")
    return {name: value for path in sorted(output.glob("*.safetensors")) for name, value in load_file(path).items()}


def _kill_after_a_checkpoint(words: list[str], flags: list[str], output: Path) -> None:
    """Start a training and kill all of its processes once there is a checkpoint, in the middle of what follows.

    Raises:
        RunError: it ended before.
    """
    with output.with_suffix(".log").open("ab") as stream:
        process = subprocess.Popen(
            [*words, *flags, "--output_dir", str(output)], stdout=stream, stderr=stream, start_new_session=True
        )
    while not checkpoints(output) and process.poll() is None:
        time.sleep(_LOOK_SECONDS)
    if process.poll() is not None:
        raise RunError("the trial ended before it could be killed", "pass more --steps")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rows(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is measured in seconds."""
    rows = artifacts.read_jsonl(output / artifacts.METRICS)
    return [{key: value for key, value in row.items() if "second" not in key and key != "time"} for row in rows]


def _distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference; infinite where names or shapes differ."""
    if left.keys() != right.keys() or any(left[name].shape != right[name].shape for name in left):
        return float("inf")
    if all(torch.equal(left[name], right[name]) for name in left):
        return 0.0
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def scratch_folder(place: Path) -> Path:
    """An empty folder for the trial; one of an earlier trial is removed.

    Raises:
        RunError: it holds something else.
    """
    if place.exists() and not (place / "undisturbed.log").exists() and any(place.iterdir()):
        raise RunError(f"--output_dir {place} holds something else", "pass another folder")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place
