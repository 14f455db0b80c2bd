"""A real headless Chromium, driven over its DevTools pipe: tests and benchmarks look at pages through it.

Nothing but the standard library is needed. `find()` gives None where no Chromium is installed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0


def find() -> str | None:
    """The program's path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one tab; a context manager.

    Args:
        width, height: of the window, in CSS pixels.
        dark: prefer a dark colour scheme.
        phone: a touch screen with two device pixels a CSS pixel.

    Attributes:
        messages: what pages wrote to the console, and exceptions in their scripts.
        requests: addresses that pages asked for.
    """

    def __init__(self, width: int = 1200, height: int = 1600, dark: bool = False, phone: bool = False) -> None:
        program = find()
        assert program is not None, "no Chromium is installed"
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        # The browser reads commands on descriptor 3 and writes on 4; the shell puts the pipes there, from above 9 so
        # that the one does not overwrite the other (bash, because sh may know single digits only).
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (to_read, to_write)]
        command = [program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            mobile=phone,
            deviceScaleFactor=2 if phone else 1,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            piece = os.read(self._in, 1 << 20)
            assert piece, "Chromium is gone"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, given = message.get("method", ""), message.get("params", {})
        self._events.append(message)
        if method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value")) for one in given["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def open(self, address: str | Path) -> float:
        """Load a page; the seconds until it was loaded, its scripts had run and it was laid out."""
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        self._events.clear()
        began = time.monotonic()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._receive(began + SECONDS)
        self.run(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done("
            "document.body.offsetHeight))))"
        )
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key: str, text: str = "") -> None:
        """Press and release a key, such as "Tab", or "a" with the text it types."""
        given = {"key": key, "code": key, **({"text": text} if text else {})}
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        self.send("Input.dispatchKeyEvent", type="keyDown", windowsVirtualKeyCode=codes.get(key, 0), **given)
        self.send("Input.dispatchKeyEvent", type="keyUp", windowsVirtualKeyCode=codes.get(key, 0), **given)

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """What the page looks like, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def pdf(self, path: Path) -> Path:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))
        return path
