"""The forecast of a run: time, peak memory and disk with intervals, items and assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vlm_sft.forecast import calibration as calibrated
from vlm_sft.forecast import disk, memory
from vlm_sft.forecast.calibration import MEMORY, PROBE, TABLE, Calibration
from vlm_sft.forecast.inputs import AnsweringWork, ForecastInputs, ImageLoad
from vlm_sft.forecast.setting import RankLayout, Setting
from vlm_sft.forecast.time import (
    answering_seconds,
    forward_seconds,
    image_seconds,
    optimizer_seconds,
    tower_seconds,
    training_seconds,
)

DATA, LOAD, FEATURES = "preparing the data", "loading the model", "vision features"
STEPS, LOSSES, ANSWERS = "training steps", "evaluation losses", "answers during training"
SAVES, FINAL = "checkpoints", "final evaluation"
TRACKERS = "starting trackers"
CACHED_IMAGES = "prepared images"  # on disk, in the cache, where vision features are too
LOAD_SECONDS = 0.3  # of building a model and a trainer, whatever its size
FEATURES_SECONDS = 0.15  # of trying the vision tower, however many images follow
FEATURE_SECONDS = 0.0015  # of reading an image, and of writing its vision features
LOAD_RATE = 8e8  # bytes of weights per second from a disk
ENGINE_SECONDS = 3.5  # of importing and building DeepSpeed's engine
ENGINE_SAVE_SECONDS = 0.3  # of what the engine does for a checkpoint, whatever its size
TRACKER_SECONDS = 1.5  # of importing one tracker and opening its run; what it does over the network comes on top
STEP_SECONDS = 0.004  # of callbacks and logging, per optimizer step
SAVE_SECONDS = 0.06  # of a checkpoint, whatever its size
ADAPTER_SECONDS = 0.1  # of the adapter and the records at the end of the training
SAVE_RATE = 2.5e8  # bytes per second, with checksums
EVALUATION_SECONDS = 1.0  # of building the model again, and the tables
PASS_SECONDS = 0.06  # of one evaluation or benchmark, whatever its size
CPU_SLACK = 1.1  # of memory that the C allocator keeps between what is used
SETTLED_BYTES = (
    96e6  # code of libraries that a training touches first, and holes that the C allocator keeps of earlier stages
)
KERNELS_BYTES = 40e6  # that oneDNN builds and keeps for products in bfloat16
MAPPED = "prepared data"  # files in memory as long as there is room
MEMORY_SPREAD = {TABLE: 1.3, calibrated.PAST: 1.12, PROBE: 1.07}
DISK_SPREAD = 1.02


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
class RunForecast:
    """What a run is expected to take.

    Attributes:
        time_seconds, peak_bytes, disk_bytes: with intervals; memory of one device.
        basis: "table", "probe" or "past runs".
        items: of each of the three by name; they add up to the value.
        peak_disk_bytes: disk at its peak, while a checkpoint is written.
        assumptions: lines for the user.
    """

    time_seconds: Estimate
    peak_bytes: Estimate
    disk_bytes: Estimate
    basis: str
    items: Mapping[str, Mapping[str, float]]
    peak_disk_bytes: float
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
            "fullest_disk_bytes": round(self.peak_disk_bytes),
            "assumptions": list(self.assumptions),
            "actual": None,
        }


def time_items(inputs: ForecastInputs) -> dict[str, float]:
    """Seconds of the parts of a run before any correction."""
    setting, passes, images, ranks = inputs.setting, inputs.passes, inputs.images, inputs.setting.ranks
    trained, tensors = setting.adapter.parameters(setting.model), setting.adapter.tensors(setting.model)
    training = passes.epoch.slowest.times(passes.epochs)
    items = {
        LOAD: LOAD_SECONDS + memory.weight_bytes(setting) / LOAD_RATE + ENGINE_SECONDS * ranks.engine,
        STEPS: training_seconds(setting, training)
        + passes.steps * STEP_SECONDS
        + optimizer_seconds(setting, passes.steps, trained / ranks.shared_optimizer, tensors),
    }
    if inputs.output.trackers:
        items[TRACKERS] = TRACKER_SECONDS * inputs.output.trackers
    if images.to_process.count:
        items[DATA] = images.processing_seconds * images.to_process.count / ranks.count
    if images.keep_features:
        count = images.to_encode.count
        kept = FEATURE_SECONDS * count + (FEATURES_SECONDS if count else 0.0)
        items[FEATURES] = (tower_seconds(setting, images.to_encode.work) + kept) / ranks.count
    items[STEPS] += image_seconds(setting, training, images.keep_features, training=True)
    if passes.evaluation is not None:
        losses = passes.evaluation.slowest.times(passes.evaluations)
        online = image_seconds(setting, losses, images.keep_features)
        items[LOSSES] = forward_seconds(setting, losses) + online + passes.evaluations * PASS_SECONDS
    if passes.validation:
        items[ANSWERS] = _answering_seconds(setting, passes.validation, images.keep_features)
    if inputs.output.saving.steps:
        coming = sum(step > passes.done_steps for step in inputs.output.saving.steps)
        written = disk.checkpoint_bytes(setting, inputs.output.optim) / SAVE_RATE
        items[SAVES] = ADAPTER_SECONDS + coming * (SAVE_SECONDS + ENGINE_SAVE_SECONDS * ranks.engine + written)
    if passes.final:
        parts = final_parts(inputs)
        items[FINAL] = parts.rest + parts.tower + parts.answers
    return items


@dataclass(frozen=True, slots=True)
class FinalParts:
    """Seconds of the final evaluation: loading and processing images, the vision tower, generation."""

    rest: float
    tower: float
    answers: float


def final_parts(inputs: ForecastInputs) -> FinalParts:
    """What the final evaluation consists of, before any correction."""
    setting, images, final = inputs.setting, inputs.images, inputs.passes.final
    ranks, features = setting.ranks.count, images.keep_benchmark_features
    tower = tower_seconds(setting, images.benchmarks.work) / ranks if features else 0.0
    pictures = sum(one.picture_seconds for one in final)
    processing = images.processing_seconds * images.benchmarks.count / ranks
    rest = EVALUATION_SECONDS + memory.weight_bytes(setting) / LOAD_RATE + processing + pictures
    return FinalParts(rest, tower, _answering_seconds(setting, final, features))


def _answering_seconds(setting: Setting, benchmarks: Sequence[AnsweringWork], features: bool) -> float:
    """Seconds of answering benchmarks, each as many times as it is answered, on all ranks together."""
    total = 0.0
    for one in benchmarks:
        answers = answering_seconds(setting, one.work.times(1 / setting.ranks.count), one.steps)
        online = image_seconds(setting, one.work, features) / setting.ranks.count
        total += one.times * (answers + online + PASS_SECONDS)
    return total


def memory_items(inputs: ForecastInputs) -> dict[str, float]:
    """Bytes of one device at its peak, before any correction."""
    epoch = inputs.passes.epoch
    answered = max((one.largest_tokens for one in inputs.passes.answering), default=0.0)
    features, process = inputs.images.keep_features, inputs.process_bytes
    items = memory.peak_items(inputs.setting, epoch.largest, answered, features, process, epoch.rounds)
    if not inputs.setting.rates.gpu:
        items["libraries and allocator"] = SETTLED_BYTES + KERNELS_BYTES * (inputs.setting.value_bytes == 2)
        room = inputs.setting.rates.memory / inputs.setting.ranks.count - sum(items.values())
        items[MAPPED] = min(_mapped_bytes(inputs), max(0.0, room))
    return {name: value for name, value in items.items() if value}


def _mapped_bytes(inputs: ForecastInputs) -> float:
    """Bytes of prepared images and vision features that one process reads; their files are mapped."""
    setting, images = inputs.setting, inputs.images
    seen = images.to_encode if images.keep_features else images.training
    read = seen + images.benchmarks if images.keep_processed else ImageLoad()
    kept = images.training if images.keep_features else ImageLoad()
    kept += images.benchmarks if images.keep_benchmark_features else ImageLoad()
    pixels = disk.pixel_bytes(setting.model, read.visual, read.count)
    return (pixels + memory.feature_bytes(setting, kept.visual)) / setting.ranks.count


def disk_items(inputs: ForecastInputs) -> dict[str, float]:
    """Bytes that a run leaves on disk, and what its peak has besides, before any correction."""
    setting, model, output, images = inputs.setting, inputs.setting.model, inputs.output, inputs.images
    schedule = inputs.passes.schedule
    encoded = images.to_encode if images.keep_features else ImageLoad()
    encoded += images.benchmarks if images.keep_benchmark_features else ImageLoad()
    processed = images.benchmarks + images.to_process if images.keep_processed else ImageLoad()
    evaluations = len(schedule.evaluation_steps())
    items = disk.checkpoint_items(setting, output.optim, output.saving, output.logging_steps) | {
        "adapter and records": disk.adapter_bytes(model, setting.adapter) + disk.RUN_BYTES,
        "logs": disk.log_bytes(schedule.total_steps, output.logging_steps, evaluations, output.tensorboard),
        "predictions": sum(
            one.times * one.text_bytes + disk.RESULTS_BYTES + one.picture_bytes for one in inputs.passes.answering
        ),
        FEATURES: memory.feature_bytes(setting, encoded.visual) + disk.FEATURE_BYTES * encoded.count,
        CACHED_IMAGES: disk.pixel_bytes(model, processed.visual, processed.count),
        "written already": output.written_bytes,
    }
    return {name: value for name, value in items.items() if value}


def forecast_run(inputs: ForecastInputs, calibration: Calibration) -> RunForecast:
    """Forecast a run.

    Args:
        inputs: all that it follows from.
        calibration: what a probe or past runs corrected.
    """
    rates = inputs.setting.rates
    spread = calibration.spread or rates.spread
    slower = 1.0 if calibration.basis == PROBE else rates.unrest  # the probe itself was slowed down
    seconds = {item: value * calibration.factor(item) for item, value in time_items(inputs).items()}
    total = sum(seconds.values())
    bytes_held = _corrected_memory(inputs, calibration)
    peak = sum(bytes_held.values())
    memory_spread = MEMORY_SPREAD[calibration.basis]
    process = bytes_held.get("process", 0.0)
    stored = disk_items(inputs)  # counted, not estimated: nothing that past runs could correct
    extra = stored.pop(disk.ONE_MORE, 0.0)
    kept = sum(stored.values())
    return RunForecast(
        Estimate(total, total / spread, total * spread * slower),
        Estimate(peak, process + (peak - process) / memory_spread, process * 1.05 + (peak - process) * memory_spread),
        Estimate(kept, kept / DISK_SPREAD, kept * DISK_SPREAD),
        calibration.basis,
        {"time_seconds": seconds, "peak_bytes": bytes_held, "disk_bytes": stored},
        kept + extra,
        assumptions(inputs, calibration),
    )


def _corrected_memory(inputs: ForecastInputs, calibration: Calibration) -> dict[str, float]:
    """The items of memory; behind a probe what it measured on the largest pack, and what several ranks change."""
    items = memory_items(inputs)
    if calibration.peak_bytes is not None:
        alone = memory_items(inputs.with_setting(ranks=RankLayout()))  # as the probe computed
        shared = sum(items.values()) - sum(alone.values())
        mapped = {name: value for name, value in items.items() if name == MAPPED}
        shared -= sum(mapped.values()) - alone.get(MAPPED, 0.0)
        return (
            {"measured by the probe": calibration.peak_bytes} | mapped | ({"several ranks": shared} if shared else {})
        )
    slack = 1.0 if inputs.setting.rates.gpu else CPU_SLACK
    factor = calibration.factors.get(MEMORY)
    exact = ("process", MAPPED) if factor is None else ("process",)
    return {name: value * (1.0 if name in exact else factor or slack) for name, value in items.items()}


def assumptions(inputs: ForecastInputs, calibration: Calibration) -> tuple[str, ...]:
    """What the numbers rest on, one line each."""
    setting, rates = inputs.setting, inputs.setting.rates
    kept = "vision features" if setting.adapter.frozen_tower else "inputs of the projector"
    lines = [
        f"{rates.name}: {rates.flops / 1e9:,.0f} GFLOP/s, {rates.bandwidth / 1e9:,.0f} GB/s; {rates.source}",
        f"{kept} are cached: the tower runs once per image"
        if inputs.images.keep_features
        else "the vision tower runs again for every image of every step",
    ]
    if rates.gpu:
        kernels = "counted" if setting.fused else "not installed here: norms and MLPs are counted without it"
        attention = "FlashAttention" if setting.flash_heads else "SDPA (--flash_attn is not used)"
        lines.append(f"liger-kernel is {kernels}; attention by {attention}")
    if rates.unrest > 1:
        lines.append(
            f"other programs held this machine while it was measured (work took {rates.unrest:.1f} times as long): the "
            "forecast is for a free machine, its upper end for one that stays as busy"
        )
    if inputs.output.trackers:
        lines.append("trackers: their start is counted; waiting for a network and uploads at the end are not")
    if setting.ranks.engine and calibration.basis == TABLE:
        lines.append("DeepSpeed's start and what its ranks exchange are rough until a run on this machine is known")
    if inputs.passes.final:
        lines.append("answers are as long as the data's; a base that does not stop takes longer")
    if calibration.note:
        lines.append(calibration.note)
    return tuple(lines)


def history_row(inputs: ForecastInputs, key: Mapping[str, Any], actual: Mapping[str, float]) -> dict[str, Any]:
    """A line for the past runs: the uncorrected forecast beside what it came to.

    Args:
        inputs: the run.
        key: from `history_key`.
        actual: seconds by item, and bytes beyond the process under `MEMORY`.
    """
    held = memory_items(inputs)
    expected = time_items(inputs) | {MEMORY: sum(held.values()) - held.get("process", 0.0)}
    rates = {name: getattr(inputs.setting.rates, name) for name in ("flops", "bandwidth", "launch", "unrest")}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": at, "key": dict(key), "forecast": expected, "actual": dict(actual), "rates": rates}
