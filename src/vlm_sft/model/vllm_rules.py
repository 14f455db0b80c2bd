"""Whether vLLM loads an adapter that fits its base, or a base on several GPUs, by vLLM's own rules.

vLLM silently ignores tensors that it finds no layer for, and the adapter then does less than it should, or nothing
(vLLM issue 34186).

vLLM's rules, from its `lora` package and the `hf_to_vllm_mapper` of its models: names are
`base_model.model.<path>.lora_A.weight` and `lora_B`, the path is that of transformers since 4.52
(`model.language_model.…` in the Qwen-VL, LLaVA and Gemma families, `model.text_model.…` in Idefics3), and neither DoRA
nor fully trained modules are taken. LoRA on tower and projector is loaded with `enable_tower_connector_lora` (vLLM
pull requests 26674 and 35147), by those of its models that declare so; others pass it over with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_sft.model.adapters import language_model_path
from vlm_sft.model.protocols import VisionLanguageModel
from vlm_sft.model.vision_features import inner_model, tower_modules

_ROOTS = ("model.language_model", "model.text_model")  # language models that vLLM's mappers know
TOWER = "enable_tower_connector_lora"  # setting of vLLM, and with dashes its flag
TOWER_NOTE = (
    f"it has LoRA on the vision tower or projector, which vLLM serves with --{TOWER.replace('_', '-')}, for those of "
    "its models that declare it; for others vLLM says in a warning that it leaves these layers out"
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank takes


def not_for_vllm(config: Mapping[str, Any], layers: Sequence[str], model: VisionLanguageModel) -> tuple[str, ...]:
    """Why vLLM would refuse an adapter or ignore a part of it, one sentence each; () where it loads all of it.

    Args:
        config: its adapter_config.json.
        layers: paths of its layers with LoRA.
        model: the base's architecture.
    """
    saved = list(config.get("modules_to_save") or ())
    problems = []
    if saved:
        problems.append(f"vLLM loads no fully trained modules ({len(saved)}, e.g. {saved[0]})")
    if config.get("target_parameters"):
        problems.append("how vLLM reads adapters of experts' weights is not known here")
    if config.get("use_dora"):
        problems.append("vLLM has no DoRA")
    if _scales_differ(config):
        problems.append("vLLM scales the updates of all layers alike, and here ranks or alphas of some layers differ")
    if max_lora_rank(config) is None:
        problems.append(f"rank {_rank(config)} is above vLLM's largest, {RANKS[-1]}")
    root = language_model_path(model)
    if root not in _ROOTS:
        problems.append(f"vLLM's names for the language model {root} are not known here")
    known = (root, *_towers(model))
    outside = sorted(path for path in layers if not any(path.startswith(f"{place}.") for place in known))
    if outside:
        problems.append(
            f"vLLM adapts language model, tower and projector only, not {len(outside)} layers such as {outside[0]}"
        )
    return tuple(problems)


def lora_settings(config: Mapping[str, Any], layers: Sequence[str], model: VisionLanguageModel) -> dict[str, Any]:
    """What vLLM has to be told besides `enable_lora` to load all of an adapter that it loads.

    Args:
        config, layers, model: as for `not_for_vllm`.

    Returns:
        "max_lora_rank", and "enable_tower_connector_lora" where the adapter is not on the language model alone.
    """
    towers = tuple(f"{place}." for place in _towers(model))
    tower = {TOWER: True} if any(path.startswith(towers) for path in layers) else {}
    return {"max_lora_rank": max_lora_rank(config), **tower}


def _towers(model: VisionLanguageModel) -> list[str]:
    """Paths of tower and projector."""
    inner = next(path for path, module in model.named_modules() if module is inner_model(model))
    return [f"{inner}.{name}".removeprefix(".") for name in tower_modules(model)]


def splitting_problem(gpus: int, config: Any) -> str | None:
    """Why vLLM cannot split a model over so many GPUs (tensor parallelism); None where it can.

    Each GPU computes as many heads of queries as the others. Heads of keys are split in the same way, or, where there
    are fewer of them than GPUs, each one is kept by equally many GPUs.

    Args:
        gpus: at least 1.
        config: of the model, as transformers opens it.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % gpus:
        return f"its {heads} attention heads cannot be shared out evenly over {gpus} GPUs"
    if max(key_heads, gpus) % min(key_heads, gpus):
        return f"its {key_heads} heads of keys and values cannot be shared out evenly over {gpus} GPUs"
    return None


def max_lora_rank(config: Mapping[str, Any]) -> int | None:
    """What vLLM's `max_lora_rank` has to be for an adapter: its rank, up to the next that vLLM takes.

    Args:
        config: its adapter_config.json.

    Returns:
        None where the rank is above the largest.
    """
    return next((rank for rank in RANKS if rank >= _rank(config)), None)


def _scales_differ(config: Mapping[str, Any]) -> bool:
    """Whether layers have another scale than r and alpha give: vLLM reads neither rank_pattern nor alpha_pattern."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    power = 0.5 if config.get("use_rslora") else 1.0

    def scale(key: str = "") -> float:
        rank = ranks.get(key, config.get("r", 0))
        return float(alphas.get(key, config.get("lora_alpha", 0)) / max(1, rank) ** power)

    return any(abs(scale(key) - scale()) > 1e-9 * scale() for key in {*ranks, *alphas})


def _rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's layers."""
    return max([int(config.get("r", 0)), *(config.get("rank_pattern") or {}).values()])
