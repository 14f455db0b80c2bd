"""Saved adapters: what a folder holds, whether it fits a base, which base it was trained on.

A loader of adapters ignores tensors that have no place in the base, and leaves at zero those that are missing: then the
base answers in the adapter's name. So every name and every shape is compared before anything answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from vlm_sft.common.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT, MANIFEST, RUN, holds_full_model, read_json
from vlm_sft.common.console import warn
from vlm_sft.common.errors import ModelError, RunError
from vlm_sft.common.manifest import folder_problems, read_manifest
from vlm_sft.common.record import bfloat16_flags, loaded_in_bfloat16
from vlm_sft.common.weights import weights_fingerprint
from vlm_sft.model.forward_patch import reason_of
from vlm_sft.model.layout import empty_model
from vlm_sft.model.load import POCKET, Base, resolve_path
from vlm_sft.model.model_folder import require_utf8

BASE_WEIGHTS = "base_weights"  # in a manifest's identity and in export.json: `weights_fingerprint` of the base
_LORA_B = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_B\.weight")
# Settings of PEFT that change the base itself, depend on tokens that our packs do not mark, or import modules by name.
_PLAIN = {
    "bias": "none",
    "megatron_config": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
_INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
_RENAMED = ("model.layers.", "model.language_model.layers.")  # in transformers 4.52


@dataclass(frozen=True, slots=True)
class Contents:
    """What the weights of an adapter are.

    Attributes:
        shapes: of every tensor by its name.
        layers: paths of the layers with LoRA.
        dead: those among them whose update is zero.
        silent: nothing in the adapter differs from its base.
    """

    shapes: dict[str, tuple[int, ...]]
    layers: tuple[str, ...]
    dead: tuple[str, ...]
    silent: bool


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Make sure that a folder holds a saved LoRA adapter that is as it was written.

    Returns:
        Its adapter_config.json.

    Raises:
        ModelError: it does not, a byte differs from its manifest, or the adapter is of a kind that is not opened here.
    """
    require_utf8(folder, "--adapter")
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not config.is_file() or not weights.is_file():
        if holds_full_model(folder):
            raise ModelError(
                f"--adapter {folder}: it holds a whole model (trained with --train all), not an adapter",
                f"pass it as --base_model {folder}, without --adapter",
            )
        pickle = weights.with_suffix(".bin")
        found = f"; {pickle.name} is a pickle, which could run code and is not opened" if pickle.is_file() else ""
        raise ModelError(
            f"--adapter {folder}: no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS} there{found}",
            "pass the output folder of a finished training run, or one of its checkpoint folders",
        )
    _check_undamaged(folder)
    try:
        values = read_json(config)
    except RunError as error:
        raise ModelError(f"--adapter {folder}: {error.what}", error.fix) from error
    _check_kind(folder, values)
    return values


