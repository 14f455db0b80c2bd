"""Bytes that a run writes: checkpoints, adapter, evaluation, logs, caches.

Tensors are counted exactly; safetensors adds a header of about a hundred bytes for each. Small files of fixed content
are constants, taken from what this version writes; the forecast is held against the bytes on disk after every run.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.forecast.flops import Adapter
from vlm_sft.forecast.optimizer_state import is_in_8_bits, state_bytes
from vlm_sft.forecast.setting import Setting
from vlm_sft.forecast.shapes import ModelShape

HEADER_BYTES = 144  # of one tensor in a safetensors header: its long name, shape, offsets
STATE_HEADER_BYTES = 116  # of one tensor of the optimizer's state
STATE_TENSORS = 3  # of AdamW per trained tensor: two moments and a step
CHECKPOINT_BYTES = 25_500  # random states, scheduler, manifest, card and configuration
RANK_BYTES = 15_300  # random states of one more rank
# DeepSpeed 0.19 adds two programs and, in PyTorch's format, names and shapes: of the model's state, which each rank
# writes under ZeRO-3 and rank 0 alone below, and of the optimizer's state of each rank.
ENGINE_BYTES = 41_100
ENGINE_MODEL_BYTES, ENGINE_MODEL_TENSOR_BYTES = 7_400, {"zero2": 760, "zero3": 980}
ENGINE_STATE_BYTES, ENGINE_STATE_TENSOR_BYTES = 4_300, {"zero2": 60, "zero3": 0}  # the manifest's line too
ENGINE_STATE_VALUES = 3  # of 4 bytes per trained number: itself in float32, and two moments
HISTORY_BYTES = 165  # of one log event in trainer_state.json
LOG_BYTES = 190  # of one log event in metrics.jsonl
EVENT_BYTES = 330  # of one log event in TensorBoard's file
RUN_BYTES = 42_000  # run.json, recipe.json, data.json, the adapter's manifest, README and configuration
EVENTS_BYTES = 6_000  # of TensorBoard's file before the first event
PREDICTION_BYTES = 230  # of a line of predictions.jsonl, without question and answers
RESULTS_BYTES = 33_000  # results.json of a benchmark, base and tuned, and its part of the run's results.json
IMAGE_BYTES = 3_520  # of a prepared image besides its colours: table of colours, header, index
ONE_MORE = "one more while it is written"  # the item of the checkpoint that is not whole yet
FEATURE_BYTES = 270  # of an image's vision features besides themselves: grid, header, index


@dataclass(frozen=True, slots=True)
class Saving:
    """When checkpoints are written and how many are kept.

    Attributes:
        steps: after which steps.
        limit: how many are kept, the best one among them; None for all.
    """

    steps: tuple[int, ...]
    limit: int | None

    @property
    def kept(self) -> int:
        """Checkpoints that are left at the end, at most."""
        return len(self.steps) if self.limit is None else min(len(self.steps), self.limit)

    @property
    def at_once(self) -> int:
        """Checkpoints on disk at the peak: a new one is written before an old one is removed."""
        return min(len(self.steps), self.kept + 1)


def adapter_bytes(model: ModelShape, adapter: Adapter) -> float:
    """Bytes of the saved adapter (or of all weights, where all are trained)."""
    size = 4  # what is trained is held and saved in float32
    return adapter.parameters(model) * size + adapter.tensors(model) * HEADER_BYTES


def optimizer_bytes(model: ModelShape, adapter: Adapter, optim: str, files: int = 1) -> float:
    """Bytes of the saved optimizer state, in one file or in as many as ranks share it out."""
    each = STATE_TENSORS * STATE_HEADER_BYTES
    if is_in_8_bits(model, adapter, optim):  # with two scales and two maps of 256 float32 each
        each = 6 * STATE_HEADER_BYTES + 2 * 1024
    return state_bytes(model, adapter, optim) + each * adapter.tensors(model) * files


def engine_bytes(setting: Setting) -> float:
    """Bytes of DeepSpeed's own state in a checkpoint: trained weights, and one shard of the optimizer per rank.

    A configuration other than ZeRO-2 and ZeRO-3 is counted as ZeRO-2.
    """
    model, adapter, ranks = setting.model, setting.adapter, setting.ranks
    kind = ranks.parallel if ranks.parallel in ENGINE_MODEL_TENSOR_BYTES else "zero2"
    trained, tensors = adapter.parameters(model), adapter.tensors(model)
    states = ENGINE_STATE_VALUES * 4.0 * trained
    states += ranks.count * (ENGINE_STATE_BYTES + ENGINE_STATE_TENSOR_BYTES[kind] * tensors)
    names = ENGINE_MODEL_BYTES + ENGINE_MODEL_TENSOR_BYTES[kind] * tensors
    # Under ZeRO-3 the weights are in the optimizer's shards alone. Below, the engine leaves frozen weights out by name,
    # and a tied head has a second name that it does not find.
    held = trained + (model.text.embedding if model.text.tied and not adapter.everything else 0)
    weights = ranks.count * names if kind == "zero3" else names + held * setting.value_bytes
    return ENGINE_BYTES + states + weights


def checkpoint_bytes(setting: Setting, optim: str) -> float:
    """Bytes of one checkpoint without the history of the log.

    Args:
        setting: what is trained, and by how many ranks.
        optim: as in the recipe; DeepSpeed always keeps AdamW's two moments.
    """
    files = setting.ranks.shared_optimizer
    engine = setting.ranks.engine
    state = engine_bytes(setting) if engine else optimizer_bytes(setting.model, setting.adapter, optim, files)
    ranks = RANK_BYTES * (setting.ranks.count - 1)
    return adapter_bytes(setting.model, setting.adapter) + state + CHECKPOINT_BYTES + ranks


def checkpoint_items(setting: Setting, optim: str, saving: Saving, logging_steps: int) -> dict[str, float]:
    """Bytes of the checkpoints that are left at the end, and of the one more that is there while a new one is written.

    Args:
        setting, optim: as for `checkpoint_bytes`.
        saving: when checkpoints are written.
        logging_steps: as in the recipe.
    """
    one = checkpoint_bytes(setting, optim)
    kept = saving.steps[len(saving.steps) - saving.kept :]
    history = sum(HISTORY_BYTES * (step / logging_steps + 1) for step in kept)
    return {"checkpoints": one * saving.kept + history, ONE_MORE: one * (saving.at_once - saving.kept)}


def log_bytes(steps: int, logging_steps: int, evaluations: int, tensorboard: bool) -> float:
    """Bytes of metrics.jsonl and TensorBoard's events."""
    events = steps / logging_steps + 1 + evaluations + 1
    return events * (LOG_BYTES + EVENT_BYTES * tensorboard) + EVENTS_BYTES * tensorboard


def pixel_bytes(model: ModelShape, visual: float, images: float) -> float:
    """Bytes of prepared images: one byte per colour value, each frame of a patch once."""
    vision = model.vision
    frames = 2 if model.kind.startswith("qwen") else 1
    return visual * vision.patches_per_token * vision.patch_values / frames + IMAGE_BYTES * images
