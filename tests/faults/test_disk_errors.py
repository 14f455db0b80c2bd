"""EIO from the disk, injected into the launch line below Python: no checkpoint is lost, and the end is the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.harness import Reference, arguments
from tests.faults.injection import Fault, Injected, layer
from tests.processes import Warm, start_ranks
from tests.wording import line_with
from vlm_sft.common.artifacts import checkpoint_step
from vlm_sft.train.checkpoint import directory as checkpoints_module
from vlm_sft.train.checkpoint.directory import checkpoint_problems, checkpoints

EIO = "Input/output error"
SAFETENSORS = ".tmp??????"  # what a file is called while safetensors writes it, in one call
# What fails while the checkpoint of a step is written, and what is said about it.
SAVING = {
    2: (Fault("write", f"*/run/checkpoint-2.partial/{SAFETENSORS}", count=1), "the weights: "),
    3: (Fault("write", f"*/run/checkpoint-3.partial/{SAFETENSORS}", first=2, count=1), "optimizer.safetensors: "),
    4: (Fault("write", "*/run/checkpoint-4.partial/manifest.json"), "manifest.json: "),
    5: (Fault("fsync", "*/run/checkpoint-5.partial/adapter_model.safetensors"), "adapter_model.safetensors: "),
    6: (Fault("rename", "*/run/checkpoint-6.partial"), "checkpoint-6.partial: "),
    7: (Fault("fsync", "*/run", first=2, count=1), "run: "),  # the new name in the folder, the first after step 1
}


@pytest.fixture(scope="module")
def reference(injected_place: Path, injected_warm: Warm) -> Reference:
    """What an undisturbed run comes to."""
    code, told = launched(injected_warm, injected_place, injected_place / "reference" / "run")
    assert code == 0, told[-2000:]
    return Reference.of(injected_place / "reference" / "run")


def flags_of(place: Path, output: Path, *more: str) -> list[str]:
    """A checkpoint after each step, and none that must be the best: every one of them may fail."""
    found = arguments(
        place,
        output,
        "--save_steps",
        "1",
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--save_total_limit",
        "9",
        "--feature_cache",  # kept whatever this machine's rates say: a test strikes them
        "1GB",
        *more,
    )
    at = found.index("--eval_samples")
    return found[:at] + found[at + 2 :]


def launched(
    warm: Warm, place: Path, output: Path, faults: Injected | None = None, *more: str
) -> tuple[int | None, str]:
    """Start or resume a run; its exit code and what it said."""
    output.parent.mkdir(exist_ok=True)
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    code = warm.start(flags_of(place, output, *more), log, faults.variables if faults else None).wait(120)
    told = log.read_text()
    assert "Traceback" not in told, told[-3000:]
    return code, told


def verified(output: Path) -> list[int]:
    """Steps of the checkpoints, every one of which must verify."""
    found = checkpoints(output)
    assert {path.name: checkpoint_problems(path) for path in found} == {path.name: [] for path in found}
    return [checkpoint_step(path) for path in found]


def test_a_training_goes_on_past_what_cannot_be_written(
    injected_warm: Warm, injected_place: Path, reference: Reference, tmp_path: Path
) -> None:
    """Six checkpoints in a row, each for another reason, now and then a log, and the cache."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    faults = Injected(
        tmp_path / "faults",
        *(fault for fault, _ in SAVING.values()),
        Fault("write", "*/run/metrics.jsonl", count=1),
        Fault("write", "*/run/.run.json.*", first=2, count=1),
        Fault("write", "*/cache/images/*/.*.tmp"),
    )
    code, told = launched(injected_warm, injected_place, output, faults, "--cache_dir", str(cache))
    assert code == 0, told[-2000:]
    assert all(faults.met), faults.met
    for step, (_, named) in SAVING.items():
        line = next(line for line in told.splitlines() if f"checkpoint of step {step} cannot be written" in line)
        assert line.startswith("warning: ") and named in line and EIO in line and "training continues" in line
    assert verified(output) == [1, 8]
    assert not list(output.glob("checkpoint-*.*"))
    notes = json.loads((output / "run.json").read_text())["notes"]
    assert sum(EIO in note for note in notes) == len(SAVING)
    assert line_with(told, "prepared data cannot be stored", cache)
    # Nothing is missing in the log, or there twice.
    assert line_with(told, output / "metrics.jsonl", EIO) and line_with(told, output / "run.json", EIO)
    assert reference.differences(output) == []


