"""A step whose questions have no images leaves a trained vision tower as it is, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.adapters import save_base
from tests.pictures import png
from tests.processes import MAIN, Warm


def test_a_step_of_text_alone_does_not_move_the_tower(tmp_path: Path, warm: Warm) -> None:
    save_base(tmp_path / "base")
    rows = [{"question": f"What is {number}?", "answer": "y"} for number in range(6)]
    for number, colour in enumerate(("red", "navy")):
        (tmp_path / f"{number}.png").write_bytes(png(colour, (56, 70)))
        rows.append({"image": f"{number}.png", "question": "Say.", "answer": colour})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(name: str) -> list[str]:
        return [
            *("train", "--base_model", str(tmp_path / "base"), "--dataset", str(tmp_path / "own.jsonl")),
            *("--output_dir", str(tmp_path / name), "--max_steps", "8", "--global_batch_size", "2"),
            *("--train", "language,vision", "--learning_rate", "2e-3", "--adam_epsilon", "1e-6", "--report_to", "none"),
            *("--eval_strategy", "no", "--eval_benchmarks", "none", "--save_strategy", "no"),
        ]

    assert warm.run(*words("alone")).returncode == 0
    log = tmp_path / "log"
    assert warm.start_both(words("both"), log, script=MAIN).wait(280) == 0, log.read_text()[-3000:]
    alone, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    for name, tensor in alone.items():
        assert (both[name] - tensor).norm() <= 2e-5 * tensor.norm(), name