def _check_undamaged(folder: Path) -> None:
    """Compare an adapter with its manifest, where it has one (adapters of other programs have none).

    Raises:
        ModelError: a byte differs.
    """
    if not (folder / MANIFEST).is_file():
        return
    problems = folder_problems(folder, [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
    if problems:
        raise ModelError(
            f"--adapter {folder}: {'; '.join(problems)}",
            f"use one of the run's checkpoints, or write it again by its training with --resume auto; if you changed "
            f"it yourself, delete {MANIFEST}",
        )


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse kinds of adapters that this program does not compute as their makers meant.

    Raises:
        ModelError: with the setting.
    """
    odd = [key for key, plain in _PLAIN.items() if config.get(key, plain) not in (plain, [])]
    problems = [f"{key} is {str(config[key])[:60]!r}" for key in odd]
    if config.get("peft_type") != "LORA":
        problems.append(f"it is of the type {str(config.get('peft_type'))[:60]!r}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(f"init_lora_weights {start[:60]!r} changes the base's own weights")
    if problems:
        raise ModelError(
            f"--adapter {folder} is not a plain LoRA adapter: {'; '.join(problems)}",
            "convert it to LoRA with PEFT, or evaluate it with the program that made it",
        )


def recorded_bf16(folder: Path) -> bool | str:
    """The `bf16` of `find_base` for what a run has trained: on a CPU, what the run loaded its base in.

    Args:
        folder: an adapter, a checkpoint or a fully trained model; without a run's record, or where this processor has
            no bfloat16 of its own, "auto".
    """
    run = folder.parent if folder.name.startswith("checkpoint-") and not (folder / RUN).is_file() else folder
    if torch.cuda.is_available() or not bfloat16_flags() or not (run / RUN).is_file():
        return "auto"
    try:
        return loaded_in_bfloat16(read_json(run / RUN))
    except RunError:
        return "auto"  # a damaged record does not keep whole weights from answering


def base_of_adapter(adapter: Path, base_model: str | None) -> str:
    """Name of the base that an adapter belongs to.

    Args:
        adapter: an adapter folder.
        base_model: the base that the user names; None for the one that the adapter names.

    Raises:
        ModelError: the folder holds no adapter, no base is named, or the named one does not exist.
    """
    config = check_adapter_folder(adapter)
    if base_model:
        return base_model
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"--adapter {adapter} does not say which base it belongs to", "pass --base_model")
    try:
        resolve_path(name)
    except ModelError as error:
        if Path(name).expanduser().exists():
            raise
        raise ModelError(
            f"--adapter {adapter} was trained on {name}, and that folder does not exist here",
            "pass --base_model with the place where that base is now",
        ) from error
    return name


def require_fit(folder: Path, base: Base, allow_other_base: bool | None = False) -> Contents:
    """Make sure that an adapter fits a base and was trained on it, before any weights are loaded.

    Args:
        folder: of the adapter.
        base: what it is to be opened on.
        allow_other_base: warn instead of refusing where the base is not the one that it was trained on; None refuses
            in a command that has no such flag.

    Returns:
        What it holds.

    Raises:
        ModelError: it does not fit, changes nothing, or belongs to another base.
    """
    config = check_adapter_folder(folder)
    contents = read_contents(folder, config)
    where = f"--adapter {folder}"
    known = {field.name for field in fields(LoraConfig)} | {"peft_version"}
    if strange := sorted(key for key, value in config.items() if key not in known and value):
        warn(f"{folder / ADAPTER_CONFIG}: the installed PEFT does not know {', '.join(strange)[:200]}")
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.base_model_name_or_path = None  # PEFT would warn of its new place
        wrapped = get_peft_model(empty_model(base.path), settings)
    except Exception as error:  # what settings from elsewhere raise in PEFT can be anything
        raise misfit(folder, [reason_of(error)], base.name) from error
    if problems := fit_problems(contents, wrapped):
        raise misfit(folder, problems, base.name)
    if contents.silent:
        raise ModelError(
            f"{where} changes nothing: all {len(contents.layers)} of its lora_B matrices are zero",
            "train it, or look for another checkpoint",
        )
    _check_base(folder, config, base, allow_other_base)
    return contents


def read_contents(folder: Path, config: Mapping[str, Any]) -> Contents:
    """Look at every tensor of an adapter.

    Args:
        folder: holds adapter_model.safetensors.
        config: its adapter_config.json.

    Raises:
        ModelError: the file cannot be read, or holds numbers that are not finite.
    """
    shapes, layers, dead, wrong = {}, [], [], []
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                shapes[name] = tuple(value.shape)
                if not torch.isfinite(value).all():
                    wrong.append(name)
                if match := _LORA_B.fullmatch(name):
                    layers.append(match["path"])
                    dead += [] if value.any() else [match["path"]]
    except Exception as error:  # safetensors raises its own error, outside of Python's hierarchy
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}", "train or copy it again") from error
    if wrong:
        raise ModelError(
            f"--adapter {folder}: {len(wrong)} tensors hold numbers that are not finite, e.g. {wrong[0]}",
            "use an earlier checkpoint, or train again with a lower learning rate",
        )
    silent = bool(shapes) and _only_lora(config) and len(dead) == len(layers)
    return Contents(shapes, tuple(layers), tuple(dead), silent)


def adapter_sha256(folder: Path) -> str:
    """SHA-256 over the settings and weights of an adapter."""
    digest = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes())
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def changes_nothing(folder: Path) -> bool:
    """Whether a saved adapter surely answers as its base does: nothing but LoRA, and every lora_B is zero."""
    if not _only_lora(read_json(folder / ADAPTER_CONFIG)):
        return False
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        updates = [name for name in file.keys() if ".lora_B." in name]
        return bool(updates) and not any(file.get_tensor(name).any() for name in updates)


def _only_lora(config: Mapping[str, Any]) -> bool:
    """Whether all that an adapter changes is in its lora_B matrices."""
    return not config.get("modules_to_save") and not config.get("use_dora")


def fit_problems(contents: Contents, wrapped: Any) -> list[str]:
    """Compare the tensors of an adapter with what a wrapped model has places for.

    Args:
        contents: from `read_contents`.
        wrapped: the base's PeftModel, with weights or on the meta device.

    Returns:
        What does not fit, one sentence a kind, with an example; empty when every tensor has its place and every place
        its tensor.
    """
    places = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(value.shape) for name, value in places.items()}
    found = contents.shapes
    lost, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if extra and {name.replace(*_RENAMED) for name in extra} == set(lost):
        old, new = _RENAMED
        return [f"its tensors have the names of transformers before 4.52 ({old}… is now {new}…), e.g. {extra[0]}"]
    problems = []
    if extra:
        problems.append(f"{len(extra)} of its {len(found)} tensors have no place in the base, e.g. {extra[0]}")
    if lost:
        problems.append(f"{len(lost)} of the {len(expected)} tensors that it should have are missing, e.g. {lost[0]}")
    if other:
        problems.append(
            f"{len(other)} tensors have another shape, e.g. {other[0]}: {found[other[0]]} instead of "
            f"{expected[other[0]]}"
        )
    return problems


def require_places(folder: Path, wrapped: PeftModel) -> None:
    """Make sure that what was loaded into a model is all of an adapter and nothing is left over.

    Raises:
        ModelError: it is not.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if problems := fit_problems(read_contents(folder, config), wrapped):
        raise misfit(folder, problems)


def misfit(folder: Path, problems: list[str], base: str = "this base model") -> ModelError:
    """The error of an adapter that does not fit its base."""
    own = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = f" (its {ADAPTER_CONFIG} names {own})" if own else ""
    return ModelError(
        f"--adapter {folder} does not fit {base}: {'; '.join(problems)}. A loader would pass this over without a word",
        f"open it on the base that it was trained on{named}, in the form in which that training saved it",
    )


def _check_base(folder: Path, config: Mapping[str, Any], base: Base, allowed: bool | None) -> None:
    """Compare the base with the one that the adapter records: by its weights where they are known, else by its name.

    Raises:
        ModelError: they differ, and that is not allowed.
    """
    name = str(config.get("base_model_name_or_path") or "")
    recorded, weights = _recorded_weights(folder, name), weights_fingerprint(base.path)
    if recorded and weights:
        same, reason = recorded == weights, "its weights are others"
    else:
        same, reason = not name or _last_part(name) == _last_part(base.name), "its name is another"
    if same:
        return
    what = f"--adapter {folder} was trained on {name or 'another base'}, and {base.name} is not that base: {reason}"
    if not allowed:
        place = f"--base_model {name}" if name and name != base.name else "--base_model with that base"
        other = "" if allowed is None else ", or --allow_other_base to use it on this one"
        raise ModelError(what, f"pass {place}{other}")
    warn(what)


def _recorded_weights(folder: Path, name: str) -> str:
    """The mark of the base's weights that the run or the export wrote down, else of the named base; "" for unknown."""
    places = []
    if (folder / MANIFEST).is_file():
        places.append(read_manifest(folder).get("identity", {}))
    if (folder / EXPORT).is_file():
        places.append(read_json(folder / EXPORT))
    for values in places:
        if isinstance(values.get(BASE_WEIGHTS), str):
            return str(values[BASE_WEIGHTS])
    if not name:
        return ""
    try:
        return weights_fingerprint(resolve_path(name) if name == POCKET or Path(name).is_dir() else name)
    except ModelError:
        return ""


def _last_part(name: str) -> str:
    """What a base is called wherever it lies: the end of a path or a Hub id, also inside the Hub's cache."""
    path = Path(name).expanduser()
    cached = next((part for part in reversed(path.parts) if part.startswith("models--")), "")
    return (cached.rsplit("--", 1)[-1] if cached else path.name).casefold()
