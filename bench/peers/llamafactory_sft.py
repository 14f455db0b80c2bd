"""LLaMA-Factory's side: its own run_exp with the settings of a YAML file."""

from __future__ import annotations

import json
from pathlib import Path

from peers.worker import Job

TEMPLATE = "qwen2_vl_bench"
UNBOUNDED = 10**9  # pixels: the processor's own bound holds, as for every other side


def train(job: Job) -> None:
    """Train on the job's rows."""
    from llamafactory.train.tuner import run_exp

    _register_template()
    folder = Path(job.output)
    folder.mkdir(parents=True)
    entry = {
        "file_name": str(Path(job.rows) / "conversations.jsonl"),
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    run_exp(
        {
            "model_name_or_path": job.model,
            "image_max_pixels": UNBOUNDED,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": job.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": 0.0,
            "lora_target": ",".join(job.targets),
            "dataset_dir": str(folder),
            "dataset": "rows",
            "template": TEMPLATE,
            "cutoff_len": 8192,
            "output_dir": str(folder / "run"),
            "overwrite_cache": True,
            "flash_attn": "fa2" if job.has_flash else "sdpa",
            "disable_gradient_checkpointing": True,
            "disable_shuffling": True,
            "num_train_epochs": float(job.epochs),
            "per_device_train_batch_size": job.micro_batch,
            "gradient_accumulation_steps": job.accumulation,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
            "use_cpu": not job.on_gpu,
            "bf16": job.bf16,
            "plot_loss": False,
            "disable_tqdm": True,
        }
    )


def _register_template() -> None:
    """Its template of Qwen2.5-VL without the line feed behind the last answer, which no other side trains on."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template

    if TEMPLATE in TEMPLATES:
        return
    theirs = TEMPLATES["qwen2_vl"]
    register_template(
        name=TEMPLATE,
        format_user=theirs.format_user,
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=theirs.format_system,
        default_system=theirs.default_system,
        stop_words=theirs.stop_words,
        replace_eos=theirs.replace_eos,
        mm_plugin=theirs.mm_plugin,
    )
