"""TensorBoard shows a training: event files with the loss, the learning rate and the benchmark's metric."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]


def test_event_files_hold_the_loss_and_the_task_metric(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "src" / "train_vlm_sft.py"), "--base_model", "pocket",
            "--dataset", "demo_charts",
            "--max_train", "32", "--max_eval", "8", "--eval_samples", "8", "--global_batch_size", "16",
            "--num_train_epochs", "1", "--eval_steps", "1", "--save_steps", "1", "--logging_steps", "1",
            "--metric_for_best_model", "demo_charts_relaxed_accuracy", "--eval_benchmarks", "none",
            "--report_to", "tensorboard", "--output_dir", str(output), "--cache_dir", str(tmp_path / "cache"),
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = {path.parent for path in output.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= names
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/demo_charts_relaxed_accuracy")] == [1, 2]
