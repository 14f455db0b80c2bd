"""Train pocket from random weights: `scripts/train_pocket --output_dir D --steps N`.

The learning rate rises, stays, and falls to nearly zero over the last part of the run; the lessons depend on the step
alone. So a run that is stopped before its decline can be resumed towards another length and is still the run that
would have been. With one thread, equal versions and equal `--seed` and `--steps`, the weights are equal bit for bit;
with another number of threads, or another processor, sums are rounded differently and the weights drift apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForImageTextToText, Qwen2Tokenizer

from tools.pocket import build, curriculum
from tools.pocket.batches import build_batch
from tools.pocket.card import SCORES
from tools.pocket.forward import SlotHead, batch_loss
from vlm_sft.common import artifacts, console
from vlm_sft.common.errors import RunError, VlmSftError
from vlm_sft.train.checkpoint.serialization import load_state, save_state

PEAK_LEARNING_RATE = 1.5e-3
# From this step on, when the language model has begun to answer, batches are too small for the peak.
LATER_LEARNING_RATE = 8e-4
LATER_STEP = 3900
WARMUP_STEPS = 50
DECLINE = 0.2  # share of the run in which the learning rate falls
FLOOR = 0.02  # what is left of the learning rate at the end
WEIGHT_DECAY = 0.02
MAX_GRAD_NORM = 1.0
AVERAGE_RATE = 0.003  # how far the average moves towards the weights in one step
SLOT_WEIGHT = 0.5
LOG_EVERY = 100  # steps
SAVE_EVERY_SECONDS = 180
COUNTS = ("step", "total", "first", "seconds", "pictures", "questions", "threads")
CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"


class Steps(Dataset[dict[str, Any]]):
    """The batch of every step, drawn when it is asked for."""

    def __init__(self, seed: int, first: int, last: int, tokenizer: Qwen2Tokenizer) -> None:
        self.seed, self.first, self.last, self.tokenizer = seed, first, last, tokenizer

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        return build_batch(curriculum.step_pictures(self.seed, self.first + index), self.tokenizer)


class Run:
    """Everything that a checkpoint holds: model, slot head, optimizer, and the counts of what was done.

    Attributes:
        average: the model with the running mean of all weights over the last several hundred steps; it is exported, as
            it answers better than the weights of any one step (Polyak and Juditsky 1992).
        step, total: steps done, and planned; the plan is 0 while the length of the run is open.
        first: the step that the optimizer began with.
        seconds: of training, waiting for pictures not counted.
        pictures, questions: seen so far.
        threads: the most that torch was given.

    Args:
        folder: where the checkpoint and the history are.
        seed: of weights and pictures.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.model = build.build_model(seed).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = SlotHead(self.model.config.text_config.hidden_size)
        weights = [*self.model.parameters(), *self.head.parameters()]
        groups = [
            {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.step, self.total, self.first, self.seconds = 0, 0, 0, 0.0
        self.pictures, self.questions, self.threads = 0, 0, 1

    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights that are trained."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def follow(self) -> None:
        """Move the average a little towards the present weights."""
        averages, weights = list(self.average.parameters()), [weight.detach() for weight in self.model.parameters()]
        torch._foreach_lerp_(averages, weights, AVERAGE_RATE)

    def save(self) -> None:
        """Write the checkpoint, replacing the one before only when the new one is whole."""
        temporary = self.folder / (CHECKPOINT + ".tmp")
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seed": self.seed,
            "counts": {name: getattr(self, name) for name in COUNTS},
        }
        save_state(temporary, state)
        temporary.replace(self.folder / CHECKPOINT)

    @classmethod
    def resume(cls, folder: Path) -> Run:
        """Read the checkpoint of a folder.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = folder / CHECKPOINT
        try:
            state = load_state(path)
            run = cls(folder, state["seed"])
            run.model.load_state_dict(state["model"])
            run.average.load_state_dict(state["average"])
            run.head.load_state_dict(state["head"])
            run.optimizer.load_state_dict(state["optimizer"])
            for name in COUNTS:
                setattr(run, name, state["counts"][name])
        except FileNotFoundError as error:
            raise RunError(f"{path} does not exist", "start the training without --resume") from error
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{path} is damaged, or no checkpoint of pocket", "start again in another folder") from error
        return run

    @classmethod
    def continue_from(cls, folder: Path, exported: Path) -> Run:
        """Go on from a shipping folder: with its weights, heads and counts, and an optimizer that warms up anew.

        Args:
            folder: of the new checkpoint and history.
            exported: see `score.export`.

        Raises:
            RunError: `exported` is no shipping folder of this architecture.
        """
        try:
            counts = artifacts.read_json(exported / SCORES)["training"]
            run = cls(folder, counts["seed"])
            shipped: Any = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
            run.model.load_state_dict(shipped.state_dict())
            run.head.load_state_dict(load_file(build.heads_file(exported)))
        except (VlmSftError, OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            fix = "name a folder that --export of this version wrote"
            raise RunError(f"{exported} cannot be continued: {error}", fix) from error
        run.average.load_state_dict(run.model.state_dict())
        run.step = run.first = counts["steps"]
        run.seconds = 60.0 * counts["minutes"]
        run.pictures, run.questions, run.threads = counts["pictures"], counts["questions"], counts["threads"]
        return run


def learning_rate(step: int, total: int, first: int = 0) -> float:
    """The learning rate of a step; `total` is 0 while the length of the run is still open, `first` see `Run`."""
    rate = LATER_LEARNING_RATE if step >= LATER_STEP else PEAK_LEARNING_RATE
    rate *= min(1.0, (step - first + 1) / WARMUP_STEPS)
    if total:
        rate *= min(1.0, FLOOR + (1 - FLOOR) * (total - step) / (DECLINE * total))
    return rate


def train(run: Run, steps: int, minutes: float, threads: int) -> None:
    """Train until `steps`, or for about `minutes`.

    Args:
        run: new or resumed; it is saved every few minutes and at the end.
        steps: length of the whole run; 0 to go by the clock.
        minutes: of training altogether, resumed parts included: when all but the share DECLINE of them has passed,
            the length of the run is fixed so that the decline takes the rest.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    run.total, run.threads = steps or run.total, max(threads, run.threads)
    ceiling = run.total or 10_000_000
    data = Steps(run.seed, run.step, ceiling, build.build_processor().tokenizer)
    loader = DataLoader(data, batch_size=None, shuffle=False, num_workers=1, prefetch_factor=8)
    weights, saved, stop = run.parameters(), time.monotonic(), _stop_requests()
    log: dict[str, list[float]] = defaultdict(list)
    for batch in loader:
        started = time.monotonic()
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, run.total, run.first)
        loss, numbers = batch_loss(run.model, run.head, batch, SLOT_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.follow()
        run.step += 1
        run.seconds += time.monotonic() - started
        run.pictures += batch["patches"].shape[0]
        run.questions += batch["questions"]
        for name, value in numbers.items():
            log[f"{batch['task']}/{name}"].append(value)
        log["pictures"].append(batch["patches"].shape[0])
        log["seconds"].append(time.monotonic() - started)
        if not run.total and run.seconds >= 60 * minutes * (1 - DECLINE):
            run.total = round(run.step / (1 - DECLINE))
        if run.step % LOG_EVERY == 0:
            _report(run, log)
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            run.save()
            saved = time.monotonic()
        if stop or (run.total and run.step >= run.total):
            break
    run.save()


def _stop_requests() -> list[int]:
    """A list that fills when the program is asked to stop, so that the step is finished and saved first."""
    requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    return requests


def _report(run: Run, log: dict[str, list[float]]) -> None:
    """Say and write the means since the last report, and forget them."""
    seconds, pictures = sum(log.pop("seconds")), sum(log.pop("pictures"))
    means = {name: sum(values) / len(values) for name, values in sorted(log.items())}
    log.clear()
    console.say(
        f"step {run.step}/{run.total or '?'} {run.seconds / 60:.1f} min {pictures / seconds:.0f} pictures/s  "
        + "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    )
    with (run.folder / HISTORY).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": run.step, "seconds": run.seconds, "pictures": pictures, **means}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_pocket", description="Train the embedded base model from random weights."
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the checkpoint and the history")
    parser.add_argument("--steps", type=int, default=0, help="length of the whole run; the reproducible choice")
    parser.add_argument("--minutes", type=float, default=0.0, help="train for about so many minutes altogether")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint of output_dir")
    parser.add_argument("--continue_from", type=Path, help="begin with the weights and counts of an exported folder")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures, 0 to 999,999")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 for equal weights every time")
    parser.add_argument("--export", type=Path, help="write a shipping folder, with its scores and its card")
    parser.add_argument("--note", default="", help="a sentence for the card: how this run was not the plain command")
    return parser


def _open_run(args: argparse.Namespace) -> Run:
    if args.resume or (args.export and not args.steps and not args.minutes):
        return Run.resume(args.output_dir)
    if (args.output_dir / CHECKPOINT).exists():
        raise RunError(
            f"{args.output_dir} holds another run", "pass --resume to go on with it, or choose another folder"
        )
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make {args.output_dir}: {error.strerror}", "choose a folder that you may write to"
        ) from error
    if args.continue_from:
        return Run.continue_from(args.output_dir, args.continue_from)
    return Run(args.output_dir, args.seed)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if not 0 <= args.seed < curriculum.HELD_OUT_SEED:
            raise RunError(
                f"--seed {args.seed} is out of range", f"choose one from 0 to {curriculum.HELD_OUT_SEED - 1}"
            )
        if not (args.steps or args.minutes or args.export):
            raise RunError("nothing to do", "pass --steps, --minutes or --export")
        run = _open_run(args)
        if 0 < args.steps < run.step:
            raise RunError(f"--steps {args.steps}: {run.step:,} are done", "it is the length of the whole run")
        if args.steps or args.minutes:
            train(run, args.steps, args.minutes, args.threads)
        if args.export:
            from tools.pocket import score

            score.export(run, args.export, args.note)
    except VlmSftError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
