"""Are the other machines of a run still there? A sign of life each second.

Collective operations wait for half an hour for a machine that is cut off, since a switched-off machine and a slow one
look alike to them. Here rank 0 listens and the first rank of every other machine writes to it; whoever hears nothing
for `HOST_SECONDS` names the machine and ends its own process, so that the launcher can end and be started again.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from vlm_sft.common.errors import HostLostError, RunError
from vlm_sft.distributed.collectives import gather
from vlm_sft.distributed.launch import Launch

BEAT_SECONDS = 1.0
HOST_SECONDS = 60.0  # without a sign of life; a busy process is silent for much less
VARIABLE = "VLM_SFT_HOST_SECONDS"
CONNECT_SECONDS = 30.0
ASIDE_SECONDS = 3.0  # how long a failed collective operation waits for the reason to be known
_ALIVE, _DONE = b"+", b"."


@dataclass
class _Peer:
    """Another machine, at the other end of a connection."""

    name: str
    heard: float = field(default_factory=time.monotonic)
    done: bool = False


class HostWatch:
    """Watches for machines that fall silent while the block runs; does nothing where there is one machine only.

    Args:
        launch: ranks.
        again: the command line that goes on with this run.
        on_lost: called with the reason before this process is ended, on a thread of its own.

    Attributes:
        lost: what is known about a machine that is gone; "" while all are there.
    """

    def __init__(self, launch: Launch, again: str, on_lost: Callable[[str], None]) -> None:
        self.launch, self.again, self.lost = launch, again, ""
        self.seconds = host_seconds()
        self._on_lost = on_lost
        self._peers: dict[socket.socket, _Peer] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hosts")

    def __enter__(self) -> HostWatch:
        """Connect the machines; every rank must come here.

        Raises:
            RunError: another machine cannot be reached although the launcher met it.
        """
        names = gather((self.launch.local_rank, socket.gethostname()))
        first = [rank for rank, (local_rank, _) in enumerate(names) if local_rank == 0]
        if len(first) < 2 or not self.seconds:
            return self
        listener = None
        if self.launch.rank == 0:
            listener = _listen()
        port = next(value for value in gather(listener.getsockname()[1] if listener else 0) if value)
        if self.launch.rank == 0:
            assert listener is not None
            listener.settimeout(CONNECT_SECONDS)
            self._accept(listener, {rank: names[rank][1] for rank in first if rank})
        elif self.launch.local_rank == 0:
            self._connect(port, names[0][1])
        if self._peers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye: what ends from now on is no loss."""
        self._closing.set()
        for connection in self._peers:
            _send(connection, _DONE)
        if self._thread.is_alive():
            self._thread.join()
            time.sleep(BEAT_SECONDS)  # a connection that is closed with unread bytes takes the goodbye with it
        for connection in self._peers:
            connection.close()

    def explain(self, error: BaseException) -> HostLostError | None:
        """What a failed collective operation means to the user; None where no machine is known to be gone.

        Args:
            error: what ended the training.
        """
        if not self._peers or not isinstance(error, (RuntimeError, OSError)):
            return None
        end = time.monotonic() + ASIDE_SECONDS
        while not self.lost and time.monotonic() < end:
            time.sleep(0.05)
        return HostLostError(self.lost, self._fix()) if self.lost else None

    def _fix(self) -> str:
        return f"when all machines are back, start it again on each of them, as: {self.again}"

    def _accept(self, listener: socket.socket, expected: dict[int, str]) -> None:
        with listener:
            for _ in expected:
                try:
                    connection, _address = listener.accept()
                    connection.settimeout(CONNECT_SECONDS)
                    rank = int.from_bytes(connection.recv(4), "big")
                except OSError as error:
                    raise RunError(
                        f"a machine of {', '.join(expected.values())} does not reach this one: {error}",
                        f"let TCP through between the machines, or set {VARIABLE}=0 to do without signs of life",
                    ) from error
                address = str(connection.getpeername()[0]).removeprefix("::ffff:")
                self._add(connection, f"{expected.get(rank, 'a machine')} ({address}, rank {rank})")

    def _connect(self, port: int, name: str) -> None:
        where = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((where, port), CONNECT_SECONDS)
            connection.sendall(self.launch.rank.to_bytes(4, "big"))
        except OSError as error:
            raise RunError(
                f"{name} ({where}) cannot be reached at port {port}: {error}",
                f"let TCP through between the machines, or set {VARIABLE}=0 to do without signs of life",
            ) from error
        self._add(connection, f"{name} ({where}, rank 0)")

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.setblocking(False)
        self._peers[connection] = _Peer(name)

    def _watch(self) -> None:
        """Until the end of the run: write, read, and see who is silent."""
        beat = 0.0
        while not self._closing.is_set():
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                for connection, peer in self._peers.items():
                    if not peer.done:
                        _send(connection, _ALIVE)
            waiting = [connection for connection, peer in self._peers.items() if not peer.done]
            readable, _, _ = select.select(waiting, [], [], BEAT_SECONDS / 4)
            for connection in readable:
                self._hear(self._peers[connection], connection)
            for peer in self._peers.values():
                silent = time.monotonic() - peer.heard
                if not peer.done and silent > self.seconds:
                    self._end(f"nothing was heard of {peer.name} for {silent:.0f} s", at_once=True)

    def _hear(self, peer: _Peer, connection: socket.socket) -> None:
        try:
            data = connection.recv(1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.heard = time.monotonic()
        if _DONE in data:
            peer.done = True
        elif not data:
            peer.done = True
            self._end(f"{peer.name} has ended without a word", at_once=False)

    def _end(self, reason: str, at_once: bool) -> None:
        """Note what was lost; a process that cannot notice it by itself is ended here."""
        self.lost = reason
        end = time.monotonic() + (0.0 if at_once else self.seconds)
        while time.monotonic() < end:  # a closed connection also ends the operations that wait for it
            if self._closing.wait(BEAT_SECONDS):
                return
        if not self._closing.is_set():
            error = HostLostError(reason, self._fix())
            sys.stderr.write(f"{error.label}: {error}\n")
            sys.stderr.flush()
            self._on_lost(str(error))
            os._exit(error.exit_code)


def host_seconds() -> float:
    """How long a machine may be silent: `VLM_SFT_HOST_SECONDS`, 60 by default, 0 for no watch.

    Raises:
        RunError: it is not a number of seconds.
    """
    text = os.environ.get(VARIABLE, str(HOST_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < timedelta(days=1).total_seconds():
        raise RunError(f"{VARIABLE}={text} is not a number of seconds", "set it to 60, or to 0 for no watch")
    return seconds


def _listen() -> socket.socket:
    """A port that the launcher's address reaches; a name may mean another address on its own machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _send(connection: socket.socket, byte: bytes) -> None:
    try:
        connection.send(byte)
    except OSError:  # full, or closed: the reading side tells
        pass
