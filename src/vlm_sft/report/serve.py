"""Serves the report of runs that go on, to this machine only."""

from __future__ import annotations

import errno
import hashlib
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.console import say
from vlm_sft.common.errors import RunError
from vlm_sft.report.collect import collect_runs
from vlm_sft.report.html import render

ADDRESS = "127.0.0.1"
PORT = 8686
PORTS_TRIED = 20
LINGER_SECONDS = 6.0  # after the end of a training, for an open page to get the last state
WATCHED = (
    artifacts.RUN,
    artifacts.RECIPE,
    artifacts.DATA,
    artifacts.METRICS,
    artifacts.RESULTS,
    artifacts.GUARD,
    f"{artifacts.EVALUATION_FOLDER}/*/*/{artifacts.PREDICTIONS}",
    f"{artifacts.VALIDATION_FOLDER}/*/*/results.json",
)
LIVE = (artifacts.METRICS, WATCHED[-1])  # what a training adds to as it goes on: a page takes that in place
LIVE_SHARE = 0.1  # of a processor, at most, for rendering: the training needs the rest


class LiveReport:
    """The page of some runs, rendered again when one of their files has changed.

    Args:
        folders: run folders; each must hold a run at the start.

    Raises:
        RunError: a folder is no run.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._lock = threading.Lock()
        self._version = ""
        self._page = ""
        self._rest_until = 0.0
        self._asked = float("-inf")
        self._given = ""
        self.page()
        self._asked, self._rest_until = float("-inf"), 0.0

    def version(self) -> str:
        """A text that changes when a file of a run does."""
        self._asked = time.monotonic()
        if self._version and self._asked < self._rest_until:
            return self._version
        return self._state()[0]

    def linger(self) -> None:
        """Wait, for some seconds at most, until a page that is open somewhere has the last state."""
        self._rest_until = 0.0
        ends = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < min(ends, self._asked + LINGER_SECONDS) and self._given != self._state()[0]:
            time.sleep(0.1)

    def _state(self) -> tuple[str, float, str]:
        """The version, when a file was written last in seconds since 1970, and the version without `LIVE` files."""
        digest, frame = hashlib.sha256(), hashlib.sha256()
        newest = 0
        for folder in self.folders:
            for pattern in WATCHED:
                for path in sorted(folder.glob(pattern)):
                    try:
                        state = path.stat()
                    except OSError:  # replaced in this moment: the next look sees the new one
                        continue
                    newest = max(newest, state.st_mtime_ns)
                    told = f"{path}\0{state.st_mtime_ns}\0{state.st_size}\0".encode("utf-8", "surrogateescape")
                    digest.update(told)
                    if pattern not in LIVE:
                        frame.update(told)
        return digest.hexdigest(), newest / 1e9, frame.hexdigest()

    def page(self) -> str:
        """The page of the present state; the last one while a run cannot be read."""
        with self._lock:  # several requests at a time would render the same page several times
            version, changed, frame = self._state()
            if version != self._version and time.monotonic() >= self._rest_until:
                began = time.monotonic()
                try:
                    self._page = render(collect_runs(self.folders), version, changed, frame)
                except RunError:
                    if not self._page:
                        raise
                self._version = version
                ended = time.monotonic()
                self._rest_until = ended + (ended - began) * (1 / LIVE_SHARE - 1) if "data-live" in self._page else 0.0
            self._asked, self._given = time.monotonic(), self._version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    """Answers `/` with the page and `/version` with its version; nothing else exists."""

    def __init__(self, report: LiveReport, *arguments: Any) -> None:
        self.report = report
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a request, if it names this machine: a foreign page must not read the report through another name."""
        assert isinstance(self.server, _Server)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._answer("text/html", self.report.page())
        elif self.path == "/version":
            self._answer("text/plain", self.report.version())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str) -> None:
        data = text.encode("utf-8", artifacts.UNENCODABLE)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the page asks every few seconds."""


class _Server(ThreadingHTTPServer):
    """A server whose threads do not keep the program alive, and that is quiet when a reader goes away."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listening: socket.socket, report: LiveReport) -> None:
        super().__init__(listening.getsockname(), partial(_Handler, report), bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = listening.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a page in the middle of an answer is no error."""


def make_server(folders: Sequence[Path], port: int | None = PORT) -> ThreadingHTTPServer:
    """Make a server of the report of some runs, on the loopback interface only.

    Args:
        folders: run folders.
        port: 0 chooses a free one, None the first free one from `PORT` on; `server_port` tells it.

    Raises:
        RunError: a folder is no run, or the port cannot be used.
    """
    report = LiveReport(folders)
    try:
        return _Server(listen() if port is None else socket.create_server((ADDRESS, port)), report)
    except (OSError, OverflowError) as error:
        busy = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise RunError(
            f"port {port} is in use" if busy else f"port {port} cannot be used: {error}",
            "pass another one with --port, or --port 0 for any free one",
        ) from error


def listen() -> socket.socket:
    """A socket that listens on the first free port from `PORT` on, else on any free one."""
    for port in (*range(PORT, PORT + PORTS_TRIED), 0):
        try:
            return socket.create_server((ADDRESS, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not port:
                raise
    raise AssertionError("the system gives a free port, or an error")


def watch(folders: Sequence[Path], port: int | None = None) -> None:
    """Serve the report until the user interrupts.

    Args:
        folders: run folders.
        port: as for `make_server`.

    Raises:
        RunError: a folder is no run, or the port cannot be used.
    """
    server = make_server(folders, port)
    with server:
        say(f"the report is at http://{ADDRESS}:{server.server_port}/ for this machine only; it follows the runs")
        say("stop with Ctrl-C")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("stopped; `vlm-sft report RUN…` writes the page as a file")


def serve_training(folder: Path, descriptor: int) -> None:
    """Serve the live page of a training until standard input tells, or closes, that it is over.

    Args:
        folder: the run's folder; run.json may come later.
        descriptor: of a socket that listens.
    """
    listening = socket.socket(fileno=descriptor)
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.buffer.read(1)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    while not (folder / artifacts.RUN).is_file():
        if ended.wait(0.1):
            return
    report = LiveReport([folder])
    with _Server(listening, report) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
        ended.wait()
        report.linger()
        server.shutdown()


if __name__ == "__main__":
    serve_training(Path(sys.argv[1]), int(sys.argv[2]))
