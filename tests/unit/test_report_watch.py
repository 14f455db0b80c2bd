"""`vlm-sft report --watch`: a real server, asked over real connections."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests import chromium
from tests.report_runs import Page, make_run, record
from vlm_sft.cli.main import main
from vlm_sft.common import artifacts
from vlm_sft.common.errors import RunError
from vlm_sft.report.serve import make_server


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    monkeypatch.setattr("vlm_sft.report.serve.LIVE_SHARE", 1.0)
    folder = make_run(tmp_path / "run", steps=20)
    artifacts.write_json(folder / artifacts.RUN, record("running"))
    server = make_server([folder], 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield folder, server.server_port
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def ask(port: int, path: str = "/", host: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def listening(port: int) -> set[str]:
    """The local addresses, in the kernel's hexadecimal words, that listen on a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            address, state = line.split()[1], line.split()[3]
            if int(address.rpartition(":")[2], 16) == port and state == "0A":
                found.add(address.rpartition(":")[0])
    return found


def test_the_page_follows_the_run(served: tuple[Path, int]) -> None:
    folder, port = served
    status, text = ask(port)
    version = ask(port, "/version")[1]
    page = Page(text)
    assert status == 200 and "This page updates while the run continues" in page.text
    assert "had not finished" not in page.text, "it goes on, and the page with it"
    assert "This run is in progress" in page.text and "Wall time so far" in page.text
    assert [a["content"] for a in page.all("meta") if a.get("name") == "report-version"] == [version]
    assert "connect-src 'self'" in text and ask(port)[1] == text and ask(port, "/version")[1] == version
    with (folder / artifacts.METRICS).open("a") as stream:
        stream.write(json.dumps({"step": 21, "loss": 0.0123}) + "\n")
    assert ask(port, "/version")[1] != version
    assert any("to 0.0123 at step 21" in a["aria-label"] for a in Page(ask(port)[1]).all("svg"))


def test_a_page_of_runs_that_are_over_says_so(served: tuple[Path, int]) -> None:
    folder, port = served
    artifacts.write_json(folder / artifacts.RUN, record("interrupted"))
    page = Page(ask(port)[1])
    assert "No run is in progress" in page.text and "updates while the run" not in page.text
    assert "This run was interrupted" in page.text and "Wall time so far" not in page.text
    assert not [a for a in page.all("td") if "data-since" in a]


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed")
def test_the_wall_time_goes_on_between_two_writes(served: tuple[Path, int]) -> None:
    """run.json is written at the stages of a run only: hours apart."""
    folder, port = served
    began = datetime.now(UTC) - timedelta(hours=2, minutes=7, seconds=30)
    artifacts.write_json(folder / artifacts.RUN, record("running") | {"started": began.isoformat(timespec="seconds")})
    cells = "[...document.querySelectorAll('td[data-since]')].map(one => one.textContent)"
    live = "document.getElementById('live').textContent"
    with chromium.Chromium() as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.run(cells) == ["2 h 08 min"] * 2
        before = browser.run(live)
        assert re.search(r"while the run continues; its files changed \d+ s ago\.$", before), before
        browser.run("new Promise(done => setTimeout(done, 2500))")
        assert browser.run(live) != before
        old = time.time() - 3600
        for path in folder.rglob("*"):
            os.utime(path, (old, old))
        browser.open(f"http://127.0.0.1:{port}/")
        assert re.search(r"changed 1 h 00 min ago: it may have stopped without a message\.$", browser.run(live))
        assert browser.messages == []


def test_it_serves_this_machine_and_nothing_else(served: tuple[Path, int]) -> None:
    folder, port = served
    if Path("/proc/net/tcp").exists():
        assert listening(port) == {"0100007F"}
    assert ask(port, host=f"localhost:{port}")[0] == 200
    assert ask(port, host="evil.example")[0] == 403, "a name that a foreign page made point here"
    for path in ("/run.json", "/../run.json", "//etc/passwd", "/evaluation/images/"):
        assert ask(port, path)[0] == 404
    with pytest.raises(RunError, match=rf"port {port} is in use(.|\n)*--port 0"):
        make_server([folder], port)


def test_a_run_that_vanishes_leaves_its_last_page(served: tuple[Path, int]) -> None:
    folder, port = served
    before = ask(port)[1]
    folder.rename(folder.with_name("gone"))
    assert ask(port) == (200, before)


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "run", steps=3))
    for flags, told in (
        (["--watch", "--output", "x.html"], "--watch writes no file"),
        (["--port", "1"], "--port is only for --watch"),
        (["--watch", "--port", "99999"], "port 99999 cannot be used"),
    ):
        assert main(["report", run, *flags]) == 2
        assert told in capsys.readouterr().err


def test_it_ends_cleanly_on_an_interrupt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    command = [sys.executable, "-m", "vlm_sft", "report", str(run), "--watch", "--port", "0"]
    # What a shell starts in the background ignores SIGINT, and so do its children.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", told)
        assert port is not None, told
        assert ask(int(port[1]))[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and err == "" and "stopped" in out
