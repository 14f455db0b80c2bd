"""The groups in which `--help` shows the flags of a verb: one table for all verbs, recipe keys included."""

from __future__ import annotations

from dataclasses import dataclass

MANY_FLAGS = 12  # a verb with more has groups


@dataclass(frozen=True, slots=True)
class FlagGroup:
    """Flags that are shown together.

    Attributes:
        title: above them.
        names: of the flags, without dashes.
        text: one sentence below the title; None for none.
    """

    title: str
    names: tuple[str, ...]
    text: str | None = None


GROUPS = (
    FlagGroup(
        "run",
        (
            *("help", "output_dir", "output", "sft_config", "base_model", "adapter", "adapter_mode", "resume"),
            *("overwrite_output_dir", "probe", "watch", "verbose", "hours", "disk", "priority", "runs", "configs"),
        ),
    ),
    FlagGroup(
        "data",
        (
            *(
                "dataset",
                "columns",
                "benchmark",
                "split",
                "limit",
                "loss_weights",
                "max_train",
                "max_eval",
                "eval_benchmarks",
            ),
            *("eval_samples", "max_length", "oversized", "prompt_template", "system", "max_new_tokens"),
            *("judge", "judge_model"),
        ),
    ),
    FlagGroup(
        "sweep",
        (
            *("grid", "range", "search", "trials", "seeds", "metric", "budget", "dry_run", "prune"),
            *("prune_after_trials", "prune_after_share"),
        ),
    ),
    FlagGroup("devices", ("gpus", "parallel", "gpu_type"), "Without them: this machine."),
    FlagGroup(
        "hypothetical data",
        ("questions", "images", "image_size", "question_tokens", "answer_tokens"),
        "Instead of --dataset: a data set that does not exist yet.",
    ),
    FlagGroup(
        "recipe: schedule",
        (
            *("num_train_epochs", "max_steps", "global_batch_size", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "max_questions_per_image", "learning_rate", "vision_learning_rate"),
            *("projector_learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "min_lr_ratio"),
            *("lr_decay_ratio", "lr_decay_type", "seed"),
        ),
        "A recipe's keys are flags: a flag wins over the file, the file over the default.",
    ),
    FlagGroup(
        "recipe: optimizer and loss",
        (
            *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "loss_type"),
            *("label_smoothing_factor", "neftune_noise_alpha"),
        ),
    ),
    FlagGroup(
        "recipe: LoRA and what is trained",
        (
            *("train", "target_modules", "lora_r", "lora_alpha", "lora_dropout", "vision_lora_rank"),
            *("projector_lora_rank", "use_rslora", "use_dora", "load_in_4bit"),
        ),
    ),
    FlagGroup("recipe: images", ("min_pixels", "max_pixels")),
    FlagGroup(
        "recipe: evaluations, checkpoints, logs",
        (
            *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
            *("report_to", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
            *("early_stopping_patience", "early_stopping_threshold"),
        ),
    ),
    FlagGroup(
        "safety",
        (
            *("guard", "max_left_out", "on_bad_sample", "max_bad_steps", "on_save_error", "allow_changes"),
            *("allow_prompt_mismatch", "allow_other_base", "ignore_forecast"),
        ),
        "What stops a command, and what it may pass over.",
    ),
    FlagGroup(
        "engine",
        (
            *(
                "bf16",
                "flash_attn",
                "deepspeed",
                "fsdp",
                "gradient_checkpointing",
                "tokens_per_pack",
                "share_images",
                "packing",
            ),
            *("dataloader_num_workers", "cache_dir", "prepared_cache", "feature_cache", "shard_weights", "backend"),
            "tensor_parallel_size",
        ),
        "These change speed, disk and memory; the loss stays the same, up to rounding.",
    ),
)
