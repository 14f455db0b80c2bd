"""Processes that prepare steps ahead of the training; a lost one is noticed, named and started again.

torch's own loader raises from a signal handler, anywhere in the training, when a worker dies, and cannot tell which
image a hung one was reading. Here every worker has a pipe of its own and says which image it is at.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
import torch.multiprocessing

from vlm_sft.common.errors import DataError, VlmSftError
from vlm_sft.data.image_failures import WORKER_DIED, WORKER_HUNG

HANG_SECONDS = 50.0  # at one image, before its worker counts as hung
LOOK_SECONDS = 1.0  # between two looks at a worker that is waited for
AHEAD = 2  # steps that a worker prepares before they are asked for
_PR_SET_PDEATHSIG = 1
_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class Steps(Protocol):
    """What workers read: steps by index, and a place where each worker notes what it is at.

    Attributes:
        slot: number of this worker, a row of `at`.
        at: (workers, 2) float64 in shared memory: the image that a worker reads (-1: none) and since when.
        bad: images that are not to be read, with the reason.
    """

    slot: int
    at: torch.Tensor
    bad: dict[int, str]

    def __getitem__(self, index: Any, /) -> Any:
        """Prepare one step."""
        ...


class WorkerLost(Exception):
    """A worker died or hangs.

    Attributes:
        kind: `WORKER_DIED` or `WORKER_HUNG`.
        image: the image that it was reading; -1 where it had not begun.
        reason: one sentence.
    """

    def __init__(self, kind: str, image: int, reason: str) -> None:
        self.kind, self.image, self.reason = kind, image, reason
        super().__init__(reason)


@dataclass
class _Worker:
    """One process, its pipe, and the indices that it has been given and not yet answered."""

    process: BaseProcess
    pipe: Connection
    given: deque[Any] = field(default_factory=deque)
    since: float = 0.0


class _Fetch(threading.Thread):
    """Takes an answer out of a pipe. Its tensors come from the worker itself, which may stand still by then.

    Attributes:
        done: whether `answer` is there.
        answer: what the worker sent.
    """

    def __init__(self, pipe: Connection) -> None:
        super().__init__(daemon=True, name="data worker's answer")
        self.done = False
        self.answer: Any = None
        self._pipe = pipe
        self.start()

    def run(self) -> None:
        """Wait for it; once the worker is ended this ends too."""
        with contextlib.suppress(EOFError, OSError, RuntimeError):
            self.answer = self._pipe.recv()
            self.done = True


class WorkerPool:
    """Prepares steps in processes, in order.

    Args:
        steps: what is read; its `at` must have a row for every worker.
        indices: of all steps, in order.
        count: number of processes.
    """

    def __init__(self, steps: Steps, indices: Sequence[Any], count: int) -> None:
        self._steps = steps
        self._todo = deque(indices)
        self._order: deque[int] = deque()  # worker numbers, in the order in which their answers are due
        self._workers = [self._start(number) for number in range(count)]
        atexit.register(self.close)
        for _ in range(AHEAD):
            for number in range(count):
                self._give(number)

    def _start(self, number: int) -> _Worker:
        context = torch.multiprocessing.get_context()
        ours, theirs = context.Pipe()
        self._steps.at[number] = -1
        process = context.Process(
            target=_serve, args=(self._steps, number, theirs, os.getpid()), daemon=True, name=f"data worker {number}"
        )
        # Between its birth and its own settings a worker would handle a signal as the training does.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours)

    def _give(self, number: int) -> None:
        if self._todo:
            index = self._todo.popleft()
            self._workers[number].given.append(index)
            self._order.append(number)
            self._ask(self._workers[number], index)

    def _ask(self, worker: _Worker, index: Any) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is due
            worker.pipe.send((index, self._steps.bad))

    def next(self) -> Any:
        """The next step; StopIteration after the last one.

        Raises:
            WorkerLost: the worker that prepares it died or hangs; `restart` and call again.
            VlmSftError: what the worker raised.
        """
        if not self._order:
            raise StopIteration
        number = self._order[0]
        worker = self._workers[number]
        worker.since = time.monotonic()
        answer = self._answer(number)
        self._order.popleft()
        worker.given.popleft()
        self._give(number)
        if isinstance(answer, _Failure):
            raise DataError(answer.what, answer.fix) if answer.fix else RuntimeError(f"in a data worker: {answer.what}")
        return answer

    def _answer(self, number: int) -> Any:
        worker = self._workers[number]
        fetch: _Fetch | None = None
        while True:
            if fetch is None:
                ready = wait([worker.pipe, worker.process.sentinel], timeout=LOOK_SECONDS)
                fetch = _Fetch(worker.pipe) if worker.pipe in ready else None
            if fetch is not None:
                fetch.join(LOOK_SECONDS)
                if fetch.done:
                    return fetch.answer
                if not fetch.is_alive():  # its tensors cannot be fetched from a dead process
                    worker.process.join(LOOK_SECONDS)
            if not worker.process.is_alive():
                image = int(self._steps.at[number, 0])
                raise WorkerLost(WORKER_DIED, image, f"a data worker died ({_ending(worker.process.exitcode)})")
            image, began = self._steps.at[number].tolist()
            age = time.monotonic() - (worker.since if image < 0 else began)
            if age > HANG_SECONDS:
                raise WorkerLost(WORKER_HUNG, int(image), f"a data worker has been at one image for {age:.0f} s")

    def restart(self) -> None:
        """Replace the worker whose answer is due; what it had been given is prepared again."""
        number = self._order[0]
        lost = self._workers[number]
        _end([lost])
        self._workers[number] = fresh = self._start(number)
        fresh.given = lost.given
        for index in fresh.given:
            self._ask(fresh, index)

    def close(self) -> None:
        """End all workers at once."""
        atexit.unregister(self.close)
        _end(self._workers)
        self._workers, self._order = [], deque()


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(5.0)
        worker.pipe.close()


def _ending(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception of a worker: its message and fix; a traceback and no fix for a bug of ours."""

    what: str
    fix: str


def _serve(steps: Steps, number: int, pipe: Connection, parent: int) -> None:
    """In the worker: answer requests until the parent is gone."""
    _settle_in(parent)
    steps.slot = number
    while True:
        while not pipe.poll(LOOK_SECONDS):
            if os.getppid() != parent:
                os._exit(0)
        try:
            index, steps.bad = pipe.recv()
        except EOFError:
            return
        try:
            answer = steps[index]
        except VlmSftError as error:
            answer = _Failure(error.what, error.fix or "look at the data")
        except Exception:
            answer = _Failure(traceback.format_exc(), "")
        steps.at[number] = -1
        pipe.send(answer)


def _settle_in(parent: int) -> None:
    """Leave signals to the training process, end with it, and use one core."""
    signal.set_wakeup_fd(-1)
    for number in _STOPPING:
        # A scheduler signals every process of a job; the training still needs its workers to finish the step.
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    torch.set_num_threads(1)
