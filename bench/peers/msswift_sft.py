"""ms-swift's side: its own SFT pipeline, with the vocabulary projection at supervised positions only."""

from __future__ import annotations

import os
from pathlib import Path

from peers.worker import Job


def train(job: Job) -> None:
    """Train on the job's rows."""
    # Read when ms-swift patches the image loader it comes with.
    os.environ["MAX_PIXELS"] = str(job.max_pixels)
    os.environ["IMAGE_MAX_TOKEN_NUM"] = str(job.max_pixels // (2 * job.patch) ** 2)

    from swift import SftArguments, sft_main
    from swift.template import TEMPLATE_MAPPING

    # Qwen3.5's own template thinks before it answers and has other numbers of tokens than the benchmark's tokenizer.
    template = "qwen3_vl" if job.family == "qwen3_5" else job.family
    if job.family != "paligemma":  # the line feed behind the last answer, which no other side trains on
        TEMPLATE_MAPPING[template].suffix = ["<|im_end|>"]
    sft_main(
        SftArguments(
            model=job.model,
            model_type=job.family,
            template=template,
            system=None if job.family == "paligemma" else "You are a helpful assistant.",
            torch_dtype=job.dtype,
            attn_impl="flash_attn" if job.has_flash else "sdpa",
            padding_free=job.has_flash,
            dataset=[str(Path(job.rows) / "conversations.jsonl")],
            split_dataset_ratio=0.0,
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            load_from_cache_file=False,
            max_length=8192,
            tuner_type="lora",
            lora_rank=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=0.0,
            # Its list of PaliGemma's parts has none for the tower, which would get LoRA, too.
            target_regex=rf".*language_model.*\.({'|'.join(job.targets)})",
            freeze_vit=True,
            check_model=False,
            use_logits_to_keep=True,
            gradient_checkpointing=False,
            output_dir=job.output,
            add_version=False,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.accumulation,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            weight_decay=0.0,
            save_strategy="no",
            eval_strategy="no",
            report_to=["none"],
            logging_steps=1,
            use_cpu=not job.on_gpu,
            bf16=job.bf16,
            fp16=False,
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
    )
