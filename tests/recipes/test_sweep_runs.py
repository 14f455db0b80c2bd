"""`vlm-sft sweep` on the embedded model: killed, gone on with, failed, pruned, searched; trials are real trainings.

The first trial starts as a user's would, in an interpreter of its own; the others are forked.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_sft as vs
from tests.processes import MAIN, Forked, Warm, descendants
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.search import trials
from vlm_sft.search.trial_queue import VISIBLE
from vlm_sft.train.checkpoint.directory import checkpoints

DATA = [
    *("--base_model", "pocket", "--dataset", "demo_charts", "--max_train", "8", "--max_eval", "4"),
    *("--eval_samples", "4", "--global_batch_size", "2", "--eval_strategy", "steps", "--eval_steps", "1"),
    *("--save_strategy", "steps", "--save_steps", "1", "--report_to", "none", "--dataloader_num_workers", "0"),
]
GRID = ["--max_steps", "2", "--grid", "lora_r=4,8", "--learning_rate", "1e-4", "--seeds", "2"]
FIRST, SECOND, BROKEN = "lora_r-4_seed-42", "lora_r-8_seed-42", "lora_r-4_seed-43"


@pytest.fixture(scope="module")
def forking(warm: Warm) -> Iterator[list[tuple[Forked, str, int]]]:
    """Trials of sweeps in this process are forked; listed with their devices, and how many were running then."""
    before, forked = trials.start_process, []

    def start(words: list[str], log: Path, variables: Mapping[str, str]) -> Forked:
        others = sum(one.poll() is None for one, *_ in forked)
        flags = words[words.index("train") :]
        forked.append((Forked(warm.start(flags, log, variables, script=MAIN)), variables.get(VISIBLE, ""), others))
        return forked[-1][0]

    trials.start_process = start  # type: ignore[assignment]
    yield forked
    trials.start_process = before


def sweep(folder: Path, *flags: str) -> int:
    return main(["sweep", "--output_dir", str(folder), *DATA, *flags])


def state(folder: Path) -> dict[str, Any]:
    return artifacts.read_json(folder / artifacts.SWEEP)


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def swept(
    warm: Warm, forking: list[tuple[Forked, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A sweep that is killed in its first trial, stopped in its second, has one fail beside another, and is mended."""
    place = tmp_path_factory.mktemp("sweep")
    folder = place / "sweep"
    parent = warm.start(["sweep", "--output_dir", str(folder), *DATA, *GRID], place / "killed.log", script=MAIN)
    first, second, broken = (folder / artifacts.TRIALS_FOLDER / name for name in (FIRST, SECOND, BROKEN))
    wait_for(lambda: checkpoints(first))
    (child,) = descendants(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    killed = artifacts.read_json(first / artifacts.RUN)
    threading.Thread(
        target=lambda: (wait_for(lambda: checkpoints(second)), signal.raise_signal(signal.SIGTERM))
    ).start()
    codes = [sweep(folder, *GRID)]
    stopped = state(folder)
    broken.write_text("not a folder")
    forking.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c")
        codes.append(sweep(folder, *GRID, "--parallel", "2"))
    failed, together = state(folder), list(forking)
    broken.unlink()
    seen = first.joinpath(artifacts.RUN).stat().st_mtime_ns
    codes.append(sweep(folder, *GRID))
    return {
        "folder": folder,
        "killed": killed,
        "stopped": stopped,
        "failed": failed,
        "codes": codes,
        "devices": [devices for _, devices, _ in together],
        "together": [others for *_, others in together],
        "left_alone": first.joinpath(artifacts.RUN).stat().st_mtime_ns == seen,
    }


def test_a_killed_sweep_leaves_a_checkpoint_and_goes_on_bit_for_bit(swept: dict[str, Any], tmp_path: Path) -> None:
    assert swept["killed"]["status"] == "interrupted"
    trial = swept["folder"] / artifacts.TRIALS_FOLDER / FIRST
    assert artifacts.read_json(trial / artifacts.RUN)["resumes"]
    words = [*DATA, "--max_steps", "2", "--learning_rate", "1e-4", "--lora_r", "4", "--seed", "42", "--eval_benchmarks"]
    more = ["none", "--metric_for_best_model", "demo_charts_relaxed_accuracy", "--output_dir", str(tmp_path / "alone")]
    assert main(["train", *words, *more]) == 0
    weights = [folder / artifacts.ADAPTER_WEIGHTS for folder in (trial, tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_signal_stops_the_sweep_with_its_trial(swept: dict[str, Any]) -> None:
    assert swept["codes"][0] == 75 and swept["stopped"]["status"] == "interrupted"
    assert [one["status"] for one in swept["stopped"]["trials"][:2]] == ["finished", "waiting"]
    assert artifacts.read_json(swept["folder"] / artifacts.TRIALS_FOLDER / SECOND / artifacts.RUN)["resumes"]


def test_a_failed_trial_is_recorded_and_tried_again(swept: dict[str, Any]) -> None:
    assert swept["codes"][1:] == [1, 0] and swept["left_alone"]
    by_name = {one["name"]: one for one in swept["failed"]["trials"]}
    assert by_name[BROKEN]["status"] == "failed" and "is a file" in by_name[BROKEN]["reason"]
    assert [one["status"] for one in by_name.values()].count("finished") == 3 and swept["failed"]["failed"] == 1
    assert len(swept["failed"]["judgement"]["standings"]) == 1  # the setting whose trial failed is not compared


def test_trials_at_the_same_time_have_devices_of_their_own(swept: dict[str, Any]) -> None:
    """The second trial is gone on with on the first device; one fails beside it, and the last one takes its place."""
    assert swept["devices"] == ["GPU-a", "GPU-b", "GPU-b"] and swept["together"] == [0, 1, 1]


def test_the_result_is_written_and_drawn(swept: dict[str, Any]) -> None:
    found = state(swept["folder"])
    assert found["status"] == "finished" and found["seeds"] == [42, 43] and found["failed"] == 0
    assert [one["status"] for one in found["trials"]] == ["finished"] * 4
    standings = found["judgement"]["standings"]
    assert len(standings) == 2 and standings[0]["verdict"] == "best" and standings[0]["seeds"] == 2
    assert found["judgement"]["questions"] == 4
    assert all(one["value"] == pytest.approx(sum(_values(found, one["label"])) / 2) for one in standings)
    assert "--lora_r" in found["next"] and "--eval_benchmarks" not in found["next"]
    assert set(found["recommended"]) == {"lora_r"}
    assert found["forecast"]["time_seconds"]["low"] < found["forecast"]["time_seconds"]["value"]
    page = (swept["folder"] / artifacts.SWEEP_PAGE).read_text(encoding="utf-8")
    assert (
        "Sweep of lora_r" in page
        and "2 settings x 2 seeds" in page
        and "Quality against time: demo_charts_relaxed_accuracy" in page
    )
    assert "<bdi>Recommended</bdi>" in page
    assert all(one["label"] in page for one in standings)


def _values(found: dict[str, Any], label: str) -> list[float]:
    return [one["value"] for one in found["trials"] if one["setting"] == label]


def test_another_sweep_is_kept_out_of_the_folder(swept: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(swept["folder"], *GRID, "--lora_alpha", "7") == 2
    told = capsys.readouterr().err
    assert "holds another sweep: training: nothing became --lora_alpha 7" in told


def test_the_folder_of_a_training_is_refused(swept: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(swept["folder"] / artifacts.TRIALS_FOLDER / FIRST, *GRID) == 2
    assert "holds a training, not a sweep" in capsys.readouterr().err


def test_a_poor_trial_is_stopped_early_with_a_checkpoint(
    forking: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    flags = ["--max_steps", "3", "--grid", "learning_rate=1e-4,5e-2", "--seeds", "1", "--metric", "eval_loss"]
    assert sweep(folder, *flags, "--prune_after_trials", "1", "--prune_after_share", "0.2") == 0
    good, poor = state(folder)["trials"]
    assert good["status"] == "finished" and poor["status"] == "stopped early" and 0 < poor["step"] < 3
    assert "worse than the median of 1 finished trials" in poor["reason"]
    assert checkpoints(folder / artifacts.TRIALS_FOLDER / poor["name"])
    assert "no other setting to compare it with" in capsys.readouterr().out
    began = time.monotonic()
    assert sweep(folder, *flags, "--prune_after_trials", "1", "--prune_after_share", "0.2") == 0
    assert state(folder)["trials"][1] == poor and time.monotonic() - began < 60


def test_optuna_chooses_within_the_ranges_from_python_and_goes_on(forking: object, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    short: dict[str, Any] = {"base_model": "pocket", "max_steps": 1, "global_batch_size": 2, "report_to": "none"}
    asked: dict[str, Any] = {"ranges": {"learning_rate": (1e-4, 1e-2, "log")}, "grid": {"lora_r": [4, 8]}}
    asked |= {
        "search": "optuna",
        "metric": "eval_loss",
        "output_dir": tmp_path / "sweep",
        "max_train": 4,
        "max_eval": 4,
    }
    found = vs.sweep("demo_charts", trials=2, **asked, **short)
    first = state(tmp_path / "sweep")["trials"]
    assert len(found) == len(found.trials) == len({one["setting"] for one in first}) == 2
    for one in first:
        values = dict(part.split("=") for part in one["setting"].split(", "))
        assert 1e-4 <= float(values["learning_rate"]) <= 1e-2 and values["lora_r"] in ("4", "8")
    assert set(found.recommended) == {"learning_rate", "lora_r"} and found.trials[0].status == "finished"
    assert list(found.to_pandas().label) == [one["label"] for one in found.values["judgement"]["standings"]]
    assert "<table>" in found._repr_html_() and Path(found.report()).is_file() and "next: vlm-sft train" in repr(found)
    assert len(vs.sweep("demo_charts", trials=2, **asked, **short)) == 2
    assert state(tmp_path / "sweep")["trials"] == first


def test_a_dry_run_of_rows_from_python_leaves_nothing(tmp_path: Path) -> None:
    rows = [{"image": Image.new("RGB", (32 + n, 32)), "question": "?", "answer": "x"} for n in range(30)]
    place = tmp_path / "sweep"
    found = vs.sweep(rows, grid={"lora_r": [4, 8]}, base_model="pocket", output_dir=place, seeds=2, dry_run=True)
    assert [row["trials"] for row in found] == ["2", "2", "4"] and found.recommended == {} and not place.exists()
    with pytest.raises(RunError, match="resume has no effect here"):
        vs.sweep(rows, grid={"lora_r": [4, 8]}, resume="auto")


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path / "sweep", "--grid", "lora_r=4,8", "--seeds", "2", "--dry_run") == 0
    told = capsys.readouterr()
    assert "2 settings x 2 seeds" in told.out and "in sum" in told.out
    assert told.err.count("the model will hardly learn in 8 optimizer steps of 2 questions") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_names_the_settings_that_take_too_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--grid", "num_train_epochs=1,20", "--seeds", "1", "--dry_run")
    assert sweep(tmp_path / "sweep", *flags) == 0
    assert "num_train_epochs=1: the model will hardly learn in 4 optimizer steps" in capsys.readouterr().err
