"""Numbers gone bad and other events that should not happen: noticed on all ranks alike, recorded."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vlm_sft.common.errors import DataError, DeviceMemoryError, NumericalError
from vlm_sft.data.image_failures import DataFault
from vlm_sft.distributed.collectives import gather, sum_ranks
from vlm_sft.model.step_gradients import StepGradients
from vlm_sft.train.event_log import EventLog

WINDOW = 64  # losses that a new one is held against
WARM_UP = 16  # losses before the first comparison
SPIKE_SCORE = 8.0  # robust standard deviations
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_FLOOR = 0.02  # of the median: losses closer together than this are equal enough
WATCHED_STEPS = 5  # steps without any gradient after which an adapter matrix counts as dead


class SpikeDetector:
    """Tells a loss that lies far above the recent ones, by median and median absolute deviation."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float) -> float:
        """Robust standard deviations of a loss above the recent median, 0.0 while there are too few; then remember it.

        Args:
            loss: mean token loss of a step, in nats; finite.
        """
        found = 0.0
        if len(self._recent) >= WARM_UP:
            middle = statistics.median(self._recent)
            spread = _MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in self._recent)
            found = (loss - middle) / max(spread, _FLOOR * abs(middle), 1e-12)
        self._recent.append(loss)
        return found


class AdapterWatch:
    """Finds adapter matrices that never get a gradient during the first steps.

    B starts at zero, so A has no gradient until B has moved: A is counted from then on only.

    Args:
        parameters: the trained ones, by name.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._waiting = {name: 0 for name in parameters if "lora_" in name}
        self._partners = {name: parameters.get(name.replace("lora_A", "lora_B")) for name in parameters}

    @property
    def active(self) -> bool:
        """False once every matrix is known to move or was reported."""
        return bool(self._waiting)

    def look(self, gradients: Mapping[str, torch.Tensor | None], sums: Callable[..., list[float]]) -> list[str]:
        """Look at the gradients of one step; returns the names of matrices that are dead.

        Args:
            gradients: of this rank, by name of the parameter.
            sums: adds numbers over all ranks.
        """
        dead = []
        names = list(self._waiting)
        found = (gradients[name] for name in names)
        moving = sums(*(float(one is not None and bool(one.any())) for one in found))
        for name, moves in zip(names, moving, strict=True):
            partner = self._partners[name]
            if moves:
                del self._waiting[name]
            elif "lora_A" not in name or partner is None or bool(partner.any()):
                self._waiting[name] += 1
                if self._waiting[name] >= WATCHED_STEPS:
                    dead.append(name)
                    del self._waiting[name]
        return dead


class Health:
    """What the ranks agree on at each step: whether its numbers can be used, and whether the run is to stop.

    Args:
        log: where events go.
        max_bad_steps: steps in a row without usable numbers that end the training.
        stop_requested: tells whether this rank was asked to stop.
        device: of the numbers that are exchanged.
        world_size: number of ranks.

    Attributes:
        stopping: True once the ranks agreed to stop after the present step.
        bad_step: the last step whose numbers were not used; 0 for none.
        last_loss: of the last step whose numbers were used, over all ranks; None before there was one.
        present: which trained parameters had a gradient on any rank in the last vote.
    """

    def __init__(
        self,
        log: EventLog,
        max_bad_steps: int,
        stop_requested: Callable[[], bool],
        device: torch.device,
        world_size: int,
    ) -> None:
        self.log = log
        self.max_bad_steps = max_bad_steps
        self.stopping = False
        self.bad_step = 0
        self.last_loss: float | None = None
        self.present: list[bool] = []
        self._stop_requested = stop_requested
        self._device = device
        self._world_size = world_size
        self._in_a_row = 0
        self._spikes = SpikeDetector()
        self._watch: AdapterWatch | None = None

    def sums(self, *values: float) -> list[float]:
        """Sum numbers over the ranks; every rank must call it with as many."""
        if self._world_size == 1:
            return list(values)
        # float32: some devices know nothing wider, and counts of a step fit.
        total = sum_ranks(torch.tensor(values, dtype=torch.float32, device=self._device))
        return [float(value) for value in total.tolist()]

    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._stop_requested()

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it."""
        self.stopping = self.sums(float(self._stop_requested()))[0] > 0 or self.stopping
        return self.stopping

    def settle(self, step: int, faults: Sequence[DataFault], change: float) -> float:
        """Agree on the data of one step before it is computed, and record what went wrong with it.

        Args:
            step: the step, 1 for the first.
            faults: of this rank.
            change: weighted supervised tokens that this rank has more than planned.

        Returns:
            The same for all ranks together.

        Raises:
            DataError: one rank cannot compute the step.
        """
        found, total = self.sums(float(len(faults)), float(change))
        if not found:
            return total
        everyone = [(rank, fault) for rank, part in enumerate(gather(list(faults))) for fault in part]
        for rank, fault in everyone:
            action = "stop" if fault.fatal else "replaced" if fault.replaced_by else "tried again"
            self.log.write(
                step,
                fault.kind,
                fault.reason,
                fault.sample_ids,
                action=action,
                rank=rank,
                replaced_by=list(fault.replaced_by),
            )
        fatal = next((fault for _, fault in everyone if fault.fatal), None)
        if fatal is not None:
            raise DataError(
                f"step {step}: {fatal.reason} (samples: {', '.join(fatal.sample_ids[:3]) or 'unknown'})",
                "look at it, then continue with --resume auto; --on_bad_sample replace trains another sample instead",
            )
        return total

    def agree(
        self,
        step: int,
        loss: float,
        bad: Mapping[str, Any] | None,
        ids: Sequence[str],
        splits: Sequence[dict[str, Any]] = (),
        too_large: Mapping[str, Any] | None = None,
        present: Sequence[float] = (),
    ) -> bool:
        """Agree on the numbers of one step, before any of them is used.

        Args:
            step: the step, 1 for the first.
            loss: this rank's share of the loss times the number of ranks.
            bad: this rank's event when its loss or gradient is not finite: `detail`, `sample_ids` and more.
            ids: this rank's questions of the step.
            splits: packs of this rank that were cut in two because they did not fit into memory.
            too_large: the pack that does not fit even so.
            present: 1.0 for each trained parameter that has a gradient on this rank, 0.0 for others; `self.present`
                then tells which have one on any rank, without a meeting of its own.

        Returns:
            True when all ranks may use their gradients.

        Raises:
            NumericalError: too many steps in a row cannot be used.
            DeviceMemoryError: a pack of one rank fits in no way.
        """
        asked = float(self._stop_requested())
        share = loss if bad is None else 0.0
        own = (float(bad is not None), asked, float(len(splits)), share)
        wrong, stop, cut, total, *counts = self.sums(*own, *present)
        self.present = [count > 0 for count in counts]
        self.stopping = self.stopping or stop > 0
        if cut:
            self._record_splits(step, splits, too_large)
        if wrong:
            events = gather(dict(bad) if bad else None)
            self._record_bad(step, [(rank, event) for rank, event in enumerate(events) if event])
            return False
        self._in_a_row = 0
        mean = self.last_loss = total / self._world_size
        score = self._spikes.score(mean)
        if score > SPIKE_SCORE:
            everyone = [name for part in gather(list(ids)) for name in part]
            detail = f"the loss jumped to {mean:.4f}, {score:.1f} robust deviations above the last {WINDOW} steps"
            self.log.write(step, "loss_spike", detail, everyone, loss=mean, score=round(score, 2))
        return True

    def vote(self, step: int, gradients: StepGradients) -> bool:
        """Agree on the gradients of one step, and report adapter matrices that get none; as `agree` otherwise.

        Args:
            step: the step, 1 for the first.
            gradients: of this rank.
        """
        loss = float(gradients.loss)
        bad = gradients.problem(loss) if gradients.too_large is None else None
        present = [float(gradient is not None) for gradient in gradients.sums]
        if not self.agree(step, loss, bad, gradients.sample_ids, gradients.splits, gradients.too_large, present):
            return False
        gradients.anywhere = self.present
        if self._watch is None:
            self._watch = AdapterWatch({n: p for n, p in gradients.model.named_parameters() if p.requires_grad})
        for name in self._watch.look(gradients.named(), self.sums) if self._watch.active else ():
            detail = f"{name} had no gradient in {WATCHED_STEPS} steps: it is not trained"
            self.log.write(step, "dead_adapter", detail, parameter=name)
        return True

    def _record_splits(self, step: int, splits: Sequence[dict[str, Any]], too_large: Mapping[str, Any] | None) -> None:
        everyone = gather((list(splits), too_large))
        for rank, (cuts, _) in enumerate(everyone):
            for cut in cuts:
                detail = f"a pack of {cut['tokens']:,} tokens does not fit into memory; it is cut in two"
                self.log.write(
                    step, "out_of_memory", detail, cut["sample_ids"], action="split", rank=rank, tokens=cut["tokens"]
                )
        for rank, (_, lost) in enumerate(everyone):
            if lost is not None:
                raise memory_error(step, rank, lost["tokens"])

    def _record_bad(self, step: int, events: Sequence[tuple[int, dict[str, Any]]]) -> None:
        self.bad_step = step
        self._in_a_row += 1
        for rank, event in events:
            self.log.write(step, "not_finite", action="step skipped", rank=rank, in_a_row=self._in_a_row, **event)
        if self._in_a_row >= self.max_bad_steps:
            _, first = events[0]
            raise NumericalError(
                f"{self._in_a_row} steps in a row, the last of them step {step}, have no finite numbers: "
                f"{first['detail']} (samples: {', '.join(first['sample_ids'][:3])}); see {self.log.path}",
                "look at these samples with vlm-sft data check, lower --learning_rate or --max_grad_norm, or raise "
                "--max_bad_steps; --resume auto continues from the last checkpoint, which is not affected",
            )


def memory_error(step: int, rank: int, tokens: int) -> DeviceMemoryError:
    """What a step ends with that does not fit into the memory of a device.

    Args:
        step: the step, 1 for the first.
        rank: the rank whose device it was.
        tokens: of the pack that did not fit.
    """
    return DeviceMemoryError(
        f"step {step}: a pack of {tokens:,} tokens does not fit into the memory of rank {rank}",
        f"pass --tokens_per_pack {max(256, tokens // 2 // 256 * 256)}, --gradient_checkpointing true or a smaller "
        "--max_pixels, and continue with --resume auto; --tokens_per_pack and checkpointing change no result",
    )
