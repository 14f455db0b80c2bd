"""TRL's side: SFTTrainer with its collator for vision and prompt-completion rows."""

from __future__ import annotations

from pathlib import Path

from peers.worker import Job


def train(job: Job) -> None:
    """Train on the job's rows."""
    import torch
    from datasets import Dataset, Image, Sequence, load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(Path(job.rows) / "pairs.jsonl"), split="train")
    assert isinstance(rows, Dataset)
    rows = rows.cast_column("images", Sequence(Image()))
    model = AutoModelForImageTextToText.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation="flash_attention_2" if job.has_flash else "sdpa"
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=job.output,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.accumulation,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            optim="adamw_torch",
            max_length=None,
            gradient_checkpointing=False,
            bf16=job.bf16,
            use_cpu=not job.on_gpu,
            train_sampling_strategy="sequential",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(job.model),
        peft_config=LoraConfig(
            r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=list(job.targets), task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
