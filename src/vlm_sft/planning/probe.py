"""A few real passes of a run before it starts, and what they say about its forecast.

The run itself does not change: gradients are discarded, the optimizer's step has a learning rate of zero, and the state
of the random generator is restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlm_sft.common.console import say
from vlm_sft.common.record import peak_memory_bytes
from vlm_sft.data.collate import collate
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.packing import EpochPlanner
from vlm_sft.distributed.collectives import gather
from vlm_sft.evaluate.backends import SharedPrefixBackend
from vlm_sft.evaluate.batching import image_counter, plan_packs
from vlm_sft.evaluate.tasks import Task
from vlm_sft.forecast import estimate
from vlm_sft.forecast.calibration import PROBE, PROBE_SPREAD, Calibration
from vlm_sft.forecast.flops import Pack, Work, pack_work
from vlm_sft.forecast.inputs import ForecastInputs
from vlm_sft.forecast.time import answering_seconds, forward_seconds, image_seconds, tower_seconds, training_seconds
from vlm_sft.model import packed_forward
from vlm_sft.model.cpu.matmul import mixed_precision
from vlm_sft.model.families import PackMode
from vlm_sft.model.load import load_model
from vlm_sft.model.sharing_check import choose_mode
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.model.trainable import checkpoint_layers, tune
from vlm_sft.model.vision_features import start_training
from vlm_sft.planning.answering_work import generation_steps, prompt_work
from vlm_sft.planning.run_plan import Plan
from vlm_sft.planning.training_run import TrainingRun

PROBE_SECONDS = 45.0  # in total, about
TRAINING_SHARE, ANSWER_SHARE = 0.5, 0.3  # of that
PACKS = 10  # of the plan, spread over their sizes


@dataclass
class Probe:
    """Measures the passes of one run.

    Args:
        run, plan: the run.
        model: with its adapter, on its device, not wrapped for several devices.
        mode: how its packs are computed.
        precision: makes the context of a forward pass.
        inputs: what is forecast; `images.keep_features` says whether packs hold pixels or features.
        planner, eval_planner: the plans that are followed, with images shared or not.
        budget: seconds for all of it.
    """

    run: TrainingRun
    plan: Plan
    model: Any
    mode: PackMode
    precision: Callable[[], Any]
    inputs: ForecastInputs
    planner: EpochPlanner
    eval_planner: EpochPlanner | None
    budget: float = PROBE_SECONDS

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def calibrate(
        self, tasks: Sequence[Task], measured: dict[str, float], target: ForecastInputs | None = None
    ) -> Calibration:
        """Measure, and return the corrections.

        Args:
            tasks: benchmarks that will be answered.
            measured: seconds of items that are over already, by name.
            target: the inputs whose forecast is corrected, where features will be kept that the probe does not have;
                None for the probe's own.
        """
        target = target or self.inputs
        began = time.perf_counter()
        random = torch.random.get_rng_state()
        training, optimizer = self._training()
        losses = self._losses() if self.eval_planner is not None else training
        answers = self._answers(tasks) if tasks else losses
        torch.random.set_rng_state(random)
        expected, passes = estimate.time_items(target), target.passes
        work = passes.epoch.slowest.times(passes.epochs)
        seconds = training * self._training_seconds(work, target) + passes.steps * (optimizer + estimate.STEP_SECONDS)
        factors = {item: measured[item] / expected[item] for item in measured if expected.get(item)}
        factors[estimate.STEPS] = seconds / expected[estimate.STEPS]
        factors |= {estimate.LOSSES: losses, estimate.ANSWERS: answers}
        if estimate.FINAL in expected:
            tower = factors.get(estimate.FEATURES, losses)
            pieces = estimate.final_parts(target)
            corrected = pieces.rest + tower * pieces.tower + answers * pieces.answers
            factors[estimate.FINAL] = corrected / expected[estimate.FINAL]
        peak = max(gather(peak_memory_bytes()))  # the largest pack may be another rank's
        took = time.perf_counter() - began
        say(f"probe: {took:.1f} s; a training pass takes {training:.2f} times the table's value")
        return Calibration(
            PROBE,
            factors,
            PROBE_SPREAD,
            float(peak),
            f"a probe of {took:.0f} s measured passes of this run on this machine",
        )

    def _training(self) -> tuple[float, float]:
        """Measured over forecast seconds of training passes, and seconds of an optimizer step."""
        packs = self._chosen(self.planner, self.plan.data)
        start_training(self.model)
        self._train_pack(packs[0])  # the largest one: memory at its peak, and everything warm
        measured = expected = 0.0
        until = time.perf_counter() + TRAINING_SHARE * self.budget
        for pack in packs:
            measured += self._timed(partial(self._train_pack, pack))
            expected += self._training_seconds(self._work(pack, self.plan.data), self.inputs)
            if time.perf_counter() > until:
                break
        return measured / expected, self._optimizer(packs[-1])

    @staticmethod
    def _training_seconds(work: Work, inputs: ForecastInputs) -> float:
        """Seconds of training passes by the table, with the tower where packs hold pixels."""
        images = image_seconds(inputs.setting, work, inputs.images.keep_features, training=True)
        return training_seconds(inputs.setting, work) + images

    def _work(self, pack: Pack, data: PreparedData) -> Work:
        return pack_work(pack, data.lengths, data.visual_tokens, not self.mode.shares)

    def _chosen(self, planner: EpochPlanner, data: PreparedData) -> list[Pack]:
        """Packs of this rank's first steps, largest first, spread over all sizes."""
        rank = self.run.launch.rank
        packs = [pack for step in planner.epoch(0) for pack in step.ranks[rank] if pack]
        packs.sort(key=lambda pack: -self._work(pack, data).tokens)
        if len(packs) <= PACKS:
            return packs
        return [packs[round(index * (len(packs) - 1) / (PACKS - 1))] for index in range(PACKS)]

    def _gradients(self, pack: Pack) -> StepGradients:
        batch = collate(pack, self.plan.data)
        gradients = StepGradients(self.model, self.mode, 0, 1.0 / max(1, len(batch.targets)), self.precision)
        gradients.add(batch)
        return gradients

    def _train_pack(self, pack: Pack) -> None:
        """Forward and backward of one pack as in a training step; the result is discarded."""
        gradients = self._gradients(pack)
        gradients.problem(float(gradients.loss))

    def _optimizer(self, pack: Pack) -> float:
        """Seconds of clipping and a step of AdamW that moves nothing."""
        gradients = self._gradients(pack)
        gradients.assign()
        optimizer = torch.optim.AdamW(gradients.parameters, lr=0.0, weight_decay=0.0)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(gradients.parameters, self.run.recipe.max_grad_norm or 1.0)
            optimizer.step()

        step()
        took = self._timed(step)
        for parameter in gradients.parameters:
            parameter.grad = None
        return took

    @torch.no_grad()
    def _losses(self) -> float:
        """Measured over forecast seconds of passes without gradients."""
        data, planner = self.plan.evaluation, self.eval_planner
        assert data is not None and planner is not None
        self.model.eval()
        measured = expected = 0.0
        for index, pack in enumerate([self._chosen(planner, data)[0], *self._chosen(planner, data)[:4]]):

            def forward(pack: Pack = pack) -> None:
                batch = collate(pack, data).to(self.device)
                with packed_forward.packed(batch, self.mode, 0), self.precision():
                    packed_forward.token_losses(self.model, batch, self.mode)

            took = self._timed(forward)
            if not index:  # the first one warms up
                continue
            measured += took
            work = self._work(pack, data)
            online = image_seconds(self.inputs.setting, work, self.inputs.images.keep_features)
            expected += forward_seconds(self.inputs.setting, work) + online
        return measured / expected

    def _answers(self, tasks: Sequence[Task]) -> float:
        """Measured over forecast seconds of answers, on one pack of each benchmark."""
        self.model.eval()
        backend = SharedPrefixBackend(self.plan.base, self.model, self.mode, self.plan.cache.image_tensors)
        count = image_counter(backend.encoder.processor)
        measured = expected = 0.0
        until = time.perf_counter() + ANSWER_SHARE * self.budget
        for task in tasks:
            packs = plan_packs(task.samples, count, self.run.tokens_per_pack, backend.separate)
            pack = packs[len(packs) // 2]
            answer = partial(_answer, backend, pack, task.max_new_tokens)
            answer()
            took = self._timed(answer)
            work = prompt_work(pack, count, backend.separate)
            steps = generation_steps(pack, task.max_new_tokens)
            # Images of benchmarks are not prepared yet: here they are processed, and the tower runs along.
            measured += max(took - self.inputs.images.processing_seconds * work.images, 0.1 * took)
            expected += answering_seconds(self.inputs.setting, work, steps) + tower_seconds(self.inputs.setting, work)
            if time.perf_counter() > until:
                break
        return measured / expected if expected else 1.0

    def _timed(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def _answer(backend: SharedPrefixBackend, pack: Any, limit: int) -> None:
    """Answer one pack."""
    for _ in backend.answers([pack], limit):
        pass


def probe_plan(run: TrainingRun, plan: Plan, inputs: ForecastInputs, tasks: Sequence[Task]) -> Calibration:
    """Load a base and its adapter for a run that is only planned, and measure a few passes.

    Args:
        run, plan: the run.
        inputs: what its forecast follows from.
        tasks: benchmarks that the run would answer.
    """
    began = time.perf_counter()
    model, _ = tune(load_model(plan.base, run.launch.device), run.recipe, plan.base.name, master=True)
    if inputs.setting.checkpointing:
        checkpoint_layers(model)
    mode = choose_mode(model, plan.data.encoder)
    rows = mode.separate_rows
    planners = (plan.planner.computed_as(rows), plan.eval_planner.computed_as(rows) if plan.eval_planner else None)
    precision = partial(mixed_precision, run.launch.device, plan.base.dtype)
    loading = time.perf_counter() - began + estimate.LOAD_SECONDS
    online = inputs.with_features(False, inputs.images.keep_benchmark_features)
    probe = Probe(run, plan, model, mode, precision, online, *planners)
    return probe.calibrate(tasks, {estimate.LOAD: loading}, inputs)
