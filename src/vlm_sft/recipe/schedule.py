"""What a recipe comes to on a data set: optimizer steps, questions per step, learning rates. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vlm_sft.common.errors import RecipeError
from vlm_sft.common.formats import plural
from vlm_sft.recipe.schema import FLOORED_SCHEDULERS, Recipe

FEW_STEPS = 50  # optimizer steps; below, a training can hardly learn
SMALL_BATCH = 8  # questions; advice goes no lower


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
        eval_steps: steps between two evaluations; 0: never.
        save_steps: steps between two checkpoints; 0: never.
        notes: one sentence for each value that differs from the recipe's, to be printed.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    notes: list[str]

    def to_dict(self) -> dict[str, int]:
        """What run.json says of it."""
        return {
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "warmup_steps": self.warmup_steps,
            "eval_steps": self.eval_steps,
            "save_steps": self.save_steps,
        }

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.total_steps / self.steps_per_epoch

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


def _interval(strategy: str, steps: int, limit: int) -> int:
    """Steps between evaluations or checkpoints: those of the recipe, at most `limit`; 0 for none."""
    return 0 if strategy == "no" else limit if strategy == "epoch" else min(steps, limit)


def _shortened(recipe: Recipe, steps_per_epoch: int, total: int) -> Iterator[str]:
    """A note where the data have fewer steps than lie between two evaluations or checkpoints of the recipe."""
    limit = min(steps_per_epoch, total)
    wanted = {
        "evaluating": ("eval_steps", recipe.eval_strategy, recipe.eval_steps),
        "saving": ("save_steps", recipe.save_strategy, recipe.save_steps),
    }
    longer = {
        verb: f"{key} {steps}"
        for verb, (key, strategy, steps) in wanted.items()
        if strategy == "steps" and steps > limit
    }
    if longer:
        whole = "an epoch" if steps_per_epoch <= total else "the training"
        step = "step" if limit == 1 else f"{limit:,} steps"
        keys, verbs = " and ".join(longer.values()), " and ".join(longer)
        yield f"{whole} has {plural(limit, 'step')}, fewer than {keys}: {verbs} every {step}"


def resolve_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """Work out when the recipe evaluates, saves and warms up on a data set of a given size.

    With strategy "steps" there is at least one evaluation and one checkpoint per epoch, however small the data; with
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
            f"max_steps {total} ends the training after {total / steps_per_epoch:.3g} epochs; "
            f"num_train_epochs {recipe.num_train_epochs:g} is ignored"
        )
    else:
        # 0.1 epochs of 30 steps are 3 steps, not the 4 of a product rounded up after its last binary digit.
        total = max(1, math.ceil(round(recipe.num_train_epochs * steps_per_epoch, 6)))
    limit = min(steps_per_epoch, total)
    evaluate = _interval(recipe.eval_strategy, recipe.eval_steps, limit)
    save = _interval(recipe.save_strategy, recipe.save_steps, limit)
    notes += _shortened(recipe, steps_per_epoch, total)
    if recipe.load_best_model_at_end and evaluate and save and save != evaluate:
        notes.append(f"saving every {evaluate} steps instead of {save}, so that every evaluation can be the best")
        save = evaluate
    wanted = recipe.warmup_steps or math.ceil(round(total * recipe.warmup_ratio, 6))
    warmup = min(wanted, total // 2)
    if warmup < wanted:
        notes.append(f"warmup is cut from {wanted} to {plural(warmup, 'step')}, half of the training's {total}")
    return Schedule(steps_per_epoch, total, warmup, evaluate, save, notes)


def rate_factor(
    kind: str,
    warmup: int,
    total: int,
    step: int,
    *,
    lowest: float = 0.0,
    decay_ratio: float = 0.1,
    decay_type: str = "1-sqrt",
) -> float:
    """The learning rate of a step as a share of the highest one; no step of the training has a rate of 0.

    The usual schedules begin a warmup at 0, so that their first step changes nothing. Here the warmup rises in
    `warmup` + 1 equal parts, beginning with one; after it the schedules are the usual ones. Warmup-stable-decay is that
    of Hu et al. 2024 (arXiv:2404.06395), with the shapes of Hägele et al. 2024 (arXiv:2405.18392).

    Args:
        kind: one of SCHEDULERS.
        warmup, total: steps of the warmup and of the training.
        step: optimizer steps done, 0 for the first step.
        lowest: where the FLOORED_SCHEDULERS end, as a share of the highest rate.
        decay_ratio: part of all steps in which warmup_stable_decay falls; at most all behind the warmup.
        decay_type: one of DECAYS, its shape there.

    Returns:
        Above 0 and at most 1 for steps of the training; behind its end 0, or `lowest`, of the schedules that fall.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind.startswith("constant"):
        return 1.0
    falling, shape = total - warmup, "linear" if kind == "linear" else "cosine"
    if kind == "warmup_stable_decay":
        falling, shape = min(falling, math.ceil(round(total * decay_ratio, 6))), decay_type
    left = min(1.0, max(0.0, (total - step) / max(1, falling)))
    if shape == "cosine":
        left = (1 + math.cos(math.pi * (1 - left))) / 2
    elif shape == "1-sqrt":
        left = 1 - math.sqrt(1 - left)
    floor = lowest if kind in FLOORED_SCHEDULERS else 0.0
    return floor + (1 - floor) * left


def few_steps_advice(recipe: Recipe, schedule: Schedule, questions: int, batch: int, world_size: int) -> str:
    """Advice for a run of so few optimizer steps that it can hardly learn.

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
    problem = f"the model will hardly learn in {plural(total, 'optimizer step')} of {batch:,} questions"
    if recipe.max_steps > 0:
        return f"{problem}; use --max_steps {FEW_STEPS} or more"
    sizes = [batch >> halvings for halvings in range(batch.bit_length()) if batch >> halvings >= SMALL_BATCH] or [batch]
    fitting = (size for size in sizes if math.ceil(questions / size) * recipe.num_train_epochs >= FEW_STEPS)
    size = next(fitting, sizes[-1])
    steps = math.ceil(questions / size)
    epochs = max(recipe.num_train_epochs, math.ceil(FEW_STEPS / steps))
    flags = f"--global_batch_size {size}"
    if recipe.per_device_train_batch_size and recipe.gradient_accumulation_steps:
        flags = f"--per_device_train_batch_size {max(1, size // world_size)} --gradient_accumulation_steps 1"
    return f"{problem}; {flags} --num_train_epochs {epochs:g} gives {math.ceil(steps * epochs):,} steps on this data"
