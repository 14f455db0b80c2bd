"""What the values of a recipe may be together, and the error that lists every mistake. Pure functions.

`CONTRADICTIONS` looks at several keys together; `parsing.py` looks at each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.errors import RecipeError, nearest
from vlm_sft.recipe.metric_names import LOSS, is_loss
from vlm_sft.recipe.parsing import shown
from vlm_sft.recipe.schema import KEYS

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "label_smoothing": "label_smoothing_factor",
    "min_lr_rate": "min_lr_ratio",
    "neftune_alpha": "neftune_noise_alpha",
    "gradient_clipping": "max_grad_norm",
    "lora_rank": "lora_r",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "qlora": "load_in_4bit",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "max_train_samples": "max_train",
    "max_eval_samples": "max_eval",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "image_max_pixels": "max_pixels",
    "train_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels",
}
COMMAND_LINE_ONLY = (
    "base_model",
    "dataset",
    "columns",
    "output_dir",
    "deepspeed",
    "flash_attn",
    "resume",
    "eval_benchmarks",
    "eval_samples",
    "guard",
    "prompt_template",
    "system",
    "max_new_tokens",
)


@dataclass(frozen=True, slots=True)
class Mistake:
    """One mistake in a recipe.

    Attributes:
        where: the file, or "command line".
        key: the key or flag with its value as given, e.g. 'lora_r = "16"'; several keys for a contradiction; "" for
            the file as a whole.
        problem: what is wrong.
        remedy: what is allowed, or how to mend it.
    """

    where: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.key, f"{self.problem}; {self.remedy}")))


def raise_mistakes(mistakes: Sequence[Mistake]) -> None:
    """Raise one error that lists every mistake; do nothing when there is none.

    Raises:
        RecipeError: when `mistakes` is not empty.
    """
    if mistakes:
        count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = [f"{count} in the recipe"] + [f"  {mistake}" for mistake in mistakes]
        raise RecipeError("\n".join(lines), "correct each line; `vlm-sft train --help` describes every key")


def suggestion(name: str) -> str:
    """Say what to do about the unknown key `name`: the nearest known one, where there is a near one."""
    if name in COMMAND_LINE_ONLY:
        return f"it belongs on the command line: --{name}"
    if name == "fp16":
        return "float16 training is not offered; use bf16"
    near = nearest(name, [*KEYS, *ALIASES], "{}")
    if near:
        return f"did you mean {ALIASES.get(near, near)}?"
    return "no known key is near to it; remove it"


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Values that are allowed alone but not together.

    Attributes:
        keys: the keys that are looked at, in the order in which the message shows them.
        holds: whether all values of the recipe contradict in this way.
        problem: why they do.
        remedy: how to mend it.
    """

    keys: tuple[str, ...]
    holds: Callable[[Mapping[str, Any]], bool]
    problem: str
    remedy: str


