"""The identity of a checkpoint: recipe, data, base model and prompt; and what has changed since."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_sft.common.errors import RunError, quoted
from vlm_sft.common.manifest import read_manifest
from vlm_sft.common.weights import model_folder, weights_fingerprint
from vlm_sft.data.dataset import PreparedData
from vlm_sft.data.prompt import PROMPT_KEYS
from vlm_sft.distributed.launch import Launch
from vlm_sft.model.load import Base
from vlm_sft.model.saved_adapter import BASE_WEIGHTS, adapter_sha256
from vlm_sft.recipe.schedule import effective_global_batch_size
from vlm_sft.recipe.schema import Recipe

# Keys that decide where and when something is computed or written, and not what: a resumed run may change them. The
# size of the global batch is compared as the number that they come to.
FREE_KEYS = frozenset(
    {
        "dataloader_num_workers",
        "report_to",
        "save_total_limit",
        "save_strategy",
        "save_steps",
        "logging_steps",
        "tokens_per_pack",
        "gradient_checkpointing",
        "early_stopping_patience",
        "early_stopping_threshold",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
    }
)
METRICS = "metrics"  # the user's functions that score answers: name -> SHA-256 of its source
MIXED_LOSS = "eval_loss_is_mixed"  # whether several data sets make up eval_loss, each by its share of the training
_SETTINGS_FILES = (".json", ".jinja", ".txt", ".model")


def recipe_identity(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The part of the identity that is known before anything is loaded."""
    values = json.loads(json.dumps(recipe.to_dict()))
    kept = {key: value for key, value in values.items() if key not in FREE_KEYS}
    return kept | {"effective global batch size": effective_global_batch_size(recipe, world_size)}


def run_identity(
    recipe: Recipe,
    launch: Launch,
    base: Base,
    data: PreparedData,
    evaluation: PreparedData | None,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """All that a training depends on, as JSON values for a manifest; `adapter` is what it began with."""
    values = recipe_identity(recipe, launch.world_size)
    text = json.dumps(values, sort_keys=True)
    prompt = base.prompt.to_dict()
    return {
        "recipe": values,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "base_model": base.name,
        "base_settings_sha256": settings_sha256(base.path),
        BASE_WEIGHTS: weights_fingerprint(base.path),
        "dtype": base.dtype_name,
        "prompt": {key: prompt[key] for key in PROMPT_KEYS},
        "data_sha256": data_sha256(data),
        "evaluation_data_sha256": data_sha256(evaluation, scored=True) if evaluation is not None else None,
        MIXED_LOSS: evaluation is not None and len(set(evaluation.datasets())) > 1,
        "adapter_sha256": adapter_sha256(adapter) if adapter is not None else None,
    }


def data_sha256(data: PreparedData, scored: bool = False) -> str:
    """SHA-256 over every image's bytes (by their own hashes) and every question and answer, in order.

    Args:
        data: the questions.
        scored: answers are scored against them too: all accepted ones count.
    """
    digest = hashlib.sha256()
    for sample, _, _ in data.samples():
        turns = [(turn.role, turn.text) for turn in sample.history]
        row: list[Any] = [sample.image_key, sample.system, turns, sample.question, sample.target]
        row += [] if scored or sample.weight == 1 else [sample.weight]
        row += filter(None, (sample.places, sample.boxes))
        digest.update(json.dumps([*row, *sample.answers] if scored else row).encode() + b"\n")
    return digest.hexdigest()


def settings_sha256(path: str) -> str:
    """SHA-256 over a base's files besides its weights: configuration, tokenizer, templates.

    Args:
        path: a folder, or a Hub id whose files are in the local cache.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(model_folder(path) or path).iterdir()):
        if file.suffix in _SETTINGS_FILES:
            digest.update(os.fsencode(file.name) + f" {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def refuse_changes(checkpoint: Path | None, now: Mapping[str, Any], allowed: bool) -> list[str]:
    """Compare a run with the checkpoint that it goes on from.

    Args:
        checkpoint: the folder; None compares nothing.
        now: the identity of this run, or the part of it that is known so far.
        allowed: whether differences are let through.

    Returns:
        The differences, one sentence each.

    Raises:
        RunError: there are some and they are not allowed.
    """
    if checkpoint is None:
        return []
    saved = read_manifest(checkpoint).get("identity", {})
    found = differences(saved, now)
    if found and not allowed:
        listed = "".join(f"\n  - {line}" for line in found)
        raise RunError(
            f"{checkpoint} belongs to another training:{listed}",
            "give the same flags and data, start over in another --output_dir, or pass --allow_changes to "
            "continue with the new values",
        )
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one sentence each; keys that either lacks are not compared."""
    found = []
    for part in ("recipe", "prompt"):
        old, new = saved.get(part, {}), now.get(part)
        if new is None:
            continue
        if part == "recipe" and old:  # a key that is newer than the checkpoint had what is its default
            old = {key: value for key, value in _defaults().items() if key in new} | old
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{part}: {key} was {quoted(old.get(key), 300)} and is {quoted(new.get(key), 300)}")
    # Checkpoints of earlier versions recorded the weights only.
    recorded = [key for key in (BASE_WEIGHTS, "base_settings_sha256") if key in saved]
    if any(_changed(saved, now, key) for key in recorded):
        found.append(f"base model: its files differ (was {saved.get('base_model')}, is {now['base_model']})")
    if _changed(saved, now, "dtype"):
        found.append(f"precision: was {saved.get('dtype')} and is {now['dtype']}")
    if _changed(saved, now, "adapter_sha256"):
        found.append("--adapter: it is another one than the training began with")
    found += _other_sources(saved.get(METRICS, {}), now.get(METRICS, {}))
    if now.get(MIXED_LOSS) and MIXED_LOSS not in saved:
        found.append(
            "eval_loss: it was the mean over all evaluation questions, and is the mean of the data sets in the "
            "proportions of the training: values before and after cannot be compared"
        )
    for key, what in (("data_sha256", "training data"), ("evaluation_data_sha256", "evaluation data")):
        if _changed(saved, now, key):
            found.append(f"{what}: images, questions, answers or their order differ")
    return found


def _other_sources(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The user's metrics whose source has changed."""
    changed = [name for name, source in now.items() if saved.get(name, source) != source]
    return [f"--metric {name}: its source is another one" for name in changed]


def _defaults() -> dict[str, Any]:
    """The default of every key, as JSON holds it."""
    values: dict[str, Any] = json.loads(json.dumps(Recipe().to_dict()))
    return values


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Whether a part differs; one that an older version of this package did not write is not compared."""
    return key in now and key in saved and saved[key] != now[key]


def check_ranks(checkpoint: Path | None, launch: Launch) -> None:
    """State that is divided (DeepSpeed, FSDP) fits only the launch that wrote it; other state any number of processes.

    Raises:
        RunError: the checkpoint is of another kind of launch.
    """
    if checkpoint is None:
        return
    manifest = read_manifest(checkpoint)
    kind, size = manifest.get("parallel", "single"), manifest.get("world_size", 1)
    plain = ("single", "ddp")
    if kind in plain and launch.parallel in plain or (kind, size) == (launch.parallel, launch.world_size):
        return
    raise RunError(
        f"{checkpoint} was written by {size} process(es) with {kind}, and this is {launch.world_size} with "
        f"{launch.parallel}",
        f"launch {size} process(es) with {kind}, or evaluate its adapter: vlm-sft eval --base_model BASE --adapter "
        f"{checkpoint} --benchmark SETS --output_dir DIR",
    )
