"""One pack of the 7B: speed, memory and kernels in every mode; kept features; copies; the out-of-memory split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import shapes
from gpu_steps.context import Context, median_seconds, one_pass, patches, relative, timed_passes
from vlm_sft.data.cache.image_tensors import CODES, PixelFormat, compress, feature_record
from vlm_sft.data.collate import PackedBatch
from vlm_sft.model.attention import SHARED_SDPA
from vlm_sft.model.dropout import KeyedDropout
from vlm_sft.model.forward_patch import PLAIN
from vlm_sft.model.gpu.kernels import choose_kernels
from vlm_sft.model.load import attention_of, ready, set_attention
from vlm_sft.model.trainable import checkpoint_layers, tune
from vlm_sft.model.vision_features import encode_images
from vlm_sft.recipe.load import load_recipe

SOME, ALL_LINEAR = (
    ["q_proj", "v_proj", "o_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
DROPOUT = 0.05
# What a kernel is for, by a part of its name; the first that fits.
GROUPS = (
    ("attention", ("flash", "fmha", "attention")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv")),
    ("triton", ("triton", "keyed")),
    ("copies", ("memcpy", "memset", "copy")),
    ("gather and scatter", ("index", "gather", "scatter", "cat")),
    ("softmax", ("softmax",)),
    ("reductions", ("reduce", "norm")),
    ("elementwise", ("elementwise", "vectorized")),
)
SHOWN = 14  # kernels


def modes(context: Context) -> None:
    """The pack under attention functions, dropout, checkpointing and targets; then where the time goes."""
    os.environ[PLAIN] = "1"  # modules as their libraries wrote them
    weights = context.build()
    sizes = shapes.parameter_counts(weights)
    batch = context.pack(weights).to(torch.device(context.device))
    context.note(
        parameters=sizes,
        tokens=batch.tokens,
        questions=len(batch.sample_ids),
        images=len(batch.ends),
        supervised=len(batch.targets),
        patches=patches(batch),
        attention=attention_of(weights),
    )
    plain = _tuned(weights, SOME)
    _measure(context, plain, batch, sizes, f"dropout {DROPOUT}, modules of the libraries", DROPOUT)
    del os.environ[PLAIN]
    model = _tuned(ready(plain.unload(), context.base.function), SOME)
    _measure(context, model, batch, sizes, f"dropout {DROPOUT}, without liger-kernel", DROPOUT)
    _choose(context, model)
    _measure(context, model, batch, sizes, "dropout 0", 0.0)
    _profile(context, "profile", lambda: one_pass(context, model, batch))
    _measure(context, model, batch, sizes, f"dropout {DROPOUT}", DROPOUT)
    checkpoint_layers(model)
    _measure(context, model, batch, sizes, "dropout 0, checkpointing", 0.0)
    model.gradient_checkpointing_disable()
    set_attention(model.get_base_model(), SHARED_SDPA)
    _measure(context, model, batch, sizes, "dropout 0, SDPA", 0.0)
    set_attention(model.get_base_model(), context.base.function)
    weights = model.unload()
    wide = _tuned(weights, ALL_LINEAR)
    _measure(context, wide, batch, sizes, f"dropout {DROPOUT}, all linear layers", DROPOUT)
    _measure(context, wide, batch, sizes, "dropout 0, all linear layers", 0.0)


def features(context: Context) -> None:
    """The pack from kept features, the tower alone, and what copying its images to the device takes."""
    model = _tuned(context.build(), SOME)
    _choose(context, model)
    sizes = shapes.parameter_counts(model.get_base_model())
    apart = context.pack(model)
    device = torch.device(context.device)
    _copies(context, apart)
    images = [{name: value.to(device) for name, value in image.items()} for image in apart.tensors]
    first, usual = median_seconds(lambda: encode_images(model, images), 3)
    context.note(tower_first_seconds=first, tower_seconds=usual, tower_patches=patches(apart))
    kept = [
        feature_record(record, image) for record, image in zip(encode_images(model, images), apart.tensors, strict=True)
    ]
    model.train()
    context.row(mode="pixels", **timed_passes(context, model, apart.to(device), sizes))
    batch = replace(apart, tensors=kept).to(device)
    context.row(mode="kept features", **timed_passes(context, model, batch, sizes))
    _profile(context, "profile", lambda: one_pass(context, model, batch))
    _profile(context, "tower_profile", lambda: encode_images(model, images))


def memory(context: Context) -> None:
    """A pack that does not fit is cut in two, in the forward and in the backward pass, with the same loss."""
    if not context.on_gpu:
        context.note(skipped="the memory of a CPU has no limit that could be set")
        return
    model = _tuned(context.build(), SOME)
    model.train()
    batch = context.pack(model).to(torch.device(context.device))
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = one_pass(context, model, batch)
    loss, peak = float(whole.loss), torch.cuda.max_memory_allocated()
    exact = [gradient.clone() for gradient in whole.sums if gradient is not None]
    del whole
    total = torch.cuda.get_device_properties(0).total_memory
    for share in (0.75, 0.97):  # of what the pass takes: out of memory early, and late
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + share * (peak - held)) / total))
        found = one_pass(context, model, batch)
        torch.cuda.set_per_process_memory_fraction(1.0)
        sums = [gradient for gradient in found.sums if gradient is not None]
        errors = relative(sums, exact) if len(sums) == len(exact) else []
        context.row(
            share=share,
            cut_in_two=bool(found.splits),
            too_large=found.too_large is not None,
            whole_loss=loss,
            loss=float(found.loss),
            largest_gradient_error=max(errors, default=None),
        )
        del found, sums


def _tuned(weights: Any, targets: list[str]) -> Any:
    """A model with a LoRA adapter, in training."""
    changes = {"target_modules": targets, "lora_r": 16, "lora_alpha": 32, "lora_dropout": DROPOUT}
    model, _ = tune(weights, load_recipe(None, changes), "random", master=True)
    model.train()
    return model


def _choose(context: Context, model: Any) -> None:
    """Use and note the kernels that a training would."""
    kernels, notes = choose_kernels(model, torch.device(context.device))
    context.note(kernels=kernels, notes=[*context.values["notes"], *notes])


def _measure(
    context: Context, model: Any, batch: PackedBatch, sizes: dict[str, int], mode: str, dropout: float
) -> None:
    """One row: the pack in one mode."""
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.p = dropout
    try:
        context.row(mode=mode, **timed_passes(context, model, batch, sizes))
    except torch.OutOfMemoryError as error:
        context.row(mode=mode, failed=str(error).splitlines()[0])


def _profile(context: Context, name: str, work: Callable[[], Any]) -> None:
    """Note the seconds of some work by group of kernels, and the kernels that take most."""
    kinds = [ProfilerActivity.CUDA] if context.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as record:
        work()
        if context.on_gpu:
            torch.cuda.synchronize()
    groups: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in record.key_averages():
        seconds = (event.self_device_time_total if context.on_gpu else event.self_cpu_time_total) / 1e6
        group = next((name for name, words in GROUPS if any(word in event.key.lower() for word in words)), "others")
        groups[group] += seconds
        kernels[event.key] += seconds
        calls[event.key] += event.count
    shown = [
        {"kernel": name[:140], "seconds": value, "calls": calls[name]} for name, value in kernels.most_common(SHOWN)
    ]
    context.note(**{name: {"groups": dict(groups.most_common()), "kernels": shown, "calls": calls.total()}})


def _copies(context: Context, batch: PackedBatch) -> None:
    """Seconds of bringing the pixels of a pack to the device: as they are, pinned, and as pinned 8-bit codes."""
    layout = PixelFormat.of(context.base.processor.image_processor)
    pixels = torch.cat([image["pixel_values"] for image in batch.tensors])
    record = compress(pixels, layout)
    ways = {"float32": pixels}
    if context.on_gpu:
        ways["pinned float32"] = pixels.pin_memory()
        if record is not None:
            ways["pinned codes"] = record[CODES].pin_memory()
    took = {}
    for name, value in ways.items():
        seconds = median_seconds(lambda value=value: value.to(context.device, non_blocking=True))[1]
        took[name] = {"seconds": seconds, "bytes": value.numel() * value.element_size()}
    context.note(copies=took)