def _batch_cannot_match(v: Mapping[str, Any]) -> bool:
    target, device, accumulation = (
        v[name] for name in ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if target is None:
        return device is None or accumulation is None
    if device is not None and accumulation is not None:
        return bool(target % (device * accumulation))
    return bool((device or accumulation or 0) > target)


PLACES = {"vision": "vision tower", "projector": "projector"}


def _has_lora(v: Mapping[str, Any]) -> bool:
    return bool({"language", "vision_lora", "projector_lora"} & set(v["train"]))


def _unsaved_best(v: Mapping[str, Any]) -> bool:
    by_steps = v["eval_strategy"] == v["save_strategy"] == "steps"
    return bool(v["load_best_model_at_end"] and by_steps and v["eval_steps"] != v["save_steps"])


CONTRADICTIONS = (
    Contradiction(
        ("load_best_model_at_end", "eval_strategy"),
        lambda v: v["load_best_model_at_end"] and v["eval_strategy"] == "no",
        "without evaluations there is no best checkpoint",
        "use eval_strategy steps or epoch",
    ),
    Contradiction(
        ("load_best_model_at_end", "save_strategy"),
        lambda v: v["load_best_model_at_end"] and v["save_strategy"] == "no",
        "without checkpoints the best one cannot be loaded",
        "use the save_strategy of the evaluations",
    ),
    Contradiction(
        ("load_best_model_at_end", "eval_strategy", "save_strategy"),
        lambda v: (
            v["load_best_model_at_end"]
            and "no" not in (v["eval_strategy"], v["save_strategy"])
            and v["eval_strategy"] != v["save_strategy"]
        ),
        "the best evaluation could fall where nothing is saved",
        "make both strategies the same",
    ),
    Contradiction(
        ("load_best_model_at_end", "eval_steps", "save_steps"),
        _unsaved_best,
        "the best evaluation could fall on a step that is never saved",
        "make save_steps equal to eval_steps",
    ),
    Contradiction(
        ("metric_for_best_model", "greater_is_better"),
        lambda v: v["greater_is_better"] is True and is_loss(v["metric_for_best_model"]),
        "the checkpoint with the highest loss would be the best",
        "use null or false",
    ),
    Contradiction(
        ("metric_for_best_model", "greater_is_better"),
        lambda v: v["greater_is_better"] is False and not is_loss(v["metric_for_best_model"]),
        "the checkpoint that answers worst would be the best",
        "use null or true",
    ),
    Contradiction(
        ("metric_for_best_model", "eval_strategy"),
        lambda v: v["eval_strategy"] == "no" and v["metric_for_best_model"] != LOSS,
        "without evaluations this metric is never measured",
        "use eval_strategy steps or epoch, or eval_loss",
    ),
    Contradiction(
        ("early_stopping_patience", "eval_strategy"),
        lambda v: v["early_stopping_patience"] is not None and v["eval_strategy"] == "no",
        "without evaluations nothing says when to stop",
        "use eval_strategy steps or epoch, or early_stopping_patience null",
    ),
    Contradiction(
        ("loss_type", "label_smoothing_factor"),
        lambda v: v["loss_type"] == "dft" and v["label_smoothing_factor"] > 0,
        "dft weights the loss of the right token alone, and smoothing spreads it over all others",
        "use loss_type nll, or label_smoothing_factor 0",
    ),
    Contradiction(
        ("warmup_ratio", "warmup_steps"),
        lambda v: v["warmup_ratio"] > 0 and v["warmup_steps"] > 0,
        "two lengths for one warmup",
        "keep one of them",
    ),
    Contradiction(
        ("lr_scheduler_type", "warmup_ratio", "warmup_steps"),
        lambda v: v["lr_scheduler_type"] == "constant" and (v["warmup_ratio"] > 0 or v["warmup_steps"] > 0),
        "the constant schedule has no warmup",
        "use constant_with_warmup, or a warmup of 0",
    ),
    Contradiction(
        ("max_steps", "warmup_steps"),
        lambda v: 0 < v["max_steps"] <= v["warmup_steps"],
        "the training ends before the warmup does",
        "use fewer warmup_steps",
    ),
    Contradiction(
        ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
        _batch_cannot_match,
        "no number of devices gives this global batch",
        "per_device_train_batch_size x gradient_accumulation_steps x devices must equal global_batch_size, or be "
        "given in its place",
    ),
    Contradiction(
        ("min_pixels", "max_pixels"),
        lambda v: None not in (v["min_pixels"], v["max_pixels"]) and v["min_pixels"] > v["max_pixels"],
        "the smallest area is above the largest",
        "use a min_pixels of at most max_pixels",
    ),
    Contradiction(
        ("train",),
        lambda v: "all" in v["train"] and len(v["train"]) > 1,
        "all and a part of it",
        "keep all, or name the parts",
    ),
    Contradiction(
        ("train", "load_in_4bit"),
        lambda v: v["load_in_4bit"] and "language" not in v["train"],
        "weights in 4 bits cannot be trained themselves, and nothing else of the language model is trained here",
        "use train language, or load_in_4bit false",
    ),
    Contradiction(
        ("train", "use_dora"),
        lambda v: v["use_dora"] and not _has_lora(v),
        "DoRA is a kind of LoRA, and nothing here is trained with LoRA",
        "use train language, vision_lora or projector_lora, or no DoRA",
    ),
    Contradiction(
        ("train", "use_rslora"),
        lambda v: v["use_rslora"] and not _has_lora(v),
        "rsLoRA is a kind of LoRA, and nothing here is trained with LoRA",
        "use train language, vision_lora or projector_lora, or no rsLoRA",
    ),
    *(
        Contradiction(
            ("train",),
            lambda v, part=part: {part, f"{part}_lora"} <= set(v["train"]),  # type: ignore[misc]
            f"the {place} in full and with LoRA",
            f"keep {part} or {part}_lora",
        )
        for part, place in PLACES.items()
    ),
    *(
        Contradiction(
            ("train", f"{part}_lora_rank"),
            lambda v, part=part: v[f"{part}_lora_rank"] is not None and f"{part}_lora" not in v["train"],  # type: ignore[misc]
            f"a rank for LoRA on the {place}, and no such LoRA",
            f"use train with {part}_lora, or no {part}_lora_rank",
        )
        for part, place in PLACES.items()
    ),
    *(
        Contradiction(
            ("train", f"{part}_learning_rate"),
            lambda v, part=part: (  # type: ignore[misc]
                v[f"{part}_learning_rate"] is not None and not {part, f"{part}_lora", "all"} & set(v["train"])
            ),
            f"a learning rate for the {place}, which is not trained",
            f"use train with {part}_lora, {part} or all, or no {part}_learning_rate",
        )
        for part, place in PLACES.items()
    ),
    Contradiction(
        ("report_to",),
        lambda v: "none" in v["report_to"] and len(v["report_to"]) > 1,
        "none and a tracker together",
        "keep one of them",
    ),
)


def find_contradictions(
    values: Mapping[str, Any], sources: Mapping[str, str], broken: Collection[str]
) -> list[Mistake]:
    """List the contradictions between the values of a recipe.

    Args:
        values: every key with its checked value.
        sources: where each given key came from: a file or "command line"; keys not in it have their defaults.
        broken: keys with a mistake of their own: what they should have been is unknown, so they contradict nothing.

    Returns:
        One mistake for each contradiction, with the values and where they come from.
    """
    mistakes = []
    for rule in CONTRADICTIONS:
        if broken and not set(rule.keys).isdisjoint(broken):
            continue
        if rule.holds(values):
            places = list(dict.fromkeys(sources[name] for name in rule.keys if name in sources))
            shown_values = []
            for name in rule.keys:
                place = sources.get(name, "default")
                value = f"{name} = {shown(values[name])}"
                shown_values.append(value if len(places) == 1 and place == places[0] else f"{value} ({place})")
            mistakes.append(
                Mistake(" and ".join(places) or "defaults", ", ".join(shown_values), rule.problem, rule.remedy)
            )
    return mistakes
