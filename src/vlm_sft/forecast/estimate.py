"""The forecast of a run: time, peak memory and disk with intervals, items and assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from vlm_sft.forecast import calibration as calibrated
from vlm_sft.forecast import disk, memory
from vlm_sft.forecast.calibration import MEMORY, PROBE, TABLE, Calibration
from vlm_sft.forecast.flops import EpochWork, Work, tower_flops, training_flops
from vlm_sft.forecast.memory import Ranks
from vlm_sft.forecast.time import (
    Setting,
    answering_seconds,
    forward_seconds,
    optimizer_seconds,
    tower_seconds,
    training_seconds,
)
from vlm_sft.recipe.validation import Schedule

DATA, LOAD, FEATURES = "preparing the data", "loading the model", "vision features"
STEPS, LOSSES, ANSWERS = "training steps", "evaluation losses", "answers during training"
SAVES, FINAL = "checkpoints", "final evaluation"
TRACKERS = "starting trackers"
LOAD_SECONDS = 1.3  # of building a model and a trainer, whatever its size
LOAD_RATE = 8e8  # bytes of weights per second from a disk
ENGINE_SECONDS = 3.5  # of importing and building DeepSpeed's engine
ENGINE_SAVE_SECONDS = 0.3  # of what the engine does for a checkpoint, whatever its size
TRACKER_SECONDS = 1.5  # of importing one tracker and opening its run; what it does over the network comes on top
STEP_SECONDS = 0.004  # of callbacks and logging, an optimizer step
SAVE_SECONDS = 0.06  # of a checkpoint, whatever its size
ADAPTER_SECONDS = 0.4  # of the adapter and the records at the end of the training
SAVE_RATE = 2.5e8  # bytes per second, with checksums
EVALUATION_SECONDS = 1.0  # of building the model again, and the tables
PASS_SECONDS = 0.06  # of an evaluation or a benchmark, whatever its size
CPU_SLACK = 1.08  # of memory that the C allocator keeps
MEMORY_SPREAD = {TABLE: 1.3, calibrated.PAST: 1.12, PROBE: 1.07}
DISK_SPREAD = 1.02


@dataclass(frozen=True, slots=True)
class Asked:
    """Benchmark questions that are answered by generation.

    Attributes:
        name: of the benchmark.
        work: of their prompts.
        tokens: steps of generation, summed over the packs of the slowest rank.
        largest: tokens of the largest pack, answers included.
        text_bytes: of questions and answers, as predictions.jsonl holds them.
        times: how often they are answered.
        picture_bytes, picture_seconds: of the pictures that are saved for the report.
    """

    name: str
    work: Work
    tokens: float
    largest: float
    text_bytes: float
    times: int
    picture_bytes: float = 0.0
    picture_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Images:
    """Images that are still to be prepared.

    Attributes:
        count: images.
        visual, visual_squares: their visual tokens, and the sum of the squares.
    """

    count: int = 0
    visual: float = 0.0
    visual_squares: float = 0.0

    def __add__(self, other: Images) -> Images:
        squares = self.visual_squares + other.visual_squares
        return Images(self.count + other.count, self.visual + other.visual, squares)

    @property
    def work(self) -> Work:
        """As work of the vision tower, a call an image."""
        return Work(packs=self.count, images=self.count, visual=self.visual, visual_squares=self.visual_squares)


@dataclass(frozen=True)
class Case:
    """All that a forecast follows from.

    Attributes:
        setting: model, adapter and device.
        ranks: how the run is spread out.
        schedule: its steps.
        epoch: the work of one epoch.
        evaluation: that of one evaluation loss; None for none.
        validation: what is answered at each evaluation.
        final: what the final evaluation answers.
        saving: when checkpoints are written.
        optim, logging_steps, tensorboard: as in the recipe.
        trackers: how many of them are started, besides TensorBoard, which is open at once.
        features: whether vision features are kept in training; final_features: in the final evaluation.
        new_images: to be processed before the training; new_features: to be computed; new_final: of the benchmarks.
        prepared: whether processed images are kept on disk.
        image_seconds: of processing one image; 0 where that is over.
        process_bytes: memory of the process before the model is loaded, on a CPU.
        written_bytes: what the run has added to disk already.
        done_steps: of a resumed run.
        longest: tokens of the longest question with its image: no pack can be smaller.
    """

    setting: Setting
    ranks: Ranks
    schedule: Schedule
    epoch: EpochWork
    evaluation: EpochWork | None
    validation: tuple[Asked, ...]
    final: tuple[Asked, ...]
    saving: disk.Saving
    optim: str
    logging_steps: int
    tensorboard: bool
    features: bool
    final_features: bool = False
    new_images: Images = Images()
    new_features: Images = Images()
    new_final: Images = Images()
    prepared: bool = True
    image_seconds: float = 0.0
    process_bytes: float = 0.0
    written_bytes: float = 0.0
    done_steps: int = 0
    longest: int = 0
    trackers: int = 0

    @property
    def epochs(self) -> float:
        """Passes over the data that are still to come."""
        return (self.schedule.total_steps - self.done_steps) / self.schedule.steps_per_epoch

    @property
    def evaluations(self) -> int:
        """Evaluations that are still to come."""
        return sum(step > self.done_steps for step in self.schedule.evaluation_steps())

    @property
    def flops(self) -> float:
        """Operations of the training steps, on all devices, the vision tower included."""
        setting, work = self.setting, self.epoch.total.times(self.epochs)
        language = training_flops(setting.model, work, setting.adapter, setting.checkpointing)
        seen = self.new_features.work if self.features else work
        return language + tower_flops(setting.model, seen.visual, seen.visual_squares)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with the interval that should hold 90 % of the outcomes."""

    value: float
    low: float
    high: float

    def to_dict(self, whole: bool) -> dict[str, float]:
        """JSON values; whole numbers for bytes."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: round(number) if whole else round(number, 3) for name, number in numbers.items()}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        time_seconds, peak_bytes, disk_bytes: with intervals; memory of one device.
        basis: "table", "probe" or "past runs".
        items: of each of the three by name; they add up to the value.
        fullest_bytes: disk in the fullest moment.
        assumptions: lines for the user.
    """

    time_seconds: Estimate
    peak_bytes: Estimate
    disk_bytes: Estimate
    basis: str
    items: Mapping[str, Mapping[str, float]]
    fullest_bytes: float
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What run.json says under "forecast", without the outcome."""
        return {
            "time_seconds": self.time_seconds.to_dict(False),
            "peak_bytes": self.peak_bytes.to_dict(True),
            "disk_bytes": self.disk_bytes.to_dict(True),
            "basis": self.basis,
            "items": {
                name: {item: round(value, 3 if name == "time_seconds" else None) for item, value in items.items()}
                for name, items in self.items.items()
            },
            "fullest_disk_bytes": round(self.fullest_bytes),
            "assumptions": list(self.assumptions),
            "actual": None,
        }


def time_items(case: Case) -> dict[str, float]:
    """Seconds of the parts of a run before any correction."""
    setting = case.setting
    weights = memory.weight_bytes(setting) / LOAD_RATE
    evaluations = case.evaluations
    steps = case.schedule.total_steps - case.done_steps
    trained, tensors = setting.adapter.parameters(setting.model), setting.adapter.tensors(setting.model)
    training = case.epoch.slowest.times(case.epochs)
    items = {
        LOAD: LOAD_SECONDS + weights + ENGINE_SECONDS * case.ranks.engine,
        STEPS: training_seconds(setting, training)
        + steps * STEP_SECONDS
        + optimizer_seconds(setting, steps, trained / case.ranks.shared_optimizer, tensors),
    }
    if case.trackers:
        items[TRACKERS] = TRACKER_SECONDS * case.trackers
    if case.new_images.count:
        items[DATA] = case.image_seconds * case.new_images.count / case.ranks.count
    if case.features:
        items[FEATURES] = tower_seconds(setting, case.new_features.work) / case.ranks.count
    else:
        items[STEPS] += tower_seconds(setting, training, training=True)
    if case.evaluation is not None:
        losses = case.evaluation.slowest.times(evaluations)
        online = 0.0 if case.features else tower_seconds(setting, losses)
        items[LOSSES] = forward_seconds(setting, losses) + online + evaluations * PASS_SECONDS
    if case.validation:
        items[ANSWERS] = sum(_asked_seconds(case, asked, case.features) for asked in case.validation)
    if case.saving.steps:
        coming = sum(step > case.done_steps for step in case.saving.steps)
        ranks = case.ranks
        one = disk.checkpoint_bytes(
            setting.model, setting.adapter, case.optim, ranks.parallel, ranks.count, setting.value_bytes
        )
        fixed = SAVE_SECONDS + ENGINE_SAVE_SECONDS * ranks.engine
        items[SAVES] = ADAPTER_SECONDS + coming * (fixed + one / SAVE_RATE)
    if case.final:
        parts = final_parts(case)
        items[FINAL] = parts.rest + parts.tower + parts.answers
    return items


@dataclass(frozen=True, slots=True)
class FinalParts:
    """Seconds of the final evaluation: loading and processing images, the vision tower, generation."""

    rest: float
    tower: float
    answers: float


def final_parts(case: Case) -> FinalParts:
    """What the final evaluation consists of, before any correction."""
    features = case.final_features
    tower = tower_seconds(case.setting, case.new_final.work) / case.ranks.count if features else 0.0
    answers = sum(_asked_seconds(case, asked, features) for asked in case.final)
    weights = memory.weight_bytes(case.setting) / LOAD_RATE
    pictures = sum(asked.picture_seconds for asked in case.final)
    rest = EVALUATION_SECONDS + weights + case.image_seconds * case.new_final.count / case.ranks.count + pictures
    return FinalParts(rest, tower, answers)


def _asked_seconds(case: Case, asked: Asked, features: bool) -> float:
    """Seconds of answering one benchmark as often as it is asked, on all ranks together."""
    answering = answering_seconds(case.setting, asked.work.times(1 / case.ranks.count), asked.tokens)
    online = 0.0 if features else tower_seconds(case.setting, asked.work) / case.ranks.count
    return asked.times * (answering + online + PASS_SECONDS)


def memory_items(case: Case) -> dict[str, float]:
    """Bytes of one device in its largest moment before any correction."""
    asked = [one.largest for one in (*case.validation, *case.final)]
    items = memory.peak_items(
        case.setting,
        case.ranks,
        case.epoch.largest,
        max(asked, default=0.0),
        case.features,
        case.process_bytes,
        case.epoch.rounds,
    )
    return {name: value for name, value in items.items() if value}


def disk_items(case: Case) -> dict[str, float]:
    """Bytes that a run leaves on disk, and what its fullest moment has besides, before any correction."""
    setting, model = case.setting, case.setting.model
    schedule = case.schedule
    items = disk.checkpoint_items(
        model,
        setting.adapter,
        case.optim,
        case.saving,
        case.logging_steps,
        parallel=case.ranks.parallel,
        world_size=case.ranks.count,
        value_bytes=setting.value_bytes,
    )
    evaluations = len(schedule.evaluation_steps())
    items["adapter and records"] = disk.adapter_bytes(model, setting.adapter) + disk.RUN_BYTES
    items["logs"] = disk.log_bytes(schedule.total_steps, case.logging_steps, evaluations, case.tensorboard)
    items["predictions"] = sum(
        one.times * one.text_bytes + disk.RESULTS_BYTES + one.picture_bytes for one in (*case.validation, *case.final)
    )
    featured = case.new_features if case.features else Images()
    featured += case.new_final if case.final_features else Images()
    items["vision features"] = memory.feature_bytes(setting, featured.visual) + disk.FEATURE_BYTES * featured.count
    pictured = case.new_final + case.new_images
    items["prepared images"] = disk.pixel_bytes(model, pictured.visual, pictured.count) if case.prepared else 0.0
    items["written already"] = case.written_bytes
    return {name: value for name, value in items.items() if value}


ONE_MORE = "one more while it is written"
CACHED = ("vision features", "prepared images")  # items of the disk that are written to the cache


def forecast(case: Case, calibration: Calibration) -> Forecast:
    """Forecast a run.

    Args:
        case: all that it follows from.
        calibration: what a probe or past runs corrected.
    """
    rates = case.setting.rates
    spread = calibration.spread or rates.spread
    slower = 1.0 if calibration.basis == PROBE else rates.unrest  # a probe has felt it itself
    seconds = {item: value * calibration.factor(item) for item, value in time_items(case).items()}
    total = sum(seconds.values())
    bytes_held = _corrected_memory(case, calibration)
    peak = sum(bytes_held.values())
    memory_spread = MEMORY_SPREAD[calibration.basis]
    process = bytes_held.get("process", 0.0)
    stored = disk_items(case)  # counted, not estimated: nothing that past runs could correct
    extra = stored.pop(ONE_MORE, 0.0)
    kept = sum(stored.values())
    return Forecast(
        Estimate(total, total / spread, total * spread * slower),
        Estimate(peak, process + (peak - process) / memory_spread, process * 1.05 + (peak - process) * memory_spread),
        Estimate(kept, kept / DISK_SPREAD, kept * DISK_SPREAD),
        calibration.basis,
        {"time_seconds": seconds, "peak_bytes": bytes_held, "disk_bytes": stored},
        kept + extra,
        assumptions(case, calibration),
    )


def _corrected_memory(case: Case, calibration: Calibration) -> dict[str, float]:
    """The items of memory; where a probe has measured the largest pack, what it saw and what several ranks change."""
    items = memory_items(case)
    if calibration.peak_bytes is not None:
        alone = memory_items(replace(case, ranks=Ranks()))  # as the probe computed
        shared = sum(items.values()) - sum(alone.values())
        measured = {"measured by the probe": calibration.peak_bytes}
        return measured | ({"several ranks": shared} if shared else {})
    process = {name: value for name, value in items.items() if name == "process"}
    slack = 1.0 if case.setting.rates.gpu else CPU_SLACK
    factor = calibration.factors.get(MEMORY, slack)
    return process | {name: value * factor for name, value in items.items() if name != "process"}


def assumptions(case: Case, calibration: Calibration) -> tuple[str, ...]:
    """What the numbers rest on, one line each."""
    rates = case.setting.rates
    lines = [
        f"{rates.name}: {rates.flops / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s; {rates.source}",
        "vision features are kept and the tower runs once an image"
        if case.features
        else "the vision tower runs again for every image of every step",
    ]
    if rates.gpu:
        kernels = "counted" if case.setting.fused else "not installed here: norms and MLPs are counted without it"
        attention = "FlashAttention" if case.setting.flash_heads else "SDPA (--flash_attn is not used)"
        lines.append(f"liger-kernel is {kernels}; attention by {attention}")
    if rates.unrest > 1:
        lines.append(
            f"other programs held this machine while it was measured (work took {rates.unrest:.1f} times as long): the "
            "forecast is for a free one, and its upper end for one that stays like this"
        )
    if case.trackers:
        lines.append("trackers: their start is counted; waiting for a network and uploads at the end are not")
    if case.ranks.engine and calibration.basis == TABLE:
        lines.append("DeepSpeed's start and what its ranks exchange are rough until a run on this machine is known")
    if case.final:
        lines.append("answers are as long as the data's; a base that does not stop takes longer")
    if calibration.note:
        lines.append(calibration.note)
    return tuple(lines)


def history_row(case: Case, key: Mapping[str, Any], actual: Mapping[str, float]) -> dict[str, Any]:
    """A line for the past runs: the uncorrected forecast beside what it came to.

    Args:
        case: the run.
        key: from `history_key`.
        actual: seconds by item, and bytes beyond the process under `MEMORY`.
    """
    held = memory_items(case)
    said = time_items(case) | {MEMORY: sum(held.values()) - held.get("process", 0.0)}
    rates = {name: getattr(case.setting.rates, name) for name in ("flops", "bandwidth", "launch", "unrest")}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": at, "key": dict(key), "forecast": said, "actual": dict(actual), "rates": rates}
