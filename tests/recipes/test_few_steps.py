"""Trainings of few steps, through the command: what they say, their learning rate, their bar, and a zero adapter."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import png
from tests.wording import line_with
from vlm_sft.cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    rows = []
    for number in range(12):
        (folder / f"{number}.png").write_bytes(png((20 * number, 90, 9), (64, 64)))
        rows.append({"image": f"{number}.png", "question": "What is it?", "answer": "plain"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "mine.jsonl"


def train(data: Path, out: Path, *flags: str) -> int:
    always = ("--eval_benchmarks", "none", "--report_to", "none")
    return main(["train", "--base_model", "pocket", "--dataset", str(data), "--output_dir", str(out), *always, *flags])


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rates(run: Path) -> list[float]:
    return [row["learning_rate"] for row in rows_of(run) if "learning_rate" in row]


def test_one_step_trains_at_its_rate_and_says_what_would_be_more(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "one"
    assert train(data, run, "--sft_config", "1epoch") == 0
    told = capsys.readouterr()
    before = told.out.partition("step 1: ")[0]
    log = (run / "log.txt").read_text()
    assert len(before.splitlines()) <= 11 and line_with(before, "forecast", "on disk (") and line_with(before, "LoRA:")
    for folded in ("one sample as the model sees it", "schedule: 1 step", "launch: ", "  memory: ", "vision features"):
        assert folded in log and folded not in told.out, folded
    assert rates(run) == [pytest.approx(2e-4)]
    assert "changes nothing" not in told.out
    proposed = re.search(r"vlm-sft (export --adapter .+)", told.out)
    assert proposed is not None and main(shlex.split(proposed[1])) == 0, "one step of few changes is exported too"
    assert "round away the adapter's changes" in capsys.readouterr().out
    assert json.loads((tmp_path / "one-merged" / "export.json").read_text())["dtype"] == "float32"
    (advice,) = [note for note in json.loads((run / "run.json").read_text())["notes"] if "optimizer step" in note]
    assert advice in told.err
    found = re.search(r"(--global_batch_size \d+ --num_train_epochs \d+) gives (\d+) steps", advice)
    assert found is not None
    flags, steps = found[1].split(), int(found[2])
    assert steps >= 50
    capsys.readouterr()
    assert main(["plan", "--base_model", "pocket", "--dataset", str(data), "--sft_config", "1epoch", *flags]) == 0
    told = capsys.readouterr()
    assert f"schedule: {steps} steps" in told.out and "hardly learn" not in told.out
    assert main(["plan", "--base_model", "pocket", "--dataset", str(data), "--sft_config", "1epoch"]) == 0
    assert advice in capsys.readouterr().out


def test_the_rate_rises_from_the_first_step_and_the_bar_shows_the_newest_loss(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_sft.common.console.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("vlm_sft.common.console.SECONDS_WORTH_A_LINE", 0.0)
    run = tmp_path / "rising"
    flags = (
        "--global_batch_size",
        "4",
        "--num_train_epochs",
        "2",
        "--learning_rate",
        "0.01",
        "--warmup_ratio",
        "0.5",
        "--eval_strategy",
        "no",
    )
    assert train(data, run, *flags, "--logging_steps", "1") == 0
    bar = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    losses = [row["loss"] for row in rows_of(run) if "loss" in row]
    assert rates(run) == [pytest.approx(0.01 * part) for part in (1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3)]
    shown = [float(match[1]) for line in bar if (match := re.search(r"loss ([\d.]+)$", line))]
    assert not any("nan" in line for line in bar)
    # The bar opens without a loss; then it has that of each step, and ends with the last one.
    assert shown == [pytest.approx(loss, abs=1e-3) for loss in (*losses, losses[-1])]
    again = tmp_path / "logged_once"
    assert train(data, again, *flags, "--logging_steps", "100") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert [line.rpartition("loss ")[2] for line in told] == [line.rpartition("loss ")[2] for line in bar]


def test_a_warmup_of_more_steps_than_there_are_takes_half(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "warm"
    assert (
        train(
            data,
            run,
            "--global_batch_size",
            "6",
            "--num_train_epochs",
            "3",
            "--warmup_steps",
            "500",
            "--lr_scheduler_type",
            "cosine",
            "--logging_steps",
            "1",
        )
        == 0
    )
    assert line_with(capsys.readouterr().out, "warmup", "500", "6", "3")
    found = rates(run)
    assert len(found) == 6 and min(found) > 0 and max(found) == found[3] == pytest.approx(1e-4)


def test_an_adapter_that_is_still_zero_is_told_and_not_proposed_for_export(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "zero"
    assert train(data, run, "--max_steps", "2", "--learning_rate", "1e-60", "--verbose") == 0
    told = capsys.readouterr()
    assert "schedule: 2 steps" in told.out and "vision features" in told.out
    assert line_with(told.err, "warning: ", "changed nothing", "lora_B")
    assert "vlm-sft export" not in told.out and "next: train again" in told.out
    assert any("changed nothing" in note for note in json.loads((run / "run.json").read_text())["notes"])
    assert "changed nothing" in (run / "report.html").read_text()


def test_the_card_of_a_run_and_of_its_checkpoints(data: Path, tmp_path: Path) -> None:
    from tests.tiny_models import save

    base = save("qwen2_5_vl", tmp_path / "bases" / "tiny")
    run = tmp_path / "carded"
    flags = ("--base_model", str(base), "--max_steps", "2", "--save_steps", "1", "--system", "Be brief.")
    assert train(data, run, *flags) == 0
    for folder, title in ((run, "# carded"), (run / "checkpoint-1", "# carded, step 1")):
        card = (folder / "README.md").read_text()
        assert title in card and "More Information Needed" not in card and str(tmp_path) not in card
        assert "fine-tuned from `tiny`" in card and "--base_model FOLDER" in card and "base_model:" not in card
        assert "'text': 'Be brief.'" in card and "| learning_rate | 0.0001 |" in card
        assert re.search(r"Trained on \d+ questions on \d+ images: mine", card)
    assert main(["verify", str(run), "--checkpoints_only"]) == 0
    (run / "README.md").write_text("my own words\n")
    assert train(data, run, *flags, "--overwrite_output_dir") == 0
    assert (run / "README.md").read_text() == "my own words\n"
