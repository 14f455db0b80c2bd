"""Adapters: find the modules, wrap them, open saved ones, count what is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES

from vlm_sft.common.errors import ModelError, quoted
from vlm_sft.model.cpu.lora_linear import fuse_lora
from vlm_sft.model.dropout import KeyedDropout
from vlm_sft.model.expert_targets import adapted_path, expert_parameters, require_adaptable
from vlm_sft.model.forward_patch import reason_of
from vlm_sft.model.parts import PartLora, linear_paths
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.saved_adapter import check_adapter_folder, misfit, require_places
from vlm_sft.model.vision_features import decoder_of, head_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules that get a LoRA adapter.

    Attributes:
        paths: full paths of modules, and of weights of experts, all inside the language model.
        peft: what PEFT is given: names where they mean nothing else in the model, full paths elsewhere.
        by_name: how many modules each short name matched.
        saved: paths of the modules that are trained in full and saved with the adapter.
        experts: those of `paths` that are weights of experts.
        parts: LoRA on the vision tower and the projector.
    """

    paths: tuple[str, ...]
    peft: list[str] | str
    by_name: dict[str, int]
    saved: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    parts: tuple[PartLora, ...] = ()

    @property
    def everywhere(self) -> set[str]:
        """Full paths of all modules that get LoRA, in whatever part of the model."""
        return {*self.paths, *(path for part in self.parts for path in part.paths)}

    @property
    def for_peft(self) -> list[str] | str:
        """PEFT's `target_modules`: those of the language model as `peft` says, others by their full paths."""
        others = [path for part in self.parts for path in part.paths]
        return [*(self.peft if self.paths else ()), *others] if others else self.peft


def language_model_path(model: VisionLanguageModel) -> str:
    """Path of the language model inside a vision-language model, e.g. "model.language_model".

    Raises:
        ModelError: the model has no separate language model.
    """
    decoder = decoder_of(model)
    for path, module in model.named_modules():
        if module is decoder and path:
            return path
    raise ModelError(f"{type(model).__name__} has no separate language model", "use an image-text-to-text model")


def resolve_targets(model: VisionLanguageModel, names: Sequence[str]) -> Targets:
    """Find the linear modules of the language model that the names mean; names that match none may mean experts.

    Args:
        model: the base model.
        names: short names ("q_proj"), ends of paths ("self_attn.q_proj", "experts.down_proj"), full paths, or
            "all-linear". Where a module of another class has the name and holds one linear module, that one is meant.

    Raises:
        ModelError: a name matches no linear module of the language model; the message says what it matches elsewhere
            (a vision tower is adapted only on request) and which names there are.
    """
    root = language_model_path(model) + "."
    modules = dict(model.named_modules())
    head = head_of(model)  # in some families a part of the language model; it has no adapter anywhere
    inside = {path: carrier for path, carrier in linear_paths(modules, root).items() if modules[path] is not head}
    available = sorted({path.rsplit(".", 1)[-1] for path in inside})
    experts = expert_parameters(model, root)
    if list(names) == [ALL_LINEAR]:
        names = available
    found: dict[str, list[str]] = {}
    problems = []
    for name in names:
        found[name] = [path for path, carrier in inside.items() if _carries(path, name) or _carries(carrier, name)]
        found[name] = found[name] or [path for path in experts if _carries(path, name)]
        if found[name]:
            continue
        elsewhere = [path for path in modules if not path.startswith(root) and path != "lm_head"]
        elsewhere = [path for path in elsewhere if _carries(path, name)]
        place = f"; {len(elsewhere)} modules of that name are outside it, e.g. {elsewhere[0]}" if elsewhere else ""
        problems.append(f"--target_modules: {quoted(name)} matches no linear module of the language model{place}")
    choices = available + sorted({".".join(path.rsplit(".", 2)[-2:]) for path in experts})
    if problems or not names:
        raise ModelError("\n".join(problems) or "--target_modules is empty", f"choose from {', '.join(choices)}")
    paths = tuple(sorted({path for matched in found.values() for path in matched}))
    by_name = {name: len(matched) for name, matched in found.items()}
    adapted = tuple(path for path in paths if path in experts)
    others = [path for path in paths if path not in experts]
    names = [name for name in names if not set(found[name]) <= set(adapted)]
    return Targets(paths, _for_peft(others, names, modules), by_name, experts=adapted)


def _carries(path: str, name: str) -> bool:
    """Whether a path is a name or ends with it, as PEFT sees it."""
    return path == name or path.endswith("." + name)


