"""Benchmark questions answered during training: the task metric and the guard.

At each evaluation a fixed sample of validation questions is answered by generation. The scores choose the best
checkpoint; a checkpoint that lost more than a guard allows cannot be it. The sample is the one that
`vlm-sft eval --split validation --limit N` draws, so a recorded score can be measured again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import say, warn
from vlm_sft.data.encode import ImageSource
from vlm_sft.distributed.collectives import agree, barrier
from vlm_sft.distributed.launch import Launch
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.evaluate.compare import TOO_FEW
from vlm_sft.evaluate.evaluator import Evaluator, StopRequest
from vlm_sft.evaluate.guard import FEWEST_IMAGES, judge, tradeoff
from vlm_sft.evaluate.pictures import save_some
from vlm_sft.evaluate.provenance import identity_of
from vlm_sft.evaluate.tasks import Task
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import Base
from vlm_sft.model.trainable import untuned
from vlm_sft.planning.validation_plan import ValidationPlan


class Validation:
    """Answers the questions of a plan with the model in training, on every rank.

    Args:
        plan: what is asked.
        base: the base model with its processor and prompt.
        folder: the run's folder.
        tokens_per_pack: token budget of one forward pass, by whether attention is computed image by image.
        launch: ranks and parallelism.
        resumed_step: entries of guard.json after this step are of another continuation.
        images: gives processed images or their features; None processes images when they are asked about.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        base: Base,
        folder: Path,
        tokens_per_pack: Callable[[bool], int],
        launch: Launch,
        resumed_step: int,
        images: ImageSource | None = None,
    ) -> None:
        self.plan = plan
        self.base = base
        self.run_folder = folder
        self.folder = folder / artifacts.VALIDATION_FOLDER
        self.tokens_per_pack = tokens_per_pack
        self.launch = launch
        self._evaluations = self._earlier(resumed_step)
        self._images = images
        self._base_rows: dict[str, list[dict[str, Any]]] = {}

    def _earlier(self, resumed_step: int) -> list[dict[str, Any]]:
        path = self.run_folder / artifacts.GUARD
        if not resumed_step or not path.is_file():
            return []
        return [entry for entry in artifacts.read_json(path)["evaluations"] if entry["step"] <= resumed_step]

    def measure(
        self, model: Any, mode: PackMode, step: int, loss: float, stop: StopRequest | None = None
    ) -> dict[str, float]:
        """Answer all questions and score them; must be called on every rank.

        Args:
            model: the model in training, unwrapped.
            mode: how its packs are computed.
            step: optimizer steps done.
            loss: the evaluation loss of this step, of the data set that the metric is of where it is of one.
            stop: looked at while questions are answered; None where nothing asks for a stop.

        Returns:
            Mean score by metric name, the same on every rank. Data sets with the same metric count as one.
        """
        backend = SharedPrefixBackend(self.base, model, mode, self._images)
        evaluator = self._evaluator(backend, stop)
        self._score_base(evaluator, model, stop)
        folder = self.folder / f"step-{step}"
        if self.launch.rank == 0:
            save_some(self.plan.tasks, self.folder)
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier continuation from an older checkpoint
        barrier("begin to answer")
        identity = {"base_model": self.base.name, "step": step, "prompt": self.base.prompt.to_dict()}
        rows = {
            task.name: self._ask(evaluator, task, folder, f"{task.name} at step {step}", identity)
            for task in self.plan.tasks
        }
        scores: dict[str, float] = {}
        if self.launch.rank == 0:
            scores = self._scores(rows)
            if self.plan.guards:
                self._judge(rows, step, loss, scores)
        scores, self._evaluations = agree(lambda: (scores, self._evaluations))
        return scores

    def _evaluator(self, backend: SharedPrefixBackend, stop: StopRequest | None) -> Evaluator:
        launch, tokens = self.launch, self.tokens_per_pack(backend.blockwise)
        return Evaluator(backend, tokens, launch.rank, launch.world_size, replace=True, stop=stop)

    def _score_base(self, evaluator: Evaluator, model: Any, stop: StopRequest | None) -> None:
        """Answer the guarded questions once as the base does."""
        guarded = {guard.name for guard in self.plan.guards}
        if self._base_rows or not guarded:
            return
        identity = identity_of(self.base, None)
        with untuned(model, self.base) as base_model:
            if base_model is not model:
                own = evaluator.backend
                assert isinstance(own, SharedPrefixBackend)
                evaluator = self._evaluator(SharedPrefixBackend(self.base, base_model, own.mode), stop)
            for task in self.plan.tasks:
                if task.name in guarded:
                    self._base_rows[task.name] = self._ask(
                        evaluator, task, self.folder / "base", f"{task.name}: base", identity
                    )

    def _ask(
        self, evaluator: Evaluator, task: Task, folder: Path, label: str, identity: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The rows of one task; empty on other ranks than the first."""
        place = folder / task.name
        result = evaluator.run(task, place, label, identity)
        if self.launch.rank != 0:
            return []
        if result["cut"]:
            limit = task.max_new_tokens
            say(f"{label}: {result['cut']:,} of {result['n']:,} answers ended at the limit of {limit} tokens")
        return list(artifacts.read_jsonl(place / artifacts.PREDICTIONS))

    def _scores(self, rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
        by_metric: dict[str, list[float]] = {}
        for task in self.plan.tasks:
            by_metric.setdefault(task.benchmark.metric_name, []).extend(row["score"] for row in rows[task.name])
        return {name: sum(scores) / len(scores) for name, scores in by_metric.items()}

    def _judge(self, rows: dict[str, list[dict[str, Any]]], step: int, loss: float, scores: dict[str, float]) -> None:
        """Test the guards, and keep the verdict on disk."""
        verdicts = [judge(guard, self._base_rows[guard.name], rows[guard.name]) for guard in self.plan.guards]
        for one in verdicts:
            if not one["qualifies"]:
                say(
                    f"guard: {one['benchmark']} lost {one['lost_points']:.1f} points ({one['allowed_points']:g} "
                    f"allowed, p = {one['p_value']:.3f}): step {step} cannot be the best checkpoint"
                )
            elif one["too_few"]:
                say(
                    f"guard: {one['benchmark']} lost {one['lost_points']:.1f} points ({one['allowed_points']:g} "
                    f"allowed) at step {step}, but fewer than {FEWEST_IMAGES} images are {TOO_FEW}"
                )
        self._evaluations = [entry for entry in self._evaluations if entry["step"] < step]
        self._evaluations.append(
            {
                "step": step,
                "value": scores.get(self.plan.metric, loss),
                "guards": verdicts,
                "qualifies": all(one["qualifies"] for one in verdicts),
            }
        )
        self._write(None)

    def _write(self, best_step: int | None) -> None:
        artifacts.write_json(
            self.run_folder / artifacts.GUARD,
            {
                "schema": 1,
                "metric": self.plan.metric,
                "evaluations": self._evaluations,
                "best_step": best_step,
                "qualified": any(entry["qualifies"] for entry in self._evaluations),
            },
        )

    def qualifies(self, step: int) -> bool:
        """Whether the checkpoint of a step may be the best one."""
        return all(entry["qualifies"] for entry in self._evaluations if entry["step"] == step)

    def finish(self, best_step: int | None) -> bool:
        """Tell and write the trade-off of a guarded training.

        Args:
            best_step: the step of the checkpoint that was chosen; None when there is none.

        Returns:
            False when guards were given and no evaluated checkpoint keeps to them.
        """
        if not self.plan.guards:
            return True
        qualified = any(entry["qualifies"] for entry in self._evaluations)
        if self.launch.rank == 0:
            self._write(best_step if qualified else None)
            say("changes on the guarded benchmarks (validation questions):")
            say(tradeoff(self.plan.metric, self._evaluations, best_step))
            if not qualified:
                warn("no checkpoint satisfies the guard; the last step's adapter is kept")
        return qualified
