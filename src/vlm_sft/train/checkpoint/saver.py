"""The checkpoints of a training: written aside, verified, published by all ranks or by none.

What is read back is safetensors and JSON. Under DeepSpeed the engine writes and reads its own state, which is a pickle:
it is loaded only after its checksums were compared.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState

from vlm_sft.common import artifacts
from vlm_sft.common.console import is_main_process, warn
from vlm_sft.common.errors import RunError
from vlm_sft.common.manifest import flush, naming, write_manifest
from vlm_sft.distributed.collectives import agree, gather
from vlm_sft.report.card import may_write
from vlm_sft.train.checkpoint.directory import begin_checkpoint, checkpoint_problems, last_bytes, publish, rotate
from vlm_sft.train.checkpoint.serialization import load_state, random_state, save_state, set_random_state
from vlm_sft.train.optimization import Optimization

PROGRESS = "progress.safetensors"  # random numbers of every rank, and the losses that are not logged yet
TRAINER_STATE = "trainer_state.json"
CONTINUE, STOP = "continue", "stop"
_BYTES_A_PARAMETER = 20  # weight, two moments, and DeepSpeed's copy in float32, each at most four bytes; and names

WriteModel = Callable[[Path, dict[str, torch.Tensor] | None], None]


@dataclass(frozen=True)
class CheckpointPolicy:
    """How checkpoints of a run are kept.

    Attributes:
        limit: how many stay; None for all.
        on_error: "continue" or "stop" when one cannot be written.
        facts: what its manifest says about the run: identity, versions, ….
        on_failure: told why one could not be written.
    """

    limit: int | None = None
    on_error: str = CONTINUE
    facts: dict[str, Any] = field(default_factory=dict)
    on_failure: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class BestCheckpoint:
    """The best checkpoint so far: value of the metric, step, folder; None while there is none."""

    value: float | None = None
    step: int | None = None
    folder: str | None = None

    @classmethod
    def of(cls, state: TrainerState) -> BestCheckpoint:
        """As a state tells it."""
        return cls(state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def put(self, state: TrainerState) -> None:
        """Let a state tell it."""
        state.best_metric, state.best_global_step, state.best_model_checkpoint = self.value, self.step, self.folder


class CheckpointSaver:
    """Writes the checkpoints of one training, and restores from them; its methods are called on all ranks.

    Args:
        folder: the run's folder.
        optimization: writes and reads weights, optimizer and learning rate.
        write_model: writes what is trained into a folder, on rank 0: the folder, and weights gathered from all ranks.
        policy: how they are kept.
    """

    def __init__(
        self, folder: Path, optimization: Optimization, write_model: WriteModel, policy: CheckpointPolicy
    ) -> None:
        self.folder = folder
        self.optimization = optimization
        self.policy = policy
        self._write_model = write_model
        self._saved_best = BestCheckpoint()

    def save(self, state: TrainerState, losses: dict[str, Any]) -> bool:
        """Write, verify and publish one checkpoint; all ranks agree on how each part went.

        Args:
            state: progress of the training; where its best step is this one, the folder is noted in it.
            losses: of the training, as its `LossMeter` tells them.

        Returns:
            Whether it is there.

        Raises:
            RunError: it cannot be written, and the policy says stop.
        """
        step = state.global_step
        partial = self.folder / f"checkpoint-{step}.partial"
        ranks = gather({"random": random_state()})
        problem = self._attempt(lambda: begin_checkpoint(self.folder, step, self._needed_bytes()))
        problem = problem or self._save_model(partial)
        if not problem and self.optimization.everywhere:
            problem = self._attempt(lambda: self.optimization.save(partial), everywhere=True)
        problem = problem or self._attempt(lambda: self._seal(partial, state, {"ranks": ranks, **losses}))
        if problem:
            self._give_up(partial, state, problem)
            return False
        self._saved_best = self._located(BestCheckpoint.of(state), step)
        self._saved_best.put(state)
        if is_main_process():
            rotate(self.folder, self.policy.limit, {step, state.best_global_step or step})
        return True

    def _located(self, best: BestCheckpoint, step: int) -> BestCheckpoint:
        """The best checkpoint with its folder, once the present one is published."""
        if not best.step or (best.folder and Path(best.folder).name == f"checkpoint-{best.step}"):
            return best
        return replace(best, folder=str(self.folder / f"checkpoint-{best.step}"))

    def _attempt(self, write: Callable[[], Any], everywhere: bool = False) -> str:
        """Write something on rank 0, or on every rank; returns on all ranks why that failed on one of them, or ""."""
        problem = ""
        if everywhere or is_main_process():
            try:
                write()
            except (OSError, SafetensorError, RuntimeError) as error:
                problem = _file_problem(error)
                if not problem:
                    raise
        return next((text for text in gather(problem) if text), "")

    def _save_model(self, folder: Path) -> str:
        """Write what is trained; returns why that failed, or ""."""
        weights = self.optimization.weights()
        return self._attempt(lambda: self._write_model(folder, weights))

    def _needed_bytes(self) -> int:
        """About what a checkpoint takes: as the last one, else by the number of trained parameters."""
        model = self.optimization.model
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        return last_bytes(self.folder) or trained * _BYTES_A_PARAMETER

    def _seal(self, partial: Path, state: TrainerState, progress: dict[str, Any]) -> None:
        """On rank 0: add the rest, and the manifest last; then give the checkpoint its name."""
        if not self.optimization.everywhere:
            self.optimization.save(partial)
        save_state(partial / PROGRESS, progress)
        told = replace(state)
        self._located(BestCheckpoint.of(state), state.global_step).put(told)
        with naming(partial / TRAINER_STATE):
            told.save_to_json(str(partial / TRAINER_STATE))
        if problem := self.optimization.problem(partial):
            raise OSError(problem)
        facts = {
            "step": state.global_step,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": len(progress["ranks"]),
            **self.policy.facts,
        }
        write_manifest(partial, None, facts)
        publish(partial)

    def _give_up(self, partial: Path, state: TrainerState, problem: str) -> None:
        """Leave earlier checkpoints as they are; go on or stop, as was asked.

        Raises:
            RunError: the policy says stop.
        """
        step = state.global_step
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        if state.best_global_step == step:
            self._saved_best.put(state)  # the best must be one that can be loaded
        text = f"the checkpoint of step {step} cannot be written to {self.folder}: {problem}"
        self.policy.on_failure(text)
        if self.policy.on_error == STOP:
            raise RunError(text, "free some space, then continue with --resume; earlier checkpoints are intact")
        warn(f"{text}; training continues, but a crash before the next checkpoint would lose its progress")

    def restore(self, checkpoint: Path) -> tuple[TrainerState, dict[str, Any]]:
        """Restore weights, optimizer and learning rate from a checkpoint, which must have been verified.

        Returns:
            state: progress of the training; its best checkpoint was looked up and verified again.
            progress: losses, and the random numbers of every rank.
        """
        self.optimization.load(checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        if state.best_global_step:
            state.best_model_checkpoint = agree(lambda: self._find_best(state, checkpoint))
            if state.best_model_checkpoint is None:
                warn(
                    f"the best checkpoint, of step {state.best_global_step}, is missing or damaged and no longer counts"
                )
                BestCheckpoint().put(state)
        self._saved_best = BestCheckpoint.of(state)
        return state, load_state(checkpoint / PROGRESS)

    def _find_best(self, state: TrainerState, checkpoint: Path) -> str | None:
        """The best checkpoint's folder, in the run's folder or beside the checkpoint that is resumed."""
        name = f"checkpoint-{state.best_global_step}"
        places = [self.folder, checkpoint.parent]
        return next((str(place / name) for place in places if not checkpoint_problems(place / name)), None)

    def load_best(self, state: TrainerState) -> None:
        """Take the weights of the best checkpoint; where it is damaged, those of the last step stay.

        Args:
            state: tells which it is; a damaged one is forgotten.
        """
        if state.best_model_checkpoint is None:
            return
        path = Path(state.best_model_checkpoint)
        problems = agree(lambda: checkpoint_problems(path))
        if not problems:
            self.optimization.load_weights(path)
            return
        reason = "; ".join(problems[:3])
        text = f"the best checkpoint {path} cannot be loaded ({reason}): the last step's adapter is kept"
        warn(text)
        self.policy.on_failure(text)
        BestCheckpoint().put(state)

    def save_result(self, step: int) -> None:
        """Write what was trained into the run's folder, aside first, with its manifest.

        Args:
            step: optimizer steps done.

        Raises:
            RunError: it cannot be written; the last checkpoint holds what there is.
        """
        partial = self.folder / artifacts.ADAPTER_PARTIAL
        problem = self._save_model(partial)
        problem = problem or self._attempt(lambda: self._publish_result(partial, step))
        if problem:
            raise RunError(
                f"the adapter cannot be written to {self.folder}: {problem}",
                "free some space, then continue with --resume auto from the last checkpoint",
            )

    def _publish_result(self, partial: Path, step: int) -> None:
        # The card is written again when the results are there, so no checksum of it is kept.
        names = [path.name for path in partial.iterdir() if path.name != artifacts.CARD]
        write_manifest(partial, names, {"step": step, **self.policy.facts})
        if may_write(self.folder / artifacts.CARD):
            os.replace(partial / artifacts.CARD, self.folder / artifacts.CARD)
        (partial / artifacts.CARD).unlink(missing_ok=True)
        for name in (*names, artifacts.MANIFEST, artifacts.MANIFEST_CHECKSUM):
            os.replace(partial / name, self.folder / name)
        partial.rmdir()
        flush(self.folder)


def restore_random(progress: dict[str, Any], rank: int) -> None:
    """Restore this rank's random numbers; a rank that the checkpoint does not know takes those of another."""
    ranks = progress["ranks"]
    set_random_state(ranks[rank % len(ranks)]["random"])


def _file_problem(error: Exception) -> str:
    """Which file could not be written and why, in a few words; "" when the error is no matter of files."""
    if isinstance(error, OSError):
        known = error.errno is not None and error.errno in errno.errorcode
        named = f"{Path(str(error.filename)).name}: " if known and error.filename else ""
        return f"{named}{error.strerror}" if known else str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"the weights: {text.strip().splitlines()[0]}"
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return text.strip().splitlines()[0]
    return ""
