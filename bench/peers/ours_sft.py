"""Our side: the command line's own path, with a cold cache folder."""

from __future__ import annotations

from pathlib import Path

from peers.worker import Job


def train(job: Job) -> None:
    """Train on the job's rows."""
    from vlm_sft.data.engine_options import EngineOptions
    from vlm_sft.planning.options import TrainOptions
    from vlm_sft.train.run import train as train_run

    overrides = {
        "num_train_epochs": float(job.epochs),
        "global_batch_size": job.batch,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "lora_r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(job.targets),
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": ["none"],
        "bf16": job.bf16,
    }
    if job.family != "paligemma":  # its images have one size
        overrides["max_pixels"] = job.max_pixels
    train_run(
        TrainOptions(
            output_dir=Path(job.output) / "run",
            overrides=overrides,
            base_model=job.model,
            dataset=str(Path(job.rows) / "ours"),
            eval_benchmarks="none",
            prompt_template="{question}",
            flash_attn=job.on_gpu,
            engine=EngineOptions(cache_dir=Path(job.output) / "cache"),
        )
    )
