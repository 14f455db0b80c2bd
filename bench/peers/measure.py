"""What one training really does and how long it takes: for programs built on transformers.Trainer, and for ours.

The classes of transformers are wrapped, so nothing of a side's own code has to be trusted: language tokens are counted
where the language model runs, patches where the vision tower runs, supervised tokens in the labels. Our loop is
followed by a callback, as the Trainer is, and by its loader.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from peers.machine import now

PAD_TOKEN = 151_643
IGNORED = -100


@dataclass
class Meter:
    """Times and counts of one training.

    Attributes:
        began: when it was called, in seconds of the performance counter; likewise `training`, when the preparation was
            over.
        loading: seconds in which weights, processor and tokenizer were read from their folders, before the training.
        ends: when each epoch was over.
        waits: seconds in which the training waited for a batch, by epoch.
        counts: what was processed, first in the preparation, then by epoch.
        losses: loss summed over supervised tokens, by epoch; from the micro-batches.
        logged: the logged loss by optimizer step.
        step_tokens: supervised tokens at which the language model's head was called, up to each step.
        trainable: trained parameters.
        total_flops: tells how many FLOPs have been counted so far; None when they are not.
        flops: FLOPs at the end of the preparation and of the training.
    """

    began: float = 0.0
    training: float = 0.0
    loading: float = 0.0
    ends: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=lambda: [0.0])
    counts: list[Counter[str]] = field(default_factory=lambda: [Counter()])
    losses: list[float] = field(default_factory=lambda: [0.0])
    logged: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    trainable: int = 0
    total_flops: Callable[[], int] | None = None
    flops: list[int] = field(default_factory=list)
    _depth: int = 0

    def add(self, **amounts: int) -> None:
        """Count what has been processed just now."""
        self.counts[-1].update(amounts)

    @contextmanager
    def reads_files(self) -> Iterator[None]:
        """Take the seconds of the outermost of nested loadings."""
        self._depth += 1
        began = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and not self.training:
                self.loading += time.perf_counter() - began

    def result(self) -> dict[str, Any]:
        """The measurement, as JSON values; seconds."""
        starts = [self.training, *self.ends]
        epochs = [end - start for start, end in zip(starts, self.ends, strict=False)]
        return {
            "preparation_seconds": round(self.training - self.began - self.loading, 4),
            "loading_seconds": round(self.loading, 4),
            "epoch_seconds": [round(seconds, 4) for seconds in epochs],
            "data_wait_seconds": [round(seconds, 4) for seconds in self.waits[: len(epochs)]],
            "preparation": dict(self.counts[0]),
            "epochs": [dict(counts) for counts in self.counts[1 : len(epochs) + 1]],
            "epoch_loss": self._epoch_losses(len(epochs)),
            "logged_loss": self.logged,
            "trainable_parameters": self.trainable,
            "flops": self.flops,
        }

    def _epoch_losses(self, epochs: int) -> list[float]:
        """Mean loss per supervised token, by epoch."""
        counted = [counts["supervised"] for counts in self.counts[1 : epochs + 1]]
        if any(self.losses):
            return [loss / max(1, tokens) for loss, tokens in zip(self.losses, counted, strict=False)]
        weights = [after - before for before, after in zip([0, *self.step_tokens], self.step_tokens, strict=False)]
        steps = len(self.logged) // max(1, epochs)
        means = []
        for first in range(0, steps * epochs, max(1, steps)):
            part = slice(first, first + steps)
            total = sum(loss * weight for loss, weight in zip(self.logged[part], weights[part], strict=False))
            means.append(total / max(1, sum(weights[part])))
        return means


_active: list[Meter] = []


@contextmanager
def measuring(meter: Meter) -> Iterator[None]:
    """Let a meter see everything that happens inside."""
    _active.append(meter)
    meter.began = now()
    try:
        yield
    finally:
        _active.remove(meter)


def install() -> None:
    """Wrap the classes of transformers, once for a process."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, Trainer
    from transformers.processing_utils import ProcessorMixin

    for owner in (AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, ProcessorMixin):
        _wrap_loading(owner)
    for tower, language, whole in counted_classes():
        _before(tower, _count_vision)
        _before(language, _count_language)
        _before(whole, _count_tokens)
    _around(Trainer, "train", _attach_trainer)
    if find_spec("vlm_sft"):
        from vlm_sft.model.cpu import cross_entropy
        from vlm_sft.train.loop import TrainingLoop

        _before(cross_entropy, _count_rows, "token_losses")  # a head that is no module of its own
        _around(TrainingLoop, "run", _attach_loop)


