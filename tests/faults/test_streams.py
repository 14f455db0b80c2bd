"""Standard streams that lack characters, are full, or are gone: what is shown never decides about a run."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import arguments, make_place
from tests.processes import SCRIPT, environment
from tests.wording import line_with
from vlm_sft.common.artifacts import read_jsonl

LIBRARIES = """
import logging, sys, warnings
from vlm_sft.common.console import lost_streams, secure_streams
secure_streams()
from tqdm import tqdm
for _ in tqdm(range(3), file=sys.stderr): print("⟦a print⟧" * 5000)
logging.getLogger("a").warning("⟦of a library⟧" * 5000)
warnings.warn("⟦a warning⟧" * 5000)
sys.stdout.buffer.write(b"bytes" * 5000)
sys.stdout.flush()
open(sys.argv[1], "w").write(" ".join(f"{name}:{error.errno}" for name, error in sorted(lost_streams().items())))
"""


def closed_pipe() -> int:
    """The writing end of a pipe whose reader is gone, as of `| head -1` after its line."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def hung_up_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


def run_with(command: list[str], stdout: Any, stderr: Any, more: dict[str, str] | None = None) -> int:
    try:
        return subprocess.run(
            command, stdout=stdout, stderr=stderr, env=environment() | (more or {}), timeout=500, check=False
        ).returncode
    finally:
        for one in {one for one in (stdout, stderr) if isinstance(one, int) and one >= 0}:
            os.close(one)


@pytest.mark.parametrize("make, code", [(closed_pipe, 32), (full_disk, 28), (hung_up_terminal, 5)])
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_libraries_outlive_both_streams(make: Any, code: int, flags: list[str], tmp_path: Path) -> None:
    """Prints, logging, warnings, bars, bytes, and the flush at the end, which would be exit code 120."""
    command = [sys.executable, *flags, "-c", LIBRARIES, str(tmp_path / "lost")]
    assert run_with(command, make(), make(), {"PYTHONIOENCODING": "latin-1"}) == 0
    assert (tmp_path / "lost").read_text() == f"stderr:{code} stdout:{code}"


def test_streams_that_were_closed_take_no_file_of_the_run(tmp_path: Path) -> None:
    """With descriptor 1 free, the next file would get it, and what a library prints would go there."""
    shell = f'exec "{sys.executable}" -c "$0" "{tmp_path / "lost"}" <&- >&- 2>&-'
    assert run_with(["bash", "-c", shell, LIBRARIES], None, None) == 0
    assert (tmp_path / "lost").read_text() == "stderr:9 stdout:9"


def test_a_stream_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    """A pipe that another program made non-blocking raises BlockingIOError as soon as its reader is slow."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    imports = "from vlm_sft.common.console import secure_streams, say"
    code = imports + "; secure_streams(); [say('x' * 99999) for _ in range(20)]"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, env=environment())
    os.close(writing)
    time.sleep(1)
    with os.fdopen(reading, "rb") as stream:
        assert len(stream.read()) == 20 * 100_000
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("streams"))


def training(place: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments(place, output, "--max_steps", "2", "--logging_steps", "1", *more)]


def finished(output: Path) -> list[str]:
    """The notes of a run that came to its end."""
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished", record["notes"]
    assert (output / "adapter_model.safetensors").is_file() and (output / "report.html").is_file()
    assert [row["step"] for row in read_jsonl(output / "metrics.jsonl") if "loss" in row] == [1, 2]
    return [note for note in record["notes"] if "was lost" in note]


@pytest.mark.parametrize("encoding", [pytest.param("latin-1", marks=pytest.mark.slow), "ascii"])
def test_a_terminal_without_our_characters_ends_no_training(encoding: str, place: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        command = training(place, tmp_path / "run", "--verbose")
        assert run_with(command, log, subprocess.STDOUT, {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}) == 0
    assert finished(tmp_path / "run") == []
    said = (tmp_path / "log").read_text(encoding)
    assert "step 2: eval_loss" in said and "?" in said and "⟦" not in said


@pytest.mark.parametrize(
    "make, reason",
    [(closed_pipe, "Broken pipe"), pytest.param(full_disk, "No space left on device", marks=pytest.mark.slow)],
)
def test_a_training_outlives_its_standard_output(make: Any, reason: str, place: Path, tmp_path: Path) -> None:
    with (tmp_path / "errors").open("wb") as errors:
        assert run_with(training(place, tmp_path / "run"), make(), errors) == 0
    (note,) = finished(tmp_path / "run")
    assert line_with(note, "standard output was lost", reason)
    told = (tmp_path / "errors").read_text()
    assert told.count(note) == 1 and "Traceback" not in told


def test_a_training_needs_no_stream_at_all(place: Path, tmp_path: Path) -> None:
    shell = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *training(place, tmp_path / "run")]
    assert run_with(shell, None, None) == 0
    assert len(finished(tmp_path / "run")) == 2


def test_a_terminal_that_is_closed_leaves_a_checkpoint(place: Path, tmp_path: Path) -> None:
    """The hang-up is a request to stop, like SIGTERM; what is said of it reaches nobody and ends nothing."""
    output = tmp_path / "run"
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below `nohup`, and so in all that it starts
        os.execve(sys.executable, training(place, output, "--max_steps", "2000"), environment())
    os.set_blocking(terminal, False)
    end = time.monotonic() + 400
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < end:
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    record = json.loads((output / "run.json").read_text())
    assert os.waitstatus_to_exitcode(status) == 75 and record["status"] == "interrupted", record["notes"]
    assert any(path.name.startswith("checkpoint-") for path in output.iterdir())


def vlm_sft(*words: str) -> list[str]:
    return [sys.executable, "-m", "vlm_sft", *words]


@pytest.mark.parametrize(
    "verb", ["score", "completion", pytest.param("plan", marks=pytest.mark.slow), "--version", "--help"]
)
def test_what_only_prints_fails_without_its_reader(verb: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "1", "prediction": "2", "answers": ["2"]}\n')
    data = ["--base_model", str(place / "model"), "--dataset", str(place / "data")]
    words = {
        "score": ["--benchmark", "chartqa", "--predictions", str(tmp_path / "p.jsonl"), "--json"],
        "completion": ["bash"],
        "plan": [*data, "--output_dir", str(tmp_path / "run")],
    }.get(verb, [])
    command = vlm_sft(verb, *words)
    for make, code, told in ((closed_pipe, 128 + signal.SIGPIPE, ""), (full_disk, 1, "No space left on device")):
        with (tmp_path / "errors").open("wb") as errors:
            assert run_with(command, make(), errors) == code
        said = (tmp_path / "errors").read_text()
        assert told in said and "Traceback" not in said and "Exception" not in said
    assert run_with(command, subprocess.DEVNULL, subprocess.DEVNULL) == 0


def test_mistakes_keep_their_exit_code_without_standard_error(tmp_path: Path) -> None:
    for make in (closed_pipe, full_disk):
        assert run_with(vlm_sft("report", str(tmp_path / "gone")), subprocess.DEVNULL, make()) == 2
        assert run_with(vlm_sft("report", "--no_such_flag"), subprocess.DEVNULL, make()) == 2
