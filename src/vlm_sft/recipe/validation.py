"""What a recipe may say, and the schedule it means. Pure functions.

`CONTRADICTIONS` looks at several keys together (values.py looks at each alone); `raise_mistakes` reports all that were
found at once. `resolve_schedule` and `effective_global_batch_size` tell the trainer what the numbers come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.common.errors import RecipeError, nearest
from vlm_sft.recipe.parsing import shown
from vlm_sft.recipe.schema import KEYS, Recipe

ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
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
    "image_max_pixels": "max_pixels",
    "train_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels",
}
COMMAND_LINE_ONLY = (
    "base_model",
    "dataset",
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


FEW_STEPS = 50  # optimizer steps; below, a training can hardly learn
SMALL_BATCH = 8  # questions; advice goes no lower


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
        holds: tells from all values of the recipe whether they contradict.
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
    return (device or accumulation or 0) > target


def _unsaved_best(v: Mapping[str, Any]) -> bool:
    by_steps = v["eval_strategy"] == v["save_strategy"] == "steps"
    return v["load_best_model_at_end"] and by_steps and v["eval_steps"] != v["save_steps"]


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
        lambda v: v["greater_is_better"] is True and v["metric_for_best_model"].endswith("loss"),
        "the checkpoint with the highest loss would be the best",
        "use null or false",
    ),
    Contradiction(
        ("metric_for_best_model", "greater_is_better"),
        lambda v: v["greater_is_better"] is False and not v["metric_for_best_model"].endswith("loss"),
        "the checkpoint that answers worst would be the best",
        "use null or true",
    ),
    Contradiction(
        ("metric_for_best_model", "eval_strategy"),
        lambda v: v["eval_strategy"] == "no" and not v["metric_for_best_model"].endswith("loss"),
        "without evaluations this metric is never measured",
        "use eval_strategy steps or epoch, or eval_loss",
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
        lambda v: v["use_dora"] and "language" not in v["train"],
        "DoRA is a kind of LoRA, and there is no LoRA without the language model",
        "use train language, or no DoRA",
    ),
    Contradiction(
        ("train", "use_rslora"),
        lambda v: v["use_rslora"] and "language" not in v["train"],
        "rsLoRA is a kind of LoRA, and there is no LoRA without the language model",
        "use train language, or no rsLoRA",
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
            told = []
            for name in rule.keys:
                place = sources.get(name, "default")
                value = f"{name} = {shown(values[name])}"
                told.append(value if len(places) == 1 and place == places[0] else f"{value} ({place})")
            mistakes.append(Mistake(" and ".join(places) or "defaults", ", ".join(told), rule.problem, rule.remedy))
    return mistakes


def effective_global_batch_size(recipe: Recipe, world_size: int) -> int:
    """Question-answer pairs of one optimizer step on `world_size` devices.

    Args:
        recipe: the recipe. With a `global_batch_size` that is the answer; the classic keys then only say how it is
            cut up. Without one it is per_device_train_batch_size x gradient_accumulation_steps x world_size.
        world_size: number of training processes.

    Returns:
        Question-answer pairs per optimizer step.

    Raises:
        RecipeError: all three keys are given and their product is another number on this many devices.
    """
    device, accumulation = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    if device is None or accumulation is None:
        assert recipe.global_batch_size is not None, "the rules refuse a recipe without any batch size"
        return recipe.global_batch_size
    product = device * accumulation * world_size
    if recipe.global_batch_size not in (None, product):
        raise RecipeError(
            f"global_batch_size is {recipe.global_batch_size}, but per_device_train_batch_size {device} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} devices is {product}",
            "remove global_batch_size to train with the product, or the other two to train with global_batch_size",
        )
    return product


@dataclass(frozen=True)
class Schedule:
    """What a recipe comes to on a data set: all in optimizer steps, counted from 1.

    Attributes:
        steps_per_epoch: steps of one pass over the data.
        total_steps: steps of the whole training.
        warmup_steps: steps in which the learning rate rises; at most half of them.
        eval_steps: an evaluation follows every so many steps; 0: never.
        save_steps: a checkpoint follows every so many steps; 0: never.
        notes: one sentence for each value that differs from the recipe's, to be printed.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    notes: list[str]

    def evaluation_steps(self) -> list[int]:
        """The steps after which there is an evaluation; the last step of the training is among them."""
        return self._every(self.eval_steps)

    def save_steps_list(self) -> list[int]:
        """The steps after which a checkpoint is written; the last step of the training is among them."""
        return self._every(self.save_steps)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        return self._due(self.eval_steps, step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return self._due(self.save_steps, step)

    def _due(self, interval: int, step: int) -> bool:
        return bool(interval) and (step % interval == 0 or step >= self.total_steps)

    def _every(self, interval: int) -> list[int]:
        if not interval:
            return []
        steps = list(range(interval, self.total_steps + 1, interval))
        return steps if steps and steps[-1] == self.total_steps else [*steps, self.total_steps]


def _clamp(name: str, strategy: str, steps: int, steps_per_epoch: int, total: int, notes: list[str]) -> int:
    """The interval of `name` ("eval" or "save") on this data; a note is added when it is not the recipe's."""
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return min(steps_per_epoch, total)
    limit = min(steps_per_epoch, total)
    if steps <= limit:
        return steps
    whole = "an epoch" if steps_per_epoch <= total else "the training"
    verb = "evaluating" if name == "eval" else "saving"
    notes.append(f"{name}_steps {steps} is more than the {limit} steps of {whole}: {verb} every {limit} steps")
    return limit


def resolve_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """Work out when the recipe evaluates, saves and warms up on a data set of a given size.

    With strategy "steps" there is at least one evaluation and one checkpoint an epoch, however small the data; with
    load_best_model_at_end every evaluation has a checkpoint.

    Args:
        recipe: the recipe.
        steps_per_epoch: optimizer steps of one pass over the data, at least 1.

    Returns:
        The schedule, with a note for each value that had to differ from the recipe.
    """
    assert steps_per_epoch >= 1, steps_per_epoch
    notes: list[str] = []
    if recipe.max_steps > 0:
        total = recipe.max_steps
        notes.append(
            f"max_steps {total} ends the training: {total / steps_per_epoch:.3g} epochs, whatever "
            f"num_train_epochs ({recipe.num_train_epochs:g}) says"
        )
    else:
        # 0.1 epochs of 30 steps are 3 steps, not the 4 of a product rounded up after its last binary digit.
        total = max(1, math.ceil(round(recipe.num_train_epochs * steps_per_epoch, 6)))
    evaluate = _clamp("eval", recipe.eval_strategy, recipe.eval_steps, steps_per_epoch, total, notes)
    save = _clamp("save", recipe.save_strategy, recipe.save_steps, steps_per_epoch, total, notes)
    if recipe.load_best_model_at_end and evaluate and save and save != evaluate:
        notes.append(f"saving every {evaluate} steps instead of {save}, so that every evaluation can be the best")
        save = evaluate
    asked = recipe.warmup_steps or math.ceil(round(total * recipe.warmup_ratio, 6))
    warmup = min(asked, total // 2)
    if warmup < asked:
        notes.append(f"a warmup of {asked} steps is more than half of the training's {total}: it takes {warmup}")
    return Schedule(steps_per_epoch, total, warmup, evaluate, save, notes)


def rate_factor(kind: str, warmup: int, total: int, step: int) -> float:
    """The learning rate of a step as a share of the highest one; no step of the training has a rate of 0.

    The usual schedules begin a warmup at 0, which makes the first step one that changes nothing. Here the warmup rises
    in `warmup` + 1 equal parts, of which the first step takes one; behind it the course is theirs.

    Args:
        kind: one of SCHEDULERS.
        warmup, total: steps of the warmup and of the training.
        step: optimizer steps done, 0 for the first step.

    Returns:
        Above 0 and at most 1 for steps of the training, 0 behind its end (of the schedules that fall).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind.startswith("constant"):
        return 1.0
    left = max(0.0, (total - step) / max(1, total - warmup))
    return left if kind == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2


def few_steps_advice(recipe: Recipe, schedule: Schedule, questions: int, batch: int, world_size: int) -> str:
    """What to say about a run of so few optimizer steps that it can hardly learn.

    Args:
        recipe, schedule: of the run.
        questions: of one epoch.
        batch: questions of one optimizer step.
        world_size: number of training processes.

    Returns:
        One sentence with flags that give `FEW_STEPS` on this data; "" where there are as many.
    """
    total = schedule.total_steps
    if total >= FEW_STEPS:
        return ""
    told = f"{total:,} optimizer step{'s' if total > 1 else ''} of {batch:,} questions can hardly teach anything"
    if recipe.max_steps > 0:
        return f"{told}; --max_steps {FEW_STEPS} or more would"
    sizes = [batch >> halvings for halvings in range(batch.bit_length()) if batch >> halvings >= SMALL_BATCH] or [batch]
    fitting = (size for size in sizes if math.ceil(questions / size) * recipe.num_train_epochs >= FEW_STEPS)
    size = next(fitting, sizes[-1])
    steps = math.ceil(questions / size)
    epochs = max(recipe.num_train_epochs, math.ceil(FEW_STEPS / steps))
    flags = f"--global_batch_size {size}"
    if recipe.per_device_train_batch_size and recipe.gradient_accumulation_steps:
        flags = f"--per_device_train_batch_size {max(1, size // world_size)} --gradient_accumulation_steps 1"
    return f"{told}; {flags} --num_train_epochs {epochs:g} makes {math.ceil(steps * epochs):,} steps of this data"
