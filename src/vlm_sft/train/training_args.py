"""A recipe as transformers.TrainingArguments, for callbacks that look there; the loop itself reads the recipe."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from vlm_sft.distributed.launch import Launch
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.trackers.session import SHOWN_IN


def callback_arguments(recipe: Recipe, schedule: Schedule, launch: Launch, output_dir: Path) -> TrainingArguments:
    """Describe a run to callbacks.

    One batch of the loader is one optimizer step, so batch size and accumulation are 1 here: the plan of the epoch
    holds the real ones. `warmup_ratio`, which transformers 5 removed, arrives as a number of steps.

    Args:
        recipe: the resolved recipe.
        schedule: its steps on this data set.
        launch: how the process was launched.
        output_dir: the run's folder.
    """
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=recipe.num_train_epochs,
        max_steps=schedule.total_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=schedule.warmup_steps,
        label_smoothing_factor=recipe.label_smoothing_factor,
        neftune_noise_alpha=recipe.neftune_noise_alpha or None,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optim,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=1,
        eval_strategy="steps" if schedule.eval_steps else "no",
        eval_steps=schedule.eval_steps or None,
        save_strategy="steps" if schedule.save_steps else "no",
        save_steps=schedule.save_steps or 500,
        load_best_model_at_end=recipe.load_best_model_at_end,
        metric_for_best_model=recipe.metric_for_best_model,
        greater_is_better=recipe.best_is_greatest,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        use_cpu=launch.cpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        ddp_backend="gloo" if launch.cpu and launch.world_size > 1 else None,
        # The others' integrations are made in vlm_sft.trackers.
        report_to=[tracker for tracker in recipe.report_to if tracker not in ("none", *SHOWN_IN)] or "none",
        disable_tqdm=True,
        log_level="warning",
    )


def reporting_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """What logs into the trackers that transformers integrates and `vlm_sft.trackers` does not."""
    return [make() for make in get_reporting_integration_callbacks(args.report_to)]