@pytest.mark.parametrize("steps", [(6,), pytest.param(tuple(SAVING), marks=pytest.mark.slow)], ids=["one", "each"])
def test_a_training_that_stops_there_comes_to_the_same_adapter(
    steps: tuple[int, ...], injected_warm: Warm, injected_place: Path, reference: Reference, tmp_path: Path
) -> None:
    output, stop = tmp_path / "run", ("--on_save_error", "stop")
    for step in steps:
        fault, named = SAVING[step]
        before = {path: path.read_bytes() for path in output.glob("checkpoint-*/*")}
        faults = Injected(tmp_path / f"faults{step}", fault)
        code, told = launched(injected_warm, injected_place, output, faults, *stop)
        assert code == 2, told[-2000:]
        assert line_with(told, "error: ", f"checkpoint of step {step} ") and named in told and EIO in told
        assert verified(output) == list(range(1, step))
        assert before.items() <= {path: path.read_bytes() for path in output.glob("checkpoint-*/*")}.items()
    faults = Injected(tmp_path / "faults", Fault("write", f"*/run/.adapter.partial/{SAFETENSORS}"))
    code, told = launched(injected_warm, injected_place, output, faults, *stop)
    assert code == 2 and line_with(told, "error: ", "adapter", output) and EIO in told
    assert verified(output) == list(range(1, 9)) and not (output / "adapter_model.safetensors").exists()
    assert launched(injected_warm, injected_place, output, None, *stop)[0] == 0
    assert reference.differences(output) == []


def test_names_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint takes the place of an older one of its step: both names are as before where one call fails."""
    partial, target = tmp_path / "checkpoint-7.partial", tmp_path / "checkpoint-7"
    for folder in (partial, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    real = os.rename
    for failing in ("checkpoint-7", "checkpoint-7.partial", "flush"):
        struck = []

        def rename(before: Path, after: Path, failing: str = failing, struck: list[Path] = struck) -> None:
            if Path(before).name == failing and not struck:
                struck.append(before)
                raise OSError(errno.EIO, EIO, str(before))
            real(before, after)

        def flush(path: Path, failing: str = failing) -> None:
            if failing == "flush":
                raise OSError(errno.EIO, EIO, str(path))

        monkeypatch.setattr(checkpoints_module.os, "rename", rename)
        monkeypatch.setattr(checkpoints_module, "flush", flush)
        with pytest.raises(OSError, match=EIO):
            checkpoints_module.publish(partial)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "checkpoint-7.partial"]
        assert [(folder / "name").read_text() for folder in (partial, target)] == [partial.name, target.name]
        monkeypatch.undo()
    assert checkpoints_module.publish(partial) == target
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert (target / "name").read_text() == partial.name


@pytest.mark.parametrize("features", [False, True])
def test_what_cannot_be_read_is_passed_over(
    features: bool, injected_warm: Warm, injected_place: Path, reference: Reference, tmp_path: Path
) -> None:
    """The newest checkpoint, and an index of the cache, of tokens or with a shard of vision features."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(injected_place / "reference" / "run", output)
    shutil.copytree(injected_place / "cache", cache)
    (*_, index) = sorted(path for path in cache.glob("tokens/*/*.json") if path.name != "entry.json")
    faults = Injected(
        tmp_path / "faults",
        Fault("read", "*/run/checkpoint-8/optimizer.safetensors"),
        Fault("read", f"*/{index.name}", count=1),
        *([Fault("read", "*/features/*/*.safetensors", count=1)] if features else []),
    )
    code, told = launched(injected_warm, injected_place, output, faults, "--cache_dir", str(cache))
    assert code == 0, told[-2000:]
    assert line_with(told, output / "checkpoint-8", "cannot be resumed", "optimizer.safetensors", EIO)
    assert line_with(told, "resuming from", output / "checkpoint-7")
    assert line_with(told, "cache: ", index.with_suffix(".safetensors"), EIO)
    assert told.count("it is rebuilt") == 1 + features
    if features:  # what is computed in another batch of images may round differently
        assert reference.distance(output) < 1e-5
    else:
        assert reference.differences(output) == []


def test_data_that_cannot_be_read_at_the_start(injected_warm: Warm, injected_place: Path, tmp_path: Path) -> None:
    rows = injected_place / "data" / "train.jsonl"
    faults = Injected(tmp_path / "faults", Fault("read", str(rows)))
    code, told = launched(injected_warm, injected_place, tmp_path / "run", faults)
    assert code == 2 and f"error: cannot read {rows}: {EIO}" in told
    faults = Injected(tmp_path / "more", Fault("read", "*/3.png"))
    code, told = launched(injected_warm, injected_place, tmp_path / "other", faults)
    assert code == 2 and "error: 3 of 24 samples" in told and f"'../3.png' cannot be opened: {EIO}" in told


@pytest.mark.slow
def test_on_two_ranks(injected_place: Path, reference: Reference, tmp_path: Path) -> None:
    """Under torchrun: the ranks agree that a checkpoint is there on all of them or on none."""
    output, log = tmp_path / "run", tmp_path / "log"
    faults = Injected(tmp_path / "faults", *(fault for fault, _ in SAVING.values()))
    run = start_ranks(flags_of(injected_place, output), log, layer(tmp_path) | faults.variables)
    assert run.wait(200) == 0, log.read_text()[-3000:]
    assert log.read_text().count("training continues") == len(SAVING)
    assert verified(output) == [1, 8]
    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, injected_place / "reference" / "run")
    )
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) < 1e-5
