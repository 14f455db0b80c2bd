"""Killed anywhere and resumed: the same adapter bit for bit, the same log; nothing that is read back may be damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.damage import damage_everything
from tests.faults.harness import Reference, Tally, arguments, make_place, torture
from tests.processes import MAIN, SCRIPT, Forked, Warm
from tests.wording import line_with
from vlm_sft.cli.main import main
from vlm_sft.train import resume_check
from vlm_sft.train.checkpoint.directory import checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def reference(place: Path, warm: Warm) -> Reference:
    log = place / "log"
    assert warm.start(arguments(place, place / "reference"), log).wait(120) == 0, log.read_text()[-2000:]
    return Reference.of(place / "reference")


def go_on(warm: Warm, place: Path, output: Path, *more: str) -> tuple[int | None, str]:
    """Start or resume a run; returns its exit code and what it said."""
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    code = warm.start(arguments(place, output, *more), log).wait(120)
    return code, log.read_text()


def interrupted(place: Path, output: Path) -> Path:
    """A copy of the reference run as if it had been killed after step 6."""
    shutil.copytree(place / "reference", output)
    shutil.rmtree(output / "checkpoint-8")
    return output


@pytest.mark.parametrize(
    ("moments", "more"),
    [(["caching", "saving", "evaluating", "rotating"], ()), (["sealing"], ("--dataloader_num_workers", "2"))],
    ids=["every stage", "loader workers"],
)
def test_killed_and_resumed(
    moments: list[str], more: tuple[str, ...], warm: Warm, place: Path, reference: Reference, tmp_path: Path
) -> None:
    tally = Tally()
    torture(warm.start, place, reference, moments, tmp_path / "run", tally, random.Random(0), more)
    assert tally.trouble == []
    assert (tally.finished, tally.identical, tally.left_over) == (1, 1, 0)
    # A fast run may be over before a short moment is seen; most of them have to be met.
    assert sum(tally.kills.values()) >= len(moments) // 2
    assert tally.most_lost_steps <= 2


def test_two_ranks_killed_and_resumed(warm: Warm, place: Path, reference: Reference, tmp_path: Path) -> None:
    run = warm.start_both(arguments(place, tmp_path / "whole"), tmp_path / "log")
    assert run.wait(200) == 0, (tmp_path / "log").read_text()[-2000:]
    whole = Reference.of(tmp_path / "whole")
    tally = Tally()
    # One cache for both: ranks that share out the images compute features in other batches, with other roundings.
    cache = ("--cache_dir", str(place / "cache"))
    torture(warm.start_both, place, whole, ["rotating"], tmp_path / "killed", tally, random.Random(1), cache)
    assert (tally.trouble, tally.finished, tally.identical) == ([], 1, 1)
    left, right = (
        load_file(place / "reference" / "adapter_model.safetensors"),
        load_file(tmp_path / "whole" / "adapter_model.safetensors"),
    )
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-5


def test_two_ranks_go_on_with_what_one_began(warm: Warm, place: Path, reference: Reference, tmp_path: Path) -> None:
    output = interrupted(place, tmp_path / "run")
    run = warm.start_both(arguments(place, output), tmp_path / "log")
    assert run.wait(200) == 0, (tmp_path / "log").read_text()[-2000:]
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output, place / "reference"))
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5
    assert [row["step"] for row in Reference.of(output).rows] == [row["step"] for row in reference.rows]


def test_damaged_checkpoints_are_passed_over_and_told(
    warm: Warm, place: Path, reference: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(place / "reference", output)
    newest = checkpoints(output)[-1]
    path = newest / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)
    code, told = go_on(warm, place, output)
    assert code == 0
    assert line_with(told, newest, "cannot be resumed", "optimizer.safetensors", "checksum")
    assert line_with(told, "resuming from", output / "checkpoint-6")
    assert reference.differences(output) == []


def test_every_kind_of_damage_is_found(place: Path, reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    found = damage_everything(place / "reference", place / "cache", 4, 2, random.Random(0))
    assert {kind.split(":")[0] for kind in found} == {"checkpoint", "adapter", "cache"}
    assert {kind: seen for kind, (done, seen) in found.items() if seen != done} == {}
    assert sum(done for done, _ in found.values()) >= 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--learning_rate", "0.02"], ("learning_rate", "0.01", "0.02")),
        (["--prompt_template", "Q: {question}"], ("prompt", "template")),
        (["--global_batch_size", "4"], ("global batch size", "5", "4")),
    ],
)
def test_a_change_is_refused_and_listed(
    change: list[str], named: tuple[str, ...], warm: Warm, place: Path, reference: Reference, tmp_path: Path
) -> None:
    output = interrupted(place, tmp_path / "run")
    before = {path: path.read_bytes() for path in output.glob("checkpoint-*/*")}
    code, told = go_on(warm, place, output, *change)
    assert code == 2
    assert line_with(told, *named) and "--allow_changes" in told and "Traceback" not in told
    assert {path: path.read_bytes() for path in output.glob("checkpoint-*/*")} == before


def test_changed_data_and_base_are_refused_and_allowed(
    warm: Warm, place: Path, reference: Reference, tmp_path: Path
) -> None:
    output = interrupted(place, tmp_path / "run")
    for name in ("model", "data"):
        shutil.copytree(place / name, tmp_path / "other" / name)
    for path in place.glob("*.png"):
        shutil.copy(path, tmp_path / "other")
    rows = [json.loads(line) for line in (tmp_path / "other" / "data" / "train.jsonl").read_text().splitlines()]
    rows[3]["answer"] = "another"
    (tmp_path / "other" / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "other" / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    code, told = go_on(warm, tmp_path / "other", output)
    assert code == 2
    assert line_with(told, "training data: ") and line_with(told, "base model: ")
    assert "evaluation data" not in told
    code, told = go_on(warm, tmp_path / "other", output, "--allow_changes")
    assert code == 0
    assert line_with(told, "warning: ", "changed", "training data")
    assert json.loads((output / "run.json").read_text())["resumes"][-1]["step"] == 6


def test_a_second_run_in_the_folder_is_refused(warm: Warm, place: Path, reference: Reference, tmp_path: Path) -> None:
    first = warm.start(arguments(place, tmp_path / "run"), tmp_path / "first.log")
    while not (tmp_path / "run" / "run.json").exists():
        assert first.wait(0.01) is None
    code, told = go_on(warm, place, tmp_path / "run")
    assert code == 2
    assert line_with(told, "error: ", tmp_path / "run", f"process {first.pid}")
    first.kill()
    first.wait(30)
    code, told = go_on(warm, place, tmp_path / "run")
    assert code == 0, told[-2000:]
    assert reference.differences(tmp_path / "run") == []


def test_two_runs_fill_one_cache(warm: Warm, place: Path, reference: Reference, tmp_path: Path) -> None:
    cache = ("--cache_dir", str(tmp_path / "cache"))
    runs = [warm.start(arguments(place, tmp_path / name, *cache), tmp_path / f"{name}.log") for name in ("a", "b")]
    assert [run.wait(200) for run in runs] == [0, 0]
    assert reference.differences(tmp_path / "a") == reference.differences(tmp_path / "b") == []
    assert "damaged" not in (tmp_path / "a.log").read_text() + (tmp_path / "b.log").read_text()


def test_verify_proves_it_on_the_runs_own_configuration(
    warm: Warm,
    place: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first of its trainings starts as a user's would, the two that are killed and resumed are forked."""
    real = subprocess.run

    def begin(words: list[str], **streams: Any) -> Forked:
        return Forked(warm.start(words[words.index("train") :], Path(streams["stdout"].name), script=MAIN))

    def run(words: list[str], **streams: Any) -> Any:
        if "undisturbed" in streams["stdout"].name:
            return real(words, **streams)
        return SimpleNamespace(returncode=begin(words, **streams).wait())

    monkeypatch.setattr(resume_check, "subprocess", SimpleNamespace(run=run, Popen=begin))
    shutil.copytree(place / "reference", tmp_path / "run")
    assert main(["verify", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert "adapter: bit-identical" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "verify" / "verify.json").read_text())["resume_is_exact"] is True


def test_a_write_that_fails_leaves_earlier_checkpoints_as_they_were(
    warm: Warm, place: Path, reference: Reference, tmp_path: Path
) -> None:
    """A file size limit below that of the optimizer: the kernel refuses the write in the middle of a checkpoint."""
    output = interrupted(place, tmp_path / "run")
    before = {path: path.read_bytes() for path in output.glob("checkpoint-*/*")}
    size = (output / "checkpoint-6" / "optimizer.safetensors").stat().st_size
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, runpy, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size - 100}, {size - 100}))\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    log = tmp_path / "log"
    code = warm.start(arguments(place, output, "--on_save_error", "stop"), log, script=script).wait(200)
    told = log.read_text()
    assert code == 2, told[-2000:]
    assert line_with(told, "error: ", "checkpoint of step 8 ")
    assert "File too large" in told and "Traceback" not in told
    assert {path: path.read_bytes() for path in output.glob("checkpoint-*/*")} == before
