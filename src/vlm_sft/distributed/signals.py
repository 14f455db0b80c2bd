"""Signals that ask a run to stop: noticed at once, acted on at the end of a step.

A scheduler that takes a machine away, a spot instance that ends, a terminal that is closed and Ctrl-C all say it with a
signal. The first one ends the run in order: during the training after a checkpoint of the present step, elsewhere at
once. A later one ends the process without further work.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vlm_sft.common.console import warn
from vlm_sft.common.errors import InterruptedRunError
from vlm_sft.distributed.launch import Launch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# A launcher passes a signal on to ranks that a terminal or a scheduler has signalled already: that is one request.
REPEAT_SECONDS = 3.0
STUCK_SECONDS = 15.0  # outside of the training, where a rank may wait for another one that is gone
_LOOK_SECONDS = 1.0


class StopSignals:
    """Watches for signals while a run goes on; use it as a context manager, in the main thread.

    Args:
        again: the command line that goes on with this run.
        on_stuck: called before a process that does not come to an end by itself is ended.
        ends_process: False where the process belongs to a caller: a repeated signal interrupts it again, and nothing
            ends it.

    Attributes:
        requested: name of the first signal; "" while there was none.
    """

    def __init__(self, again: str, on_stuck: Callable[[], None], ends_process: bool = True) -> None:
        self.again = again
        self.requested = ""
        self._on_stuck = on_stuck
        self._ends_process = ends_process
        self._first = 0.0
        self._at_step_end = False
        self._free_since = 0.0
        self._launchers = _launchers()
        self._previous: dict[int, Any] = {}
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")

    def __enter__(self) -> StopSignals:
        """Begin to watch."""
        if threading.current_thread() is threading.main_thread():
            # The wake-up descriptor is written to even while the main thread computes outside of Python.
            signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
            under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            wanted = [number for number in SIGNALS if not (number == signal.SIGHUP and under_nohup)]
            self._previous = {number: signal.signal(number, self._handle) for number in wanted}
        self._free_since = time.monotonic()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave signals to what handled them before."""
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        self._theirs.send(b"\0")
        self._watcher.join()
        self._ours.close()
        self._theirs.close()

    @contextmanager
    def at_step_end(self) -> Iterator[None]:
        """Inside, a signal is only noted; the training asks for it at the end of each step."""
        self.check()
        self._at_step_end = True
        try:
            yield
        finally:
            self._free_since = time.monotonic()
            self._at_step_end = False
        self.check()

    def check(self) -> None:
        """Raise InterruptedRunError when a signal came."""
        if self.requested:
            raise self.interruption("")

    def interruption(self, where: str) -> InterruptedRunError:
        """What a stopped run ends with.

        Args:
            where: what is on disk, e.g. "after step 120, with a checkpoint"; "" where no step is at an end.
        """
        name = self.requested or "a signal to another rank"
        return InterruptedRunError(f"stopped by {name} {where}".rstrip(), f"go on with: {self.again}", bool(where))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        self.requested = self.requested or signal.Signals(number).name
        repeated = not first and not self._ends_process and time.monotonic() - self._first > REPEAT_SECONDS
        if repeated or (first and not self._at_step_end):
            raise self.interruption("")

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._ours], [], [], _LOOK_SECONDS)
            for number in self._ours.recv(64) if readable else b"":
                if not number:
                    return
                if number in SIGNALS:
                    self._note(number)
            if not self._first and self._launchers != _launchers(len(self._launchers)):
                warn("the launcher is gone")
                os.kill(os.getpid(), signal.SIGTERM)
            since = max(self._first, self._free_since)
            if (
                self._ends_process
                and self._first
                and not self._at_step_end
                and time.monotonic() - since > STUCK_SECONDS
            ):
                self._on_stuck()
                os._exit(InterruptedRunError.exit_code)

    def _note(self, number: int) -> None:
        """Take note of a signal; a second one ends the process."""
        now = time.monotonic()
        if not self._first:
            self._first = now
            name = signal.Signals(number).name
            todo = "saving after this step" if self._at_step_end else "stopping"
            warn(f"{name}: {todo}; the same signal again after {REPEAT_SECONDS:g} s ends the run at once")
        elif self._ends_process and now - self._first > REPEAT_SECONDS:
            os._exit(128 + number)


def _launchers(count: int | None = None) -> list[int]:
    """Process ids of the launchers of this rank, nearest first: torchrun, or deepspeed's two; [] without a launcher.

    Args:
        count: how many there were at the start; None at the start.
    """
    if count == 0 or "LOCAL_RANK" not in os.environ or not Path("/proc/self/stat").is_file():
        return []
    parent = os.getppid()
    try:
        if count is None:
            words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            count = 2 if b"deepspeed.launcher.launch" in words else 1
        found = [parent]
        if count > 1:  # `deepspeed` does not pass signals on to what it started on its own node
            text = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
            found.append(int(text.rpartition(")")[2].split()[1]))
        return found
    except OSError:
        return [parent]


def resume_line(words: Sequence[str], launch: Launch) -> str:
    """The command line that goes on with a run.

    Args:
        words: those of this process, `sys.argv`.
        launch: how it was launched.

    Returns:
        The same line for a shell, with `--resume auto`.
    """
    kept: list[str] = []
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if word == "--resume" and rest and not rest[0].startswith("--"):
            rest.pop(0)
        if word.partition("=")[0] not in ("--resume", "--local_rank", "--local-rank", "--overwrite_output_dir"):
            kept.append(word)
    deepspeed = any(word.startswith(("--local_rank", "--local-rank")) for word in words)
    program = Path(words[0]).name
    processes = os.environ.get("LOCAL_WORLD_SIZE", launch.world_size)
    if deepspeed:
        start = ["deepspeed", f"--num_gpus={processes}", words[0]]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        place = [f"--nnodes={machines}", "--node_rank=N", f"--master_addr={os.environ.get('MASTER_ADDR', '')}"]
        start = ["torchrun", *(place if machines > 1 else []), f"--nproc_per_node={processes}", words[0]]
    elif program == "__main__.py":
        start = ["python", "-m", Path(words[0]).parent.name]
    else:
        start = ["python", words[0]] if program.endswith(".py") else [program]
    return shlex.join([*start, *kept, "--resume", "auto"])
