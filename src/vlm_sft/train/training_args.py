"""A recipe to transformers.TrainingArguments: classic names become those of the installed version."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from vlm_sft.distributed.launch import Launch
from vlm_sft.recipe.schedule import Schedule
from vlm_sft.recipe.schema import Recipe
from vlm_sft.trackers.session import SHOWN_IN


class RunArguments(TrainingArguments):
    """Arguments of a process that computes on one GPU."""

    @property
    def n_gpu(self) -> int:
        """1 on a GPU, 0 on a CPU.

        Not the number of GPUs that the process sees: transformers would share each pack out among them with
        nn.DataParallel, which knows nothing of packs.
        """
        return min(1, super().n_gpu)


def training_arguments(
    recipe: Recipe, schedule: Schedule, launch: Launch, output_dir: Path, bf16: bool, workers: int
) -> TrainingArguments:
    """Make the arguments of one run.

    One batch of the loader is one optimizer step, so batch size and accumulation are 1 here: the plan of the epoch
    holds the real ones. `warmup_ratio`, which transformers 5 removed, arrives as a number of steps.

    Args:
        recipe: the resolved recipe.
        schedule: its steps on this data set.
        launch: how the process was launched.
        output_dir: the run's folder.
        bf16: whether to compute in bfloat16.
        workers: processes that prepare batches.
    """
    return RunArguments(
        output_dir=str(output_dir),
        num_train_epochs=recipe.num_train_epochs,
        max_steps=schedule.total_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=schedule.warmup_steps,
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
        logging_nan_inf_filter=False,
        dataloader_num_workers=workers,
        bf16=bf16,
        use_cpu=launch.cpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # A tower may have layers that nothing reads (LLaVA takes the last but one), which then get no gradient.
        ddp_find_unused_parameters=bool({"vision", "all"} & set(recipe.train)),
        ddp_backend="gloo" if launch.cpu and launch.world_size > 1 else None,
        deepspeed=launch.deepspeed,
        # The others' integrations are made in vlm_sft.trackers.
        report_to=[tracker for tracker in recipe.report_to if tracker not in ("none", *SHOWN_IN)] or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # The loader begins at the right step by itself; skipping would compute every batch that is passed over.
        ignore_data_skip=True,
        log_level="warning",
    )