def _for_peft(paths: Sequence[str], names: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Say in PEFT's terms which modules are meant: they, and no other one of any class anywhere in the model.

    PEFT looks for names in the whole model, and stops at a class that it does not know, so names are used only where
    they mean nothing else; every reader of adapters knows those. Else it is full paths: vLLM and PEFT read them as they
    read names. A pattern would be shorter, but PEFT turns the pattern of a mixture of experts back into bare names.

    Args:
        paths: full paths of the modules that are meant.
        names: what the user calls them.
        modules: paths of all modules.
    """
    named = {path for path in modules if any(_carries(path, name) for name in names)}
    return list(names if named == set(paths) else paths)


def no_targets() -> Targets:
    """No LoRA at all, for an adapter that holds fully trained modules only."""
    return Targets((), DUMMY_TARGET_MODULES, {})


def add_lora(
    model: torch.nn.Module,
    targets: Targets,
    *,
    r: int,
    alpha: int,
    dropout: float,
    seed: int,
    base_name: str,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> PeftModel:
    """Wrap the model with a new LoRA adapter; only the adapter is trainable.

    Args:
        model: the base model.
        targets: from `resolve_targets`.
        r, alpha: rank and scale numerator (Hu et al. 2021: the update is scaled by alpha / r). Parts with a rank of
            their own keep that scale: vLLM knows one scale for all layers of an adapter.
        dropout: probability on the adapter's input, in the language model. Tower and projector have none: its keys
            belong to tokens, and they see patches.
        seed: seeds the initial weights (independent of everything drawn before) and the dropout masks.
        base_name: written into the adapter's config.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023).
        use_dora: train the length of every weight column apart (Liu et al. 2024).

    Raises:
        ModelError: PEFT wrapped other modules than the resolved ones, or cannot wrap one of them.
    """
    require_adaptable(model, targets.experts, dropout, use_dora)
    ranks = {path: part.r for part in targets.parts if part.r != r for path in part.paths}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets.for_peft,
        rank_pattern=ranks,
        alpha_pattern=_same_scale(ranks, r, alpha, use_rslora),
        target_parameters=list(targets.experts) or None,
        modules_to_save=list(targets.saved) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
        bias="none",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, config)
    except Exception as error:  # what a class of layer that PEFT does not know raises can be anything
        raise ModelError(
            f"PEFT cannot wrap the modules of this adapter: {reason_of(error)}", "name other --target_modules"
        ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    check_wrapped(wrapped, targets)
    use_keyed_dropout(wrapped, dropout, seed, {path for part in targets.parts for path in part.paths})
    fuse_lora(wrapped)
    return wrapped


def _same_scale(ranks: Mapping[str, int], r: int, alpha: int, use_rslora: bool) -> dict[str, Any]:
    """The alphas with which modules of other ranks have the scale of those of rank r; whole numbers where they are."""
    alphas = {path: alpha * ((rank / r) ** 0.5 if use_rslora else rank / r) for path, rank in ranks.items()}
    return {path: int(value) if value == int(value) else value for path, value in alphas.items()}


def check_wrapped(wrapped: PeftModel, targets: Targets) -> None:
    """Compare the modules that PEFT wrapped with the resolved ones.

    Raises:
        ModelError: they differ.
    """
    base = wrapped.get_base_model()
    lora = {adapted_path(path, module) for path, module in base.named_modules() if isinstance(module, LoraLayer)}
    saved = {path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for hit, meant in ((lora, targets.everywhere), (saved, set(targets.saved))):
        if hit != meant:
            extra, lost = sorted(hit - meant)[:3], sorted(meant - hit)[:3]
            raise ModelError(
                f"PEFT wrapped {len(hit)} modules, {len(meant)} were meant (unasked: {extra}; left out: {lost})",
                "name the target modules by longer paths",
            )


def use_keyed_dropout(wrapped: PeftModel, dropout: float, seed: int, without: Collection[str] = ()) -> None:
    """Replace the adapter's dropout by one whose masks do not depend on packing or ranks.

    Args:
        wrapped: the model.
        dropout: probability.
        seed: of the run.
        without: paths of modules that get no dropout.
    """
    number = 0
    for path, module in wrapped.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if path in without:
            for name in list(module.lora_dropout):
                module.lora_dropout[name] = torch.nn.Identity()
            continue
        for name in list(module.lora_dropout):
            if dropout > 0:
                module.lora_dropout[name] = KeyedDropout(dropout, seed * 100_003 + number)
            number += 1


def load_adapter(model: torch.nn.Module, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Open a saved adapter on its base; `saved_adapter.require_fit` checks first whether it is the right one.

    Raises:
        ModelError: the folder holds no adapter, or one that is damaged or does not fit the base.
    """
    check_adapter_folder(Path(folder))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, use_safetensors=True)
    except Exception as error:  # what settings from elsewhere raise in PEFT can be anything
        raise misfit(Path(folder), [reason_of(error)]) from error
    require_places(Path(folder), adapted)
    fuse_lora(adapted)
    return adapted


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; partitioned ones (ZeRO-3) are counted whole."""
    sizes = [(_weights_in(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def _weights_in(parameter: torch.nn.Parameter) -> int:
    """How many weights a parameter holds; of 4-bit ones (bitsandbytes) there are two in a byte."""
    if hasattr(parameter, "quant_state"):
        return 2 * parameter.numel() * parameter.element_size()
    return int(getattr(parameter, "ds_numel", parameter.numel()))