def counted_classes() -> list[tuple[Any, ...]]:
    """Vision tower, language model and both together, of every family that is measured."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5

    found: list[tuple[Any, ...]] = [
        (qwen2_5.Qwen2_5_VisionTransformerPretrainedModel, qwen2_5.Qwen2_5_VLTextModel, qwen2_5.Qwen2_5_VLModel)
    ]
    if find_spec("transformers.models.qwen3_5"):  # a peer may ask for an older transformers
        from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

        found.append((qwen3_5.Qwen3_5VisionModel, qwen3_5.Qwen3_5TextModel, qwen3_5.Qwen3_5Model))
    from transformers.models.gemma.modeling_gemma import GemmaModel
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaModel
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    return [*found, (SiglipVisionModel, GemmaModel, PaliGemmaModel)]


def _around(owner: Any, name: str, attach: Callable[[Any, Meter], None]) -> None:
    """Let every meter follow what a method of a class is about to train."""
    train = getattr(owner, name)

    @functools.wraps(train)
    def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        for meter in _active:
            attach(trainer, meter)
        return train(trainer, *args, **kwargs)

    setattr(owner, name, measured)


def _wrap_loading(owner: type) -> None:
    """Time a class's from_pretrained."""
    original = owner.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def timed(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not _active:
            return original(cls, *args, **kwargs)
        with _active[-1].reads_files():
            return original(cls, *args, **kwargs)

    owner.from_pretrained = classmethod(timed)  # type: ignore[attr-defined]


def _before(owner: Any, count: Callable[..., None], name: str = "forward") -> None:
    """Call `count` with the meter, the module and the arguments before every forward pass of a class.

    Of another function there is no module.
    """
    original = getattr(owner, name)
    own = int(isinstance(owner, type))

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        for meter in _active:
            count(meter, args[0] if own else None, args[own:], kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _count_vision(meter: Meter, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pixels: Any = kwargs.get("hidden_states", kwargs.get("pixel_values", args[0] if args else None))
    grid: Any = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
    if grid is None:  # whole pictures: B, C, H, W
        images, patches = len(pixels), pixels[:, 0].numel() // module.config.patch_size**2
    else:
        images, patches = len(grid), int(pixels.shape[0])
    meter.add(tower_calls=1, tower_images=images, patches=patches)


def _count_language(meter: Meter, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens: Any = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
    processed = int(tokens.shape[0] * tokens.shape[1])
    meter.add(language_calls=1, language_tokens=processed, padding=_hidden(kwargs) or 0)


def _hidden(kwargs: dict[str, Any]) -> int | None:
    """Tokens that a mask (B, T) hides; None where a call has none of that form."""
    mask: Any = kwargs.get("attention_mask")
    return mask.numel() - int(mask.sum()) if getattr(mask, "ndim", 0) == 2 else None


def _count_tokens(meter: Meter, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is not None:
        hidden = _hidden(kwargs)
        padding = int((ids == PAD_TOKEN).sum()) if hidden is None else hidden
        meter.add(seen_image_tokens=int((ids == module.config.image_token_id).sum()), seen_padding=padding)


def _count_rows(meter: Meter, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count the rows that go through the vocabulary projection."""
    meter.add(head_rows=args[0].shape[:-1].numel())


def _marks(meter: Meter) -> Any:
    """A callback that lets a meter follow a training: its epochs, its steps, its logged losses."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.training = now()
            meter.counts.append(Counter())
            if meter.total_flops is not None:
                meter.flops.append(meter.total_flops())

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            meter.ends.append(now())
            meter.counts.append(Counter())
            meter.waits.append(0.0)
            meter.losses.append(0.0)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if meter.total_flops is not None:
                meter.flops.append(meter.total_flops())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step_tokens.append(sum(counts["head_rows"] for counts in meter.counts[1:]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                meter.logged.append(float(logs["loss"]))

    return Marks()


def _attach_trainer(trainer: Any, meter: Meter) -> None:
    """Let a meter follow a Trainer: its epochs, its waiting, its losses."""
    trainer.add_callback(_marks(meter))
    trainer.get_batch_samples = _timed(trainer.get_batch_samples, meter)
    _watch_loss(trainer, meter)
    _count_model(trainer.model, meter)


def _attach_loop(loop: Any, meter: Meter) -> None:
    """Let a meter follow our loop; what is supervised is counted where it is compared with the answers."""
    loop.callbacks.callbacks.append(_marks(meter))
    loop.loader = _TimedLoader(loop.loader, meter)
    _count_model(loop.model, meter)


class _TimedLoader:
    """A loader whose batches are timed; everything else is the loader's own."""

    def __init__(self, loader: Any, meter: Meter) -> None:
        self._loader, self._meter = loader, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = _timed(iter, self._meter)(self._loader)
        take = _timed(functools.partial(next, batches, None), self._meter)
        return iter(take, None)


def _timed(take: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """Time how long a training waits for what a call gives."""

    @functools.wraps(take)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return take(*args, **kwargs)
        finally:
            meter.waits[-1] += time.perf_counter() - began

    return timed


def _watch_loss(trainer: Any, meter: Meter) -> None:
    """Sum the losses of the micro-batches, token by token, and count what is supervised in them."""
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels, ids = inputs.get("labels"), inputs.get("input_ids")
        supervised = int((labels[..., 1:] != IGNORED).sum()) if labels is not None else 0
        meter.add(supervised=supervised, micro_batches=1)
        if ids is not None:
            meter.add(image_tokens=int((ids == trainer.model.config.image_token_id).sum()))
        found = compute(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        divided_by: Any = kwargs.get("num_items_in_batch")
        by_step = divided_by is not None and getattr(trainer, "model_accepts_loss_kwargs", False)
        meter.losses[-1] += float(loss.detach()) * float(divided_by if by_step else supervised)
        return found

    trainer.compute_loss = watched


def _count_model(model: Any, meter: Meter) -> None:
    """Count the trained parameters, and the rows that go through the head."""
    meter.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_hook(lambda module, _, scores: _count_rows(meter, module, (scores,), {}))
