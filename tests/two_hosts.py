"""Two hosts on this machine: network namespaces with an address of their own, joined by a virtual cable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import ROOT, descendants

BIN = Path(sys.executable).parent
NIC = "eth0"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    """Two namespaces; addresses 10.77.0.1 and 10.77.0.2."""

    def __init__(self, tag: str) -> None:
        self.names = [f"vlm{tag}{index}" for index in (0, 1)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.started: list[subprocess.Popen[bytes]] = []

    def build(self) -> None:
        """Make them; raises CalledProcessError or OSError where that is not permitted."""
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("link", "add", NIC, "netns", first, "type", "veth", "peer", "name", NIC, "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", NIC)
            _ip("-n", name, "link", "set", NIC, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """End what runs there and take them away."""
        for process in self.started:
            self.kill(process)
            process.wait(30)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def start(self, index: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on one of the hosts, in a session of its own."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ}
        environment = {
            **kept,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "NIC": NIC,
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[index], *command],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
        self.started.append(process)
        return process

    def torchrun(self, index: int, flags: list[str], log: Path, port: int, **variables: str) -> subprocess.Popen[bytes]:
        """Start examples/clusters/torchrun.sh on one of the hosts, one process each."""
        place = {
            "NNODES": "2",
            "NODE_RANK": str(index),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(port),
            "GPUS_PER_NODE": "1",
            "SFT_CONFIG": "configs/sft_config_smoketest.json",
        }
        return self.start(index, ["examples/clusters/torchrun.sh", *flags], log, **{**place, **variables})

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to everything that one started command became, as when the power fails."""
        try:
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def cut(self, index: int) -> None:
        """Pull the cable."""
        _ip("-n", self.names[index], "link", "set", NIC, "down")

    def mend(self, index: int) -> None:
        """Plug it in again."""
        _ip("-n", self.names[index], "link", "set", NIC, "up")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts while the block runs.

    Raises:
        PermissionError: this process may not make namespaces.
    """
    hosts = TwoHosts(f"{os.getpid()}x{time.monotonic_ns() % 100_000}")
    try:
        try:
            hosts.build()
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or error
            raise PermissionError(f"network namespaces cannot be made: {why}") from error
        yield hosts
    finally:
        hosts.remove()


def await_file(path: Path, processes: list[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Wait for a file; False when a process ended or the time passed before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists():
            return True
        if any(process.poll() is not None for process in processes):
            return path.exists()
        time.sleep(0.05)
    return False
