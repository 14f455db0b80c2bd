"""Processes of ours, started as a user starts them, by a launcher, or forked from one that has the libraries loaded.

A cold start spends most of its seconds on imports. A forked child runs the same script with the same arguments in a
session of its own, so what is not about the start itself is tested with `Warm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "src" / "train_vlm_sft.py"
MAIN = ROOT / "src" / "vlm_sft" / "__main__.py"


def environment() -> dict[str, str]:
    """One thread, no GPU, and this checkout's package: what makes two runs bit-identical."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Ids of the processes below a process."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [one for child in own for one in descendants(child)]


class Started:
    """A process that was started.

    Attributes:
        pid: its id, which is also that of its process group.
        wait: takes seconds; returns the exit code, or None while it runs.
        log: what it prints.
        peak_mib: the most memory that it held, once it has ended; known of forked ones.
    """

    def __init__(self, pid: int, wait: Callable[[float], int | None], log: Path) -> None:
        self.pid, self.wait, self.log = pid, wait, log
        self.peak_mib: int | None = None

    def kill(self) -> None:
        """SIGKILL to the whole process group, and to what a launcher has started in other groups."""
        below = descendants(self.pid)
        for end, pid in ((os.killpg, self.pid), *((os.kill, one) for one in below)):
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)


class Forked:
    """A forked run with what a program uses of `subprocess.Popen`."""

    def __init__(self, started: Started) -> None:
        self.pid, self._started = started.pid, started

    def poll(self) -> int | None:
        """The exit code, or None."""
        return self._started.wait(0.0)

    def wait(self) -> int:
        """The exit code, waited for."""
        code = self._started.wait(300)
        assert code is not None
        return code


class Together(Started):
    """Ranks of one run, taken as one process: it ends with the last of them, with the first code that is not 0."""

    def __init__(self, ranks: Sequence[Started]) -> None:
        super().__init__(ranks[0].pid, self._wait, ranks[0].log)
        self._ranks = ranks

    def _wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        codes = [rank.wait(max(0.0005, end - time.monotonic())) for rank in self._ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for rank in self._ranks:
            rank.kill()


def start(command: list[str], log: Path, more: Mapping[str, str] | None = None) -> Started:
    """Start a command line in its own process group, with further variables in its environment."""
    stream = log.open("ab")
    process = subprocess.Popen(
        command,
        env=environment() | dict(more or {}),
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=log.parent,
    )
    stream.close()

    def wait(seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Started(process.pid, wait, log)


def start_cold(flags: list[str], log: Path) -> Started:
    """The launch line as a user types it."""
    return start([sys.executable, str(SCRIPT), *flags], log)


def start_ranks(flags: list[str], log: Path, more: Mapping[str, str] | None = None) -> Started:
    """The launch line on two ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return start([*launcher, str(SCRIPT), *flags], log, more)


def start_deepspeed(flags: list[str], log: Path) -> Started:
    """The launch line on two ranks under DeepSpeed, ZeRO-2."""
    launcher = Path(sys.executable).parent / "deepspeed"
    several = [str(launcher), "--num_gpus=2", f"--master_port={free_port()}", str(SCRIPT)]
    return start([*several, *flags, "--deepspeed", "zero2"], log)


def measure_briefly() -> None:
    """Have this process measure its device for milliseconds: a short run would measure longer than it trains."""
    from vlm_sft.planning import device_rates

    device_rates.PIECE_SECONDS = device_rates.PAUSE_SECONDS = 0.005


class Warm:
    """A process with the libraries imported, that forks a run in a fraction of a second; itself started when needed.

    Args:
        more: further variables in its environment.

    Attributes:
        cpu_seconds: of all runs that were waited for, of processes that still serve.
    """

    cpu_seconds = 0.0

    def __init__(self, more: Mapping[str, str] | None = None) -> None:
        self._environment = environment() | dict(more or {})  # of now: a test may change it before the first fork
        self._process: subprocess.Popen[str] | None = None
        self._counted = 0.0

    def _fork(self, order: dict[str, object]) -> int:
        """Have one forked; returns its process id."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm_server"],
                env=self._environment,
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        flags: Sequence[str],
        log: Path,
        more: Mapping[str, str] | None = None,
        settings: Mapping[str, float] | None = None,
        script: Path = SCRIPT,
        errors: Path | None = None,
        folder: Path | None = None,
        without: Iterable[str] = (),
    ) -> Started:
        """Fork a run.

        Args:
            flags: what stands behind the script.
            log: takes standard output, and standard error too where `errors` is not given.
            more: goes into its environment.
            settings: values of constants, `module:NAME`.
            script: what is run.
            errors: takes standard error.
            folder: it runs there.
            without: variables that its environment lacks.
        """
        pid = self._fork(
            {
                "script": str(script),
                "flags": list(flags),
                "log": str(log),
                "errors": str(errors or log),
                "more": dict(more or {}),
                "without": list(without),
                "settings": dict(settings or {}),
                "folder": str(folder or ROOT),
            }
        )
        exited = Path(f"{log}.{pid}.exit")
        ended: list[int] = []  # asked again, a run that has ended says the same

        def wait(seconds: float) -> int | None:
            end = time.monotonic() + seconds
            while not ended:
                if exited.is_file() and (text := exited.read_text()):
                    exited.unlink()
                    code, peak_kib, cpu_seconds = text.split()
                    ended.append(int(code))
                    started.peak_mib = int(peak_kib) // 1024
                    Warm.cpu_seconds += float(cpu_seconds)
                    self._counted += float(cpu_seconds)
                elif time.monotonic() >= end:
                    return None
                else:
                    time.sleep(0.005)
            return ended[0]

        started = Started(pid, wait, log)
        return started

    def run(
        self,
        *words: object,
        folder: Path | None = None,
        more: Mapping[str, str] | None = None,
        without: Iterable[str] = (),
        seconds: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        """Run `vlm-sft WORDS` to its end; what it printed is taken apart as of `subprocess.run`."""
        arguments = [str(word) for word in words]
        with tempfile.TemporaryDirectory(prefix="vlm_sft_warm.") as place:
            out, errors = Path(place, "out"), Path(place, "errors")
            run = self.start(arguments, out, more, script=MAIN, errors=errors, folder=folder, without=without)
            code = run.wait(seconds)
            printed = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in (out, errors)]
            if code is None:
                run.kill()
                run.wait(30)
                raise subprocess.TimeoutExpired(["vlm-sft", *arguments], seconds, *printed)
        return subprocess.CompletedProcess(["vlm-sft", *arguments], code, *printed)

    def start_ranks(
        self,
        flags: Sequence[str],
        log: Path,
        more: Mapping[str, str] | None = None,
        settings: Mapping[str, float] | None = None,
        script: Path = SCRIPT,
    ) -> list[Started]:
        """Fork two ranks of one run, as torchrun would start them; nobody ends the second when the first is gone."""
        both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = ({**(more or {}), **both, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
        return [self.start(flags, log, variables, settings, script) for variables in ranks]

    def start_both(self, flags: Sequence[str], log: Path, script: Path = SCRIPT) -> Started:
        """Fork two ranks of one run, taken as one process."""
        return Together(self.start_ranks(flags, log, script=script))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(120)
            Warm.cpu_seconds -= self._counted  # from now on the system counts them
