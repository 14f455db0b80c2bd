"""The trainer's checkpoints: written aside, verified, published by all ranks or by none.

What is read back is safetensors and JSON. Under DeepSpeed the engine writes and reads its own state, which is a pickle:
it is loaded only after its checksums were compared.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer

from vlm_sft.common import artifacts
from vlm_sft.common.console import is_main_process, warn
from vlm_sft.common.errors import RunError
from vlm_sft.common.manifest import flush, naming, write_manifest
from vlm_sft.distributed.collectives import agree, gather
from vlm_sft.model.saved_adapter import require_places
from vlm_sft.report.card import may_write
from vlm_sft.train.checkpoint.directory import begin_checkpoint, checkpoint_problems, last_bytes, publish, rotate
from vlm_sft.train.checkpoint.serialization import load_state, random_state, save_state, set_random_state

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.json"
PROGRESS = "progress.safetensors"  # random numbers of every rank, and the losses that are not logged yet
TRAINER_STATE = "trainer_state.json"
CONTINUE, STOP = "continue", "stop"
_BYTES_A_PARAMETER = 20  # weight, two moments, and DeepSpeed's copy in float32, each at most four bytes; and names


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


class CheckpointTrainer(Trainer):
    """transformers.Trainer with checkpoints that are atomic, verified and exact.

    Args:
        policy: how they are kept.
        **kwargs: those of transformers.Trainer; `save_total_limit` is the policy's.
    """

    # transformers says that each of these may be None, which they are only before the training begins.
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, policy: CheckpointPolicy | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._policy = policy or CheckpointPolicy()
        self._restore_from: Path | None = None
        self._saved_best: tuple[Any, Any, Any] = (None, None, None)

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write, verify and publish one checkpoint; all ranks agree on how each part went."""
        self.store_flos()
        step = self.state.global_step
        partial = self._run_folder / f"checkpoint-{step}.partial"
        progress = self._progress()
        problem = self._attempt(lambda: begin_checkpoint(self._run_folder, step, self._needed_bytes()))
        problem = problem or self._attempt(lambda: self.save_model(str(partial), _internal_call=True), everywhere=True)
        if not problem and self.is_deepspeed_enabled:
            problem = self._attempt(lambda: self._save_engine(partial), everywhere=True)
        problem = problem or self._attempt(lambda: self._seal(partial, progress))
        if problem:
            self._save_failed(partial, problem)
            return
        self.state.best_model_checkpoint = self._best_path()
        self._saved_best = self._best
        if is_main_process():
            keep = {step, self.state.best_global_step or step}
            rotate(self._run_folder, self._policy.limit, keep)

    @property
    def _best(self) -> tuple[Any, Any, Any]:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    def _best_path(self) -> str | None:
        """Where the best checkpoint lies once the present one is published."""
        best = self.state.best_global_step
        known = self.state.best_model_checkpoint
        if not best or (known and Path(known).name == f"checkpoint-{best}"):
            return known
        return str(self._run_folder / f"checkpoint-{best}")

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

    def _needed_bytes(self) -> int:
        """About what a checkpoint takes: as the last one, else by the number of trained parameters."""
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        return last_bytes(self._run_folder) or trained * _BYTES_A_PARAMETER

    def _progress(self) -> dict[str, Any]:
        """Random numbers and unlogged losses of every rank: the same dictionary everywhere."""
        ranks = gather({"random": random_state(), "loss": float(self._tr_loss)})
        return {"ranks": ranks, "logged_step": self._globalstep_last_logged, "total_loss": self._total_loss_scalar}

    def _save_engine(self, partial: Path) -> None:
        """Let DeepSpeed write what every rank holds."""
        self.model_wrapped.save_checkpoint(str(partial), exclude_frozen_parameters=True)

    def _seal(self, partial: Path, progress: dict[str, Any]) -> None:
        """On rank 0: add the rest, and the manifest last; then give the checkpoint its name."""
        if not self.is_deepspeed_enabled:
            save_state(partial / OPTIMIZER, self.optimizer.state_dict())
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            with naming(partial / SCHEDULER):
                (partial / SCHEDULER).write_text(json.dumps(self.lr_scheduler.state_dict()), encoding="utf-8")
        save_state(partial / PROGRESS, progress)
        before = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = self._best_path()
        try:
            with naming(partial / TRAINER_STATE):
                self.state.save_to_json(str(partial / TRAINER_STATE))
        finally:
            self.state.best_model_checkpoint = before
        self._check_shards(partial)
        facts = {
            "step": self.state.global_step,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "world_size": self.args.world_size,
            **self._policy.facts,
        }
        write_manifest(partial, None, facts)
        publish(partial)

    def _check_shards(self, partial: Path) -> None:
        """DeepSpeed's state must be there for every rank: a folder that other nodes do not share has a part only."""
        if not self.is_deepspeed_enabled or not self.accelerator.state.deepspeed_plugin.zero_stage:
            return
        count = len(list(partial.rglob("*_optim_states.pt")))
        if count != self.args.world_size:
            reason = "is --output_dir on a disk that all nodes share?"
            raise OSError(f"{count} of {self.args.world_size} ranks' states are in it: {reason}")

    def _save_failed(self, partial: Path, problem: str) -> None:
        """Leave earlier checkpoints as they are; go on or stop, as was asked.

        Raises:
            RunError: the policy says stop.
        """
        step = self.state.global_step
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        if self.state.best_global_step == step:
            # The best must be one that can be loaded.
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._saved_best
        text = f"the checkpoint of step {step} cannot be written to {self._run_folder}: {problem}"
        self._policy.on_failure(text)
        if self._policy.on_error == STOP:
            raise RunError(text, "make room, then go on with --resume; earlier checkpoints are as they were")
        warn(f"{text}; the training goes on, and what it does until the next checkpoint would be lost in a crash")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the checkpoint must have been verified."""
        self._restore_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in transformers; the best checkpoint of a resumed run is looked up and verified again."""
        started = super()._init_training_state(*args, **kwargs)
        if self._restore_from is not None and self.state.best_global_step:
            self.state.best_model_checkpoint = agree(self._find_best)
            if self.state.best_model_checkpoint is None:
                warn(f"the best checkpoint, of step {self.state.best_global_step}, is gone or damaged: it is forgotten")
                self.state.best_metric = self.state.best_global_step = None
        self._saved_best = self._best
        return started

    def _find_best(self) -> str | None:
        """The best checkpoint's folder, in the run's folder or beside the checkpoint that is resumed."""
        assert self._restore_from is not None
        name = f"checkpoint-{self.state.best_global_step}"
        places = [self._run_folder, self._restore_from.parent]
        return next((str(place / name) for place in places if not checkpoint_problems(place / name)), None)

    def _load_best_model(self) -> None:
        """As in transformers, but a damaged checkpoint is not loaded: the last step's weights stay."""
        path = Path(str(self.state.best_model_checkpoint))
        problems = agree(lambda: checkpoint_problems(path))
        if not problems:
            super()._load_best_model()
            return
        reason = "; ".join(problems[:3])
        text = f"the best checkpoint {path} cannot be loaded ({reason}): the last step's adapter is kept"
        warn(text)
        self._policy.on_failure(text)
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        """As in transformers, which passes over what of an adapter the model has no place for."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self.model, PeftModel):
            require_places(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both; DeepSpeed has restored its own."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not self.is_deepspeed_enabled:
            self.optimizer.load_state_dict(load_state(folder / OPTIMIZER))
        if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            self.lr_scheduler.load_state_dict(artifacts.read_json(folder / SCHEDULER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this rank's random numbers; a rank that the checkpoint does not know takes those of another."""
        if checkpoint is not None:
            ranks = load_state(Path(checkpoint) / PROGRESS)["ranks"]
            set_random_state(ranks[self.args.process_index % len(ranks)]["random"])

    def _restore_progress(self) -> None:
        """Once, after the loop has set itself up: go on with the losses that were not logged yet."""
        folder, self._restore_from = self._restore_from, None
        if folder is None:
            return
        saved = load_state(folder / PROGRESS)
        losses = [rank["loss"] for rank in saved["ranks"]]
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._globalstep_last_logged = saved["logged_step"]
        self._total_loss_scalar = saved["total_loss"]
        self._initial_global_step = 0

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a run that was resumed at its end has not restored its losses yet."""
        self._restore_progress()
        return super()._finalize_training(*args, **kwargs)

    def save_adapter(self) -> None:
        """Write the adapter of the model into the run's folder, aside first, with its manifest; on all ranks.

        Raises:
            RunError: it cannot be written; the last checkpoint holds what there is.
        """
        folder, partial = self._run_folder, self._run_folder / artifacts.ADAPTER_PARTIAL

        def publish_files() -> None:
            # The card is written again when the results are there, so no checksum of it is kept.
            names = [path.name for path in partial.iterdir() if path.name != artifacts.CARD]
            write_manifest(partial, names, {"step": self.state.global_step, **self._policy.facts})
            if may_write(folder / artifacts.CARD):
                os.replace(partial / artifacts.CARD, folder / artifacts.CARD)
            (partial / artifacts.CARD).unlink(missing_ok=True)
            for name in (*names, artifacts.MANIFEST, artifacts.MANIFEST_CHECKSUM):
                os.replace(partial / name, folder / name)
            partial.rmdir()
            flush(folder)

        problem = self._attempt(lambda: self.save_model(str(partial), _internal_call=True), everywhere=True)
        problem = problem or self._attempt(publish_files)
        if problem:
            raise RunError(
                f"the adapter cannot be written to {folder}: {problem}",
                "make room, then go on with --resume auto: the last checkpoint holds the training",
            )


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
